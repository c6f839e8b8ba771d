"""Complex values carry relevance: they are pairs of real ones, and what is done to them is done to the pairs.

The right values: gradients are PyTorch's own, FRP sums to the output, increments to ``f(x) - f(0)``, all in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from families import compiled
from frpc.errors import InputError, OptionError, UnsupportedOpError

TIGHT = 1e-12
WINDOW = torch.hann_window(8, dtype=torch.float64)


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)


A, W, B1, K = drawn(2, 4), drawn(4, 7, seed=4), drawn(4, seed=5), drawn(2, 1, 3, seed=6)


def paired(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(-1, 6, 2))


def written(x: Tensor) -> Tensor:
    """Some frequencies in place of zeros, as Fourier neural operators do."""
    out = torch.zeros(x.shape[0], 7, dtype=torch.complex128)
    out[:, :3] = torch.fft.rfft(x)[:, :3] * 2
    return out.abs()


def split_parts(x: Tensor) -> Tensor:
    z = torch.fft.rfft(x)
    return torch.complex(z.real.relu(), z.imag.relu()).abs()


def spectrogram(x: Tensor) -> Tensor:
    return torch.stft(x, 8, 2, window=WINDOW, return_complex=True)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "length": lambda x: torch.fft.rfft(x).abs(),
    "power": lambda x: torch.fft.rfft(x).abs().pow(2),
    "there and back": lambda x: torch.fft.irfft(torch.fft.rfft(x) * (1 + 2j), n=9),
    "complex there and back": lambda x: torch.fft.ifft(torch.fft.fft(x) * 2j, norm="ortho").imag,
    "two dimensions": lambda x: torch.fft.fft2(x.view(-1, 3, 4)).imag,
    "shifted": lambda x: torch.fft.fftshift(torch.fft.fft(x), dim=-1)[:, 1:6].angle(),
    "Hermitian": lambda x: torch.fft.hfft(torch.fft.ihfft(x)),
    "spectrogram": lambda x: spectrogram(x).abs(),
    "spectrogram of its own windows": lambda x: (
        torch.stft(x, 8, 3, 6, center=False, normalized=True, return_complex=True, window=WINDOW[:6]).real
    ),
    "spectrogram and back": lambda x: torch.istft(spectrogram(x) * (0.5 + 1j), 8, 2, window=WINDOW, length=12),
    "polar": lambda x: torch.polar(x.abs(), x).real,
    "exponential": lambda x: torch.complex(x, 2 * x).exp().imag,
    "conjugate": lambda x: (paired(x).conj() * 1j).conj().imag.neg(),
    "resolved": lambda x: paired(x).conj().resolve_conj().imag.resolve_neg(),
    "adjoint": lambda x: torch.view_as_complex(x.view(-1, 3, 2, 2)).mH.imag,
    "matrices": lambda x: (torch.view_as_complex(x.view(-1, 3, 2, 2)) @ A).abs(),
    "einsum": lambda x: torch.einsum("bi,oi->bo", torch.fft.rfft(x), W).real,
    "linear": lambda x: F.linear(torch.fft.rfft(x), W, B1).abs(),
    "convolution": lambda x: F.conv1d(torch.fft.rfft(x)[:, None], K).abs(),
    "product of two": lambda x: torch.einsum("bi,bi->b", torch.fft.rfft(x), paired(x)[:, [0, 1, 2, 3, 4, 5, 0]]).imag[:, None],
    "times i": lambda x: (x * 1j + x.roll(1, 1)).abs(),
    "quotient": lambda x: (torch.fft.rfft(x) / (paired(x)[:, :1] + 3)).real,
    "reciprocal": lambda x: (1 / (torch.fft.rfft(x) + 2)).imag,
    "cube": lambda x: (torch.fft.rfft(x) ** 3).real,
    "sums": lambda x: torch.fft.rfft(x).mean(-1, keepdim=True).abs() + torch.fft.rfft(x).cumsum(1).imag,
    "written": written,
    "joined": lambda x: torch.cat([torch.fft.rfft(x), torch.stack([paired(x)] * 2, 1).flatten(1)], 1).abs(),
    "padded": lambda x: F.pad(torch.fft.rfft(x), (1, 2)).real,
    "real and imaginary part": split_parts,
    "norm": lambda x: torch.linalg.vector_norm(torch.fft.rfft(x), dim=-1, keepdim=True),
    "cast": lambda x: (x.to(torch.complex128) * W[0, 0]).imag,
}


class Read(nn.Module):
    """A function with a linear layer behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.function, self.last = function, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(x).flatten(1))


