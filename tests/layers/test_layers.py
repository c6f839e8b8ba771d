"""Every neuron's map: dense columns (thesis algorithm 1), windows and transposed passes are one map.

`push = window = pull` to relative L1 1e-10 in float64, and the windows hold the whole account of every neuron.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import frpc
from frpc.errors import LayerNameError, MemoryLimitError, OptionError, TargetError
from frpc.windows import Grid, Rows
from frpc.windows.rows import PointRows
from frpc.windows.taps import ConvRows
from nets import BasicBlock
from reference import relevance_maps
from strategies import cases

QUICK = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def relative(found: Tensor, expected: Tensor) -> float:
    """`sum|a - ref| / sum|ref|`."""
    return float((found - expected).abs().sum() / expected.abs().sum().clamp(min=1e-300))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Branches(nn.Module):
    """Two branches with different receptive fields, added, then joined with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 6, 5, padding=2)
        self.narrow = nn.Conv2d(4, 6, 1)
        self.third = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(self.wide(x) + self.narrow(x)), self.third(x)], 1)


class Shortcut(nn.Module):
    """The CIFAR ResNets' shortcut: every second cell, and channels of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))


class Excite(nn.Module):
    """A gate in space: each cell scaled by a fixed field."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("field", randn(size, size, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.field


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Branches(),
        nn.ChannelShuffle(2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
        nn.SiLU(),
        nn.MaxPool2d(3, 2, 1),
        Shortcut(),
        nn.Conv2d(10, 10, 3, padding=1, groups=10),
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


@pytest.fixture(scope="module")
def net() -> tuple[frpc.Explainer, Tensor]:
    torch.manual_seed(1)
    module = convolutions().double().eval()
    module[1].running_mean = randn(4, seed=2)
    module[1].running_var = randn(4, seed=3).abs() + 0.5
    x = randn(2, 2, 33, 30, seed=4)
    module(x)
    return frpc.compile(module, (x,)), x


LOCAL = ("0", "1", "2", "3", "3.wide", "4", "5", "6", "7", "8", "9", "10")


@pytest.mark.parametrize("layer", LOCAL)
def test_three_strategies_give_one_map(net: tuple[frpc.Explainer, Tensor], layer: str) -> None:
    explainer, x = net
    dense = explainer.layer(layer, x, strategy="forward").dense()
    windows = explainer.layer(layer, x, strategy="windows")
    assert relative(windows.dense(), dense) <= 1e-10
    assert relative(explainer.layer(layer, x, strategy="transposed").dense(), dense) <= 1e-10
    assert float(windows.residual().max()) <= 1e-12
    assert relative(dense.sum((-1, -2)), windows.values) <= 1e-12
    assert relative(windows.channels(), dense.sum((2, 3))) <= 1e-10
    fresh = explainer.layer(layer, x, strategy="windows")  # nothing held: the transposed pass answers for channels
    assert relative(fresh.channels(), dense.sum((2, 3))) <= 1e-10
    assert relative(fresh.channel(1), dense[:, 1].sum((1, 2))) <= 1e-10


@pytest.mark.parametrize(("band", "lines"), [(1, 60), (20_000, 300)])
def test_bands_and_chunks_of_any_size_give_one_map(
    net: tuple[frpc.Explainer, Tensor], band: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large layers are computed row by row and their products in pieces; small bounds force that on a small net."""
    explainer, x = net
    layers = ("0", "3", "5", "7", "8", "9")
    whole = [explainer.layer(layer, x, strategy="windows").local for layer in layers]
    monkeypatch.setattr("frpc.windows.rows._BAND", band)
    monkeypatch.setattr("frpc.windows.taps._CHUNK", 1)
    monkeypatch.setattr("frpc.windows.taps._LINES", lines)
    for layer, one in zip(layers, whole, strict=True):
        blocks = list(explainer.layer(layer, x, strategy="windows").blocks())
        assert len(blocks) >= (one.shape[2] if band == 1 else 1)
        assert relative(torch.cat([block.local for block in blocks], 2), one) <= 1e-12


def test_bands_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that steps over rows leaves bands half used; they are neither forgotten too early nor changed twice."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 90, 1, stride=6)]
    module, x = nn.Sequential(*layers).double().eval(), randn(1, 2, 40, 8, seed=5)
    explainer = frpc.compile(module, (x,))
    made: list[tuple[int, int]] = []
    for kind in (ConvRows, PointRows):
        compute = kind.compute

        def counted(self: Rows, first: int, last: int, compute: Any = compute) -> Tensor:
            made.append((id(self), first))
            return compute(self, first, last)

        monkeypatch.setattr(kind, "compute", counted)
    monkeypatch.setattr("frpc.windows.rows._BAND", 4 * 4 * 8 * 25)  # four rows of the second convolution
    blocks = list(explainer.layer("4", x, strategy="windows").blocks())
    assert len(made) == len(set(made))
    assert len({producer for producer, _ in made}) == 5
    assert max(Counter(producer for producer, _ in made).values()) >= 7
    whole = explainer.layer("4", x, strategy="forward").dense()
    monkeypatch.undo()
    assert relative(torch.cat([block.local for block in blocks], 2), explainer.layer("4", x, strategy="windows").local) <= 1e-12
    assert relative(explainer.layer("4", x, strategy="windows").dense(), whole) <= 1e-10


@pytest.mark.parametrize("parts", [1, 3])
def test_a_run_holds_no_more_than_the_plan_says(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are forgotten as soon as their readers have passed them, while the first row of the layer is still being made."""
    torch.manual_seed(3)
    pairs = [(2, 8), (8, 8), (8, 8), (8, 8)]
    layers: list[nn.Module] = [part for i, o in pairs for part in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())]
    layers.insert(4, nn.MaxPool2d(2))
    explainer, x = frpc.compile(nn.Sequential(*layers).double().eval()), randn(1, 2, 24, 24, seed=6)
    monkeypatch.setattr("frpc.windows.rows._BAND", 1)  # row by row
    known: set[Rows] = set()
    most = 0
    band = Rows.band

    def watched(self: Rows, first: int, last: int) -> Tensor:
        nonlocal most
        known.add(self)
        found = band(self, first, last)
        pieces = {piece.untyped_storage().data_ptr(): piece.numel() for rows in known for piece in rows._kept.values()}
        most = max(most, sum(pieces.values()))
        return found

    monkeypatch.setattr(Rows, "band", watched)
    maps = explainer.layer("8", x, strategy="windows")
    limit = max(maps.plan.working((k, k + 12 // parts)) for k in range(0, 12, 12 // parts))
    spans = maps.plan.column_spans(int(limit) + 1)
    assert len(spans) == parts
    for _ in maps.blocks(int(limit) + 1):
        pass
    whole = sum(rows.row_elements() * rows.size[1] for rows in known)
    assert most * 8 <= 1.1 * limit  # a row under way may be beside those it is made of
    assert most < 0.5 * whole  # or nothing would be streamed


def test_a_limit_below_one_column_is_refused(net: tuple[frpc.Explainer, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    explainer, x = net
    monkeypatch.setattr("frpc.layers.strategies._SMALL_RUN", 0.0)
    with pytest.raises(MemoryLimitError, match=r"5: one column of positions needs .*, but the limit is 1\.0 kB\."):
        list(explainer.layer("5", x, strategy="windows").blocks(1000))


@pytest.mark.parametrize("layer", LOCAL)
def test_transposed_windows_of_neurons_are_their_maps(net: tuple[frpc.Explainer, Tensor], layer: str) -> None:
    explainer, x = net
    maps = explainer.layer(layer, x, strategy="forward")
    _, channels, height, width = maps.values.shape
    indices = [(c, i, j) for c in (0, channels - 1) for i in (0, height // 2, height - 1) for j in (0, width - 1)]
    cones = explainer.neurons(layer, indices, x, strategy="windows")
    whole = explainer.neurons(layer, indices, x, strategy="transposed")
    assert relative(cones.relevance, whole.relevance) <= 1e-10
    assert relative(cones.relevance.sum((2, 3, 4)), whole.output) <= 1e-12
    for k, index in enumerate(indices):
        assert relative(cones.relevance[1, k].sum(0), maps[1, *index]) <= 1e-10


def test_linear_layers_have_dense_maps_only(net: tuple[frpc.Explainer, Tensor]) -> None:
    explainer, x = net
    maps = explainer.layer("12", x)
    assert maps.plan.ended is not None
    assert "view" in maps.plan.ended
    assert relative(maps.dense(), explainer.layer("12", x, strategy="forward").dense()) <= 1e-10
    assert maps[0, 3].shape == (33, 30)
    assert relative(maps[0, 3].sum(), maps.values[0, 3]) <= 1e-12
    with pytest.raises(OptionError, match="windows end at"):
        explainer.layer("12", x, strategy="windows")


def test_windows_are_the_receptive_fields_of_method_three() -> None:
    """s' = s t, o' = o - p s, r' = r + (k - 1) d s, by hand for two convolutions and a pool."""
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 1, 3, dilation=2)
    )
    x = randn(1, 1, 32, 32)
    explainer = frpc.compile(module.double(), (x,))
    found = [explainer.layer(str(i), x, strategy="windows").window[0] for i in range(4)]
    assert found == [Grid(1, -1, 3), Grid(2, -1, 4), Grid(2, -3, 8), Grid(2, -3, 16)]


def test_a_neuron_outside_its_window_is_exactly_zero(net: tuple[frpc.Explainer, Tensor]) -> None:
    explainer, x = net
    separate = frpc.compile(convolutions().double().eval()[:1], (x,), bias="separate")
    neuron = separate.layer("0", x)[0, 1, 5, 7]
    assert torch.count_nonzero(neuron) <= 9
    assert torch.count_nonzero(neuron[9:12, 13:16]) == torch.count_nonzero(neuron)
    assert explainer.layer("0", x)[0, 1, 5, 7].count_nonzero() > 9  # uniform bias reaches every cell


@pytest.mark.parametrize("limit", [30_000, 60_000, 10**9])
def test_streamed_blocks_are_the_whole_layer(net: tuple[frpc.Explainer, Tensor], limit: int) -> None:
    explainer, x = net
    whole = explainer.layer("5", x, strategy="windows")
    out = torch.full_like(whole.local, torch.nan)
    for block in explainer.layer("5", x, strategy="windows", memory_limit=limit).blocks():
        out[:, :, slice(*block.rows), slice(*block.columns)] = block.local
        assert float(block.residual().max()) <= 1e-12
    assert relative(out, whole.local) <= 1e-12
    small = explainer.layer("5", x, strategy="windows", memory_limit=limit)
    assert relative(small[0, 2, 3, 4], whole[0, 2, 3, 4]) <= 1e-10
    assert float(small.residual().max()) <= 1e-12


def test_over_the_limit_is_refused_with_size_and_remedy(net: tuple[frpc.Explainer, Tensor]) -> None:
    explainer, x = net
    maps = explainer.layer("5", x, strategy="windows", memory_limit=30_000)
    with pytest.raises(MemoryLimitError, match=r"MB, but the limit is 30\.0 kB\. Stream them: for block in maps\.blocks"):
        maps.dense()
    with pytest.raises(MemoryLimitError):
        _ = maps.local


def test_one_axis() -> None:
    module = nn.Sequential(
        nn.Conv1d(3, 4, 5, stride=2, padding=2), nn.GELU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 3, dilation=2), nn.AvgPool1d(2)
    )
    x = randn(2, 3, 41)
    explainer = frpc.compile(module.double(), (x,))
    for layer in "01234":
        dense = explainer.layer(layer, x, strategy="forward").dense()
        assert relative(explainer.layer(layer, x, strategy="windows").dense(), dense) <= 1e-10
        assert relative(explainer.layer(layer, x, strategy="transposed").dense(), dense) <= 1e-10


def test_a_field_in_space_is_sliced_with_the_rows() -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), Excite(12), nn.Conv2d(3, 2, 3)).double()
    x = randn(1, 1, 12, 12)
    explainer = frpc.compile(module, (x,))
    dense = explainer.layer("2", x, strategy="forward").dense()
    assert relative(explainer.layer("2", x, strategy="windows").dense(), dense) <= 1e-10
    cones = explainer.neurons("2", [(1, 9, 0)], x, strategy="windows").relevance
    assert relative(cones[0, 0, 0], dense[0, 1, 9, 0]) <= 1e-10


def check_a_layer(case: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    """Every layer with windows has the maps of dense columns, and those of transposed passes."""
    module, x = case
    assume(x.dim() < 5)  # volumes are refused: windows cover one or two spatial axes
    explainer = frpc.compile(module, (x,))
    layer = data.draw(st.sampled_from(explainer.layers()))
    dense = explainer.layer(layer, x, strategy="forward")
    assume(dense.values.numel() * dense.cells[0] * dense.cells[1] < 4_000_000)
    whole = dense.dense()
    assert float(dense.residual().max()) <= 1e-10
    assert relative(explainer.layer(layer, x, strategy="transposed").dense(), whole) <= 1e-10
    try:
        windows = explainer.layer(layer, x, strategy="windows")
    except OptionError as ended:
        assert "windows end at" in str(ended)  # noqa: PT017
        return
    assert relative(windows.dense(), whole) <= 1e-10


@settings(QUICK, max_examples=15)
@given(cases(head=False), st.data())
def test_random_networks(case: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    """Random chains, sums, concats and pools."""
    check_a_layer(case, data)


@pytest.mark.slow
@settings(QUICK, max_examples=150, derandomize=False, print_blob=True)
@given(cases(head=False), st.data())
def test_many_random_networks(case: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    """The same for more networks, new ones each time."""
    check_a_layer(case, data)


@pytest.mark.parametrize("large", [1, 256])
def test_some_columns_of_a_residual_network(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortcut needs fewer columns of a value than the convolutions beside it."""
    monkeypatch.setattr("frpc.windows.shut._LARGE", large)
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), BasicBlock(6, 6, 1), BasicBlock(6, 8, 2)).double().eval()
    x = randn(2, 2, 14, 14)
    explainer = frpc.compile(module, (x,), bias="separate")
    for layer, size in (("1", 14), ("2", 7)):
        whole = explainer.layer(layer, x, strategy="windows").local
        for span in ((0, 2), (3, 6), (size - 1, size)):
            bands = [band for _, band in explainer.layer(layer, x, strategy="windows")._produce((0, size), span)]
            assert relative(torch.cat(bands, 2), whole[:, :, :, slice(*span)]) <= 1e-12


def test_the_output_layer_is_the_thesis_recursion() -> None:
    """Against the reference written from the paper, pixel cells, all neurons of the last convolution."""
    torch.manual_seed(5)
    module = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3)).double().eval()
    x = randn(1, 1, 10, 10)
    expected = relevance_maps(module, x)
    found = frpc.compile(module, (x,)).layer("3", x, strategy="windows").dense()[0]
    assert relative(found.flatten(-2), expected.maps.reshape(found.flatten(-2).shape)) <= 1e-10


def test_saved_windows_come_back(net: tuple[frpc.Explainer, Tensor], tmp_path: object) -> None:
    from safetensors import safe_open

    explainer, x = net
    maps = explainer.layer("5", x, strategy="windows")
    path = f"{tmp_path}/maps.safetensors"
    maps.save(path)
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("local"), maps.local)
        assert file.metadata()["rows_jump"] == str(maps.window[0].jump)


def test_wrong_indices_and_names(net: tuple[frpc.Explainer, Tensor]) -> None:
    explainer, x = net
    maps = explainer.layer("5", x)
    with pytest.raises(TargetError, match="index them as"):
        _ = maps[1, 2]
    with pytest.raises(TargetError, match="out of range"):
        _ = maps[0, 99, 0, 0]
    with pytest.raises(TargetError, match="Channel 8"):
        maps.channel(8)
    with pytest.raises(LayerNameError, match="nearest"):
        explainer.layer("55", x)
    with pytest.raises(OptionError, match="unknown for a layer"):
        explainer.layer("5", x, strategy="magic")
    with pytest.raises(OptionError, match="unknown for neurons"):
        explainer.neurons("5", [(0, 0, 0)], x, strategy="magic")


NETS = [
    ("resnet18", "layer2.0", 64),
    ("vgg16", "features.7", 48),
    ("densenet121", "features.denseblock1.denselayer3.conv2", 64),
    ("mobilenet_v2", "features.4", 64),
    ("inception_v3", "Mixed_5b", 80),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer", "side"), NETS)
def test_a_sample_of_neurons_of_real_networks(name: str, layer: str, side: int) -> None:
    import torchvision

    torch.manual_seed(0)
    module = getattr(torchvision.models, name)(weights=None, **({"init_weights": False} if name == "inception_v3" else {}))
    x = randn(1, 3, side, side)
    explainer = frpc.compile(module.double(), (x,))
    windows = explainer.layer(layer, x, strategy="windows")
    assert float(windows.residual().max()) <= 1e-11
    _, c, h, w = windows.values.shape
    indices = [(k * 7 % c, k * 5 % h, k * 3 % w) for k in range(12)]
    pulled = explainer.neurons(layer, indices, x, strategy="transposed").relevance.sum(2)
    cones = explainer.neurons(layer, indices, x, strategy="windows").relevance.sum(2)
    for k, index in enumerate(indices):
        assert relative(windows[index], pulled[0, k]) <= 1e-10
        assert relative(cones[0, k], pulled[0, k]) <= 1e-10