def made(name: str) -> tuple[nn.Module, Tensor]:
    x = torch.randn([3, 12], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(0)
    return Read(FUNCTIONS[name], FUNCTIONS[name](x).flatten(1).shape[1]).double().eval(), x


kept = functools.cache(made)
"""A net and an input that no test changes, with one capture for all rules."""


def input_times_gradient(model: nn.Module, x: Tensor, which: int = 1) -> Tensor:
    x = x.clone().requires_grad_()
    return (x * torch.autograd.grad(model(x)[:, which].sum(), x)[0]).detach()


def lost(found: frpc.Explanation, total: Tensor) -> float:
    """The largest ``|sum V - total| / sum |V|``."""
    maps = found.relevance.flatten(1)
    return float(((maps.sum(1) - total.detach()).abs() / maps.abs().sum(1)).max())


DAILY = {
    "length", "there and back", "spectrogram and back", "polar", "conjugate", "linear", "product of two", "quotient", "written",
}  # fmt: skip


@pytest.mark.parametrize("name", [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in FUNCTIONS])
def test_values_and_gradients(name: str) -> None:
    model, x = kept(name)
    want = input_times_gradient(model, x)
    assert want.abs().sum() > 0.01
    found = compiled(model, x, method="gradient-input")(x, target=1)
    assert (found.relevance - want).abs().sum() <= 1e-10 * want.abs().sum()
    explainer = compiled(model, x)
    found = explainer(x, target=1)
    assert lost(found, model(x)[:, 1]) <= TIGHT
    assert "a free batch size" not in [r.what for r in explainer.refusals], "complex numbers must not fix the batch size"
    maps = found.relevance
    assert (maps - maps.mean(1, keepdim=True)).abs().sum() > 0.01 * maps.abs().sum(), "all of it went to constants"
    assert (explainer(x[:1], target=1).relevance - maps[:1]).abs().max() <= TIGHT * maps.abs().max()


@pytest.mark.parametrize("name", ["length", "spectrogram and back", "linear", "quotient", "product of two"])
def test_increments_and_layer_rules_add_up(name: str) -> None:
    model, x = kept(name)
    assert lost(compiled(model, x, method="lid-ig")(x, target=1), (model(x) - model(torch.zeros_like(x)))[:, 1]) <= TIGHT
    for rule in (frpc.rules.LRP(epsilon=1e-6), frpc.rules.LRP(epsilon=0)):
        found = compiled(model, x, rule=rule)(x, target=1)
        assert lost(found, model(x)[:, 1] - found.bias) <= TIGHT


def test_memory_read_as_real_numbers_has_values_and_no_derivative() -> None:
    x = torch.randn(3, 12, dtype=torch.float64)
    model = Read(lambda x: torch.fft.rfft(x).view(torch.float64), 14).double().eval()
    found = frpc.compile(model, (x,))(x, target=1)
    assert lost(found, model(x)[:, 1]) <= TIGHT
    assert found.relevance.std(1).min() > 0.01
    assert not model(x.requires_grad_()).grad_fn.next_functions[1][0], "autograd ends there"
    assert not frpc.compile(model, method="gradient")(x.detach(), target=1).relevance.any()


def test_increments_of_the_length_and_the_angle() -> None:
    """Between two inputs whose angles lie on one side of the cut."""
    reference = torch.rand([1, 12], dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5
    x = reference + torch.rand([3, 12], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    model = Read(lambda x: paired(x).angle() * paired(x).abs(), 6).double().eval()
    found = frpc.compile(model, rule=frpc.rules.LID(reference))(x, target=1)
    assert lost(found, (model(x) - model(reference))[:, 1]) <= TIGHT


def test_a_length_has_no_constant() -> None:
    """``|z| = re d|z|/dre + im d|z|/dim``: the map is input times gradient and nothing is left over."""
    model, x = made("length")
    model.last.bias.data.zero_()
    found = frpc.compile(model, (x,), bias="separate")(x, target=1)
    assert found.bias.abs().max() <= TIGHT
    assert (found.relevance - input_times_gradient(model, x)).abs().max() <= TIGHT


def test_silence_has_a_gradient_of_zero() -> None:
    """The length of 0, which silence is full of, has the derivative that autograd gives it."""
    model, x = made("spectrogram")
    x[1], x[2, :8] = 0, 0
    g = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(model(g)[:, 1].sum(), g)
    got = frpc.compile(model, (x,), method="gradient")(x, target=1).relevance
    assert torch.isfinite(want).all()
    assert (got - want).abs().max() <= TIGHT
    for method in ("frp", "lid-ig"):
        assert torch.isfinite(compiled(model, x, method=method)(x, target=1).relevance).all()


# Whole models ---------------------------------------------------------------------------------------------------------------


class NeuralOperator(nn.Module):
    """A Fourier layer: low frequencies through complex weights, beside a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip, self.last = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1), nn.Linear(120, 2)
        self.weight = nn.Parameter(0.3 * drawn(3, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        frequencies = torch.fft.rfft2(h)
        out = torch.zeros(x.shape[0], 4, 6, 3, dtype=self.weight.dtype, device=x.device)
        out[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", frequencies[:, :, :3, :3], self.weight)
        return self.last(torch.relu(torch.fft.irfft2(out, s=(6, 5)) + self.skip(h)).flatten(1))


class Rotary(nn.Module):
    """Rotary positions as Llama's first code has them, with ``polar`` and ``view_as_complex``."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.last = (nn.Linear(8, n) for n in (8, 8, 8, 2))
        angles = torch.outer(torch.arange(10.0), 1.0 / (10000.0 ** (torch.arange(0, 4, 2) / 4)))
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def turned(self, z: Tensor) -> Tensor:
        pairs = torch.view_as_complex(z.reshape(*z.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: z.shape[1], None]).flatten(3).type_as(z)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, 4)) for layer in (self.query, self.key, self.value))
        q, k, v = (z.transpose(1, 2) for z in (self.turned(q), self.turned(k), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.last(mixed.transpose(1, 2).flatten(2).mean(1))


class StateSpace(nn.Module):
    """S4's diagonal form: a kernel from complex exponentials, a long convolution by Fourier transforms."""

    def __init__(self, channels: int = 3, states: int = 4) -> None:
        super().__init__()
        self.step, self.real, self.imaginary = (
            nn.Parameter(torch.randn(n)) for n in ([channels], [channels, states], [channels, states])
        )
        self.read, self.last = nn.Parameter(torch.randn(channels, states, 2)), nn.Linear(channels, 2)

    def forward(self, u: Tensor) -> Tensor:
        size = u.shape[-1]
        poles = -torch.exp(self.real) + 1j * self.imaginary
        decay = poles * torch.exp(self.step)[:, None]
        read = torch.view_as_complex(self.read) * (torch.exp(decay) - 1.0) / poles
        powers = torch.exp(decay[..., None] * torch.arange(size))
        kernel = 2 * torch.einsum("hn,hnl->hl", read, powers).real
        product = torch.fft.rfft(u, n=2 * size) * torch.fft.rfft(kernel, n=2 * size)
        return self.last(F.gelu(torch.fft.irfft(product, n=2 * size)[..., :size]).mean(-1))


class Masked(nn.Module):
    """Speech enhancement: a mask on a spectrogram, and the signal back."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.last = nn.Conv1d(9, 9, 1), nn.Linear(64, 2)
        self.register_buffer("window", torch.hann_window(16))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stft(x, 16, 4, window=self.window, return_complex=True)
        kept = z * torch.sigmoid(self.mask(z.abs()))
        return self.last(torch.istft(kept, 16, 4, window=self.window, length=64))


class Mixing(nn.Module):
    """FNet's mixing of tokens: the real part of a Fourier transform over tokens and features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.fft.fftn(self.first(x), dim=(-2, -1)).real + x).mean(1))


MODELS: dict[type[nn.Module], tuple[int, ...]] = {
    NeuralOperator: (2, 6, 5), Rotary: (5, 8), StateSpace: (3, 8), Masked: (64,), Mixing: (5, 6),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k is Mixing else k for k in MODELS], ids=lambda kind: kind.__name__
)
def test_models(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kind().double().eval(), torch.randn(3, *MODELS[kind], dtype=torch.float64)
    want = input_times_gradient(model, x)
    assert (frpc.compile(model, method="gradient-input")(x, target=1).relevance - want).abs().sum() <= 1e-10 * want.abs().sum()
    increments = compiled(model, x, method="lid-ig")(x, target=1)
    assert lost(increments, (model(x) - model(torch.zeros_like(x)))[:, 1]) <= TIGHT
    explainer = compiled(model, x)
    found = explainer(x, target=1)
    assert lost(found, model(x)[:, 1]) <= TIGHT
    read = frpc.load(explainer.save(tmp_path / "model.frpc"))
    assert torch.equal(read(x, target=1).relevance, found.relevance)
    pushed, pulled = (explainer.layer("last", x, strategy=s).dense() for s in ("forward", "transposed"))
    assert (pushed - pulled).abs().sum() <= 1e-10 * pulled.abs().sum()


class Weighted(nn.Module):
    """Frequencies times complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(0.3 * drawn(4, 7)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.einsum("bi,oi->bo", torch.fft.rfft(x), self.weight).imag)


def test_complex_weights_by_reference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Weighted().eval().float(), torch.randn(2, 12)
    model.weight.data = model.weight.data.to(torch.complex64)
    explainer = frpc.compile(model, (x,))
    read = frpc.load(explainer.save(tmp_path / "model.frpc", weights="reference"), model=model)
    assert torch.equal(read(x, target=1).relevance, explainer(x, target=1).relevance)
    with torch.no_grad():
        model.weight.mul_(1j)
    torch.testing.assert_close(explainer.refresh(model)(x, target=1).output, model(x))


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x)


class Named(nn.Module):
    """A module whose output is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum, self.last = Spectrum(), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.spectrum(x).abs())


def test_a_complex_layer_is_known_by_its_pairs() -> None:
    torch.manual_seed(0)
    model, x = Named().double().eval(), torch.randn(3, 12, dtype=torch.float64)
    z = torch.fft.rfft(x).requires_grad_()
    (slope,) = torch.autograd.grad(model.last(z.abs())[:, 1].sum(), z)
    want = torch.view_as_real(z * 1).mul(torch.view_as_real(slope)).detach()
    explainer = compiled(model, x)
    assert "spectrum" in explainer.layers()
    torch.testing.assert_close(explainer.at("spectrum", x, target=1)["spectrum"], want)
    from_there = compiled(model, x, source="spectrum", bias="separate")(x, target=1)
    torch.testing.assert_close(from_there.relevance, want)


# What has no rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [lambda z: z.tanh(), lambda z: z.cumprod(1), lambda z: torch.linalg.inv(z[:, :4].unflatten(1, (2, 2))).flatten(1)],
    ids=["tanh", "cumprod", "inv"],
)
def test_what_has_no_rule_is_an_error_and_no_constant(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 12, dtype=torch.float64)
    width = function(torch.fft.rfft(x)).shape[1]
    model = Read(lambda x: function(torch.fft.rfft(x)).abs(), width).double().eval()
    with pytest.raises(UnsupportedOpError, match=r"test_complex.py:\d+"):
        frpc.compile(model, (x,))
    assert not frpc.examine(model, (x,)).ok


def test_one_gap_for_one_operator() -> None:
    model = Read(lambda x: torch.fft.rfft(x)[:, :4].tanh().abs(), 4).double().eval()
    with pytest.raises(UnsupportedOpError, match="no rule for complex numbers") as raised:
        frpc.compile(model, (torch.randn(3, 12, dtype=torch.float64),))
    assert [gap.op for gap in raised.value.gaps] == ["aten.tanh.default"]


def test_complex_inputs_and_outputs_say_what_to_do() -> None:
    class Inside(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.abs()

    with pytest.raises(InputError, match=r"Input 'z' is complex.*view_as_real"):
        frpc.compile(Inside(), (drawn(3, 4),))
    with pytest.raises(OptionError, match=r"output is complex.*z\.abs"):
        frpc.compile(Spectrum(), (torch.randn(3, 12),))


def test_samples_that_a_transform_mixes_are_refused() -> None:
    class Across(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x, dim=0).real

    with pytest.raises(frpc.errors.FrpcError, match=r"batch|sample"):
        frpc.compile(Across(), (torch.randn(3, 4),))


@pytest.mark.export
def test_lengths_of_frequencies_have_a_form_in_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    explainer = frpc.compile(Named().eval(), (torch.randn(3, 12),))
    path = tmp_path / "model.onnx"
    frpc.export.onnx(explainer, path)
    frpc.export.verify(path, explainer)  # raises where they differ
