"""Perturbations: occlusion and RISE against slow loops, learnt masks against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from frpc import perturb
from frpc.errors import MemoryLimitError, OptionError, ShapeError
from frpc.rules.references import Blur

TIGHT = 1e-12
X = torch.randn(2, 2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WHICH = torch.tensor([2, 0])
PAIRS = torch.tensor([[0, 1], [2, 0]])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def number(x: Tensor, of: str = "probability") -> Tensor:
    """What is watched, ``[B]``."""
    output = net()(x).detach()
    return (output.softmax(1) if of == "probability" else output).gather(1, WHICH[:, None])[:, 0]


@pytest.fixture(scope="module")
def explainer() -> frpc.Explainer:
    return frpc.compile(net(), (X,))


@pytest.mark.parametrize("of", ["logit", "probability"])
@pytest.mark.parametrize(("window", "stride", "size"), [((3, 2), (2, 2), None), (3, 3, 5), (4, 1, 1)])
def test_occlusion_is_the_loop_written_out(explainer: frpc.Explainer, of: str, window, stride, size) -> None:  # type: ignore[no-untyped-def]
    (h, w), (down, across) = ((n, n) if isinstance(n, int) else n for n in (window, stride))
    filling = torch.full([1, 2, 9, 8], 0.2, dtype=torch.float64)
    rows, columns = (sorted({*range(0, n - k, s), n - k}) for n, k, s in ((9, h, down), (8, w, across)))
    total, times = torch.zeros(2, 9, 8, dtype=torch.float64), torch.zeros(9, 8)
    scores = torch.zeros(2, len(rows), len(columns), dtype=torch.float64)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            hidden = X.clone()
            hidden[:, :, top : top + h, left : left + w] = 0.2
            scores[:, i, j] = number(hidden, of)
            total[:, top : top + h, left : left + w] += (number(X, of) - scores[:, i, j])[:, None, None]
            times[top : top + h, left : left + w] += 1
    found = perturb.occlusion(
        explainer,
        X,
        WHICH,
        window=window,
        stride=stride,
        reference=filling,
        of=of,
        internal_batch_size=size,  # type: ignore[arg-type]
    )
    assert torch.allclose(found.scores, scores, rtol=0, atol=TIGHT)
    assert torch.allclose(found.relevance, total / times, rtol=0, atol=TIGHT)
    assert torch.allclose(found.score, number(X, of), rtol=0, atol=TIGHT)


def test_rise_is_the_mean_written_out(explainer: frpc.Explainer) -> None:
    generator = torch.Generator().manual_seed(5)
    cells = (torch.rand([20, 3, 3], generator=generator) < 0.4).float()
    down, across = torch.randint(3, [20], generator=generator), torch.randint(3, [20], generator=generator)
    total = torch.zeros(2, 9, 8, dtype=torch.float64)
    for grid, top, left in zip(cells, down, across, strict=True):
        large = F.interpolate(grid[None, None], size=(12, 12), mode="bilinear", align_corners=False)[0, 0]
        mask = large[top : top + 9, left : left + 8].double()
        total += number(X * mask)[:, None, None] * mask
    for size in (None, 7):
        found = perturb.rise(explainer, X, WHICH, masks=20, grid=3, keep=0.4, random_seed=5, internal_batch_size=size)
        assert torch.allclose(found.relevance, total / (0.4 * 20), rtol=0, atol=1e-7 * float(total.max()))
    assert found.scores.shape == (2, 20)
    other = perturb.rise(explainer, X, WHICH, masks=20, grid=3, keep=0.4, random_seed=6)
    assert not torch.allclose(other.relevance, found.relevance)
    masks = perturb.rise_masks(400, (9, 8), 3, 0.4)
    assert masks.shape == (400, 9, 8) and masks.min() >= 0 and masks.max() <= 1
    assert abs(float(masks.mean()) - 0.4) < 0.03


def test_several_targets(explainer: frpc.Explainer) -> None:
    hidden = perturb.occlusion(explainer, X, PAIRS, window=3, stride=2)
    seen = perturb.rise(explainer, X, PAIRS, masks=6, grid=3, internal_batch_size=5)
    assert hidden.relevance.shape == seen.relevance.shape == (2, 2, 9, 8)
    for k in range(2):
        one = perturb.occlusion(explainer, X, PAIRS[:, k], window=3, stride=2)
        assert torch.allclose(hidden.relevance[:, k], one.relevance, rtol=0, atol=TIGHT)
        assert torch.allclose(hidden.scores[:, k], one.scores, rtol=0, atol=TIGHT)
        two = perturb.rise(explainer, X, PAIRS[:, k], masks=6, grid=3)
        assert torch.allclose(seen.relevance[:, k], two.relevance, rtol=0, atol=TIGHT)
        assert torch.allclose(seen.scores[:, k], two.scores, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("of", ["logit", "probability"])
def test_the_mask_is_learnt_by_the_gradient_of_the_objective(of: str) -> None:
    """Every step of Adam with autograd's gradient of the objective, written as one formula."""
    model, power = net(), 3.0
    blurred = Blur()(X)
    m = torch.zeros(2, 3, 2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([m], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(6):
        move = torch.randint(-1, 2, [2], generator=generator).tolist()
        large = F.interpolate(m[:, None], size=(9, 8), mode="bilinear", align_corners=False)
        output = model((X * large + blurred * (1 - large)).roll(move, (2, 3)))
        score = (output.softmax(1) if of == "probability" else output).gather(1, WHICH[:, None])[:, 0]
        variation = sum(m.diff(dim=axis).abs().pow(power).sum() for axis in (1, 2))
        loss = 0.02 * (1 - m).mean((1, 2)).sum() + 0.3 * variation + score.sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            m.clamp_(0, 1)
        scores.append(score.detach())
    found = perturb.meaningful_perturbation(
        model,
        X,
        WHICH,
        mask=(3, 2),
        of=of,
        steps=6,
        l1=0.02,
        tv=0.3,
        power=power,
        jitter=1,  # type: ignore[arg-type]
    )
    expected = 1 - F.interpolate(m.detach()[:, None], size=(9, 8), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(found.relevance, expected, rtol=0, atol=1e-7)  # Adam divides small slopes by their size
    assert torch.allclose(found.scores, torch.stack(scores, 1), rtol=0, atol=1e-8)


def test_a_learnt_mask_hides_what_counts() -> None:
    """A net that sums one quarter of the picture: the mask hides that quarter, the score falls, the rest stays seen."""

    class Quarter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, :8, :8].mean((1, 2, 3))[:, None]

    x = torch.ones(1, 1, 16, 16)
    found = perturb.meaningful_perturbation(Quarter(), x, 0, reference="zero", mask=4, of="logit", steps=150, tv=1e-4, jitter=0)
    assert found.score == 1 and found.scores[0, -1] < 0.1
    assert found.relevance[0, :6, :6].min() > 0.8 and found.relevance[0, 14:, 14:].max() < 0.05


def test_memory_sets_how_many_run_at_a_time(explainer: frpc.Explainer) -> None:
    with pytest.raises(MemoryLimitError, match=r"One sample needs .*, but the limit is 10 B"):
        perturb.occlusion(explainer, X, WHICH, window=3, stride=2, memory_limit=10)
    whole = perturb.occlusion(explainer, X, WHICH, window=3, stride=2)
    few = perturb.occlusion(explainer, X, WHICH, window=3, stride=2, memory_limit=9000)
    assert torch.allclose(whole.relevance, few.relevance, rtol=0, atol=TIGHT)


def test_what_does_not_fit_is_said(explainer: frpc.Explainer) -> None:
    with pytest.raises(OptionError, match="window=10 is larger than the picture, 9 pixels"):
        perturb.occlusion(explainer, X, WHICH, window=10)
    with pytest.raises(OptionError, match="stride=4 leaves out pixels between windows of 3; give at most 3"):
        perturb.occlusion(explainer, X, WHICH, window=3, stride=4)
    with pytest.raises(OptionError, match="stride=0: give at least one row and one column"):
        perturb.occlusion(explainer, X, WHICH, window=3, stride=0)
    with pytest.raises(OptionError, match=r"masks=5, keep=0\.0: give at least one mask, and a probability above 0"):
        perturb.rise(explainer, X, WHICH, masks=5, keep=0.0)
    with pytest.raises(OptionError, match="one mask per sample"):
        perturb.meaningful_perturbation(net(), X, PAIRS)
    with pytest.raises(OptionError, match="choose logit or probability"):
        perturb.rise(explainer, X, WHICH, of="score")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"give pictures \[B, C, H, W\]"):
        perturb.occlusion(explainer, X[0], WHICH)
    with pytest.raises(ShapeError, match=r"The reference has shape \[2, 9, 7\] per sample"):
        perturb.rise(explainer, X, WHICH, reference=X[:1, :, :, 1:])
    with pytest.raises(OptionError, match="softmax is always 1"):
        perturb.occlusion(nn.Sequential(nn.Flatten(), nn.Linear(144, 1)).double().eval(), X, window=3)


@pytest.mark.peer
def test_captum_occludes_the_same(explainer: frpc.Explainer) -> None:
    """Where windows end with the picture; elsewhere Captum cuts the last one."""
    captum = pytest.importorskip("captum.attr")
    theirs = captum.Occlusion(net()).attribute(X, sliding_window_shapes=(2, 3, 2), strides=(2, 2, 2), target=WHICH)
    ours = perturb.occlusion(explainer, X, WHICH, window=(3, 2), stride=2, of="logit").relevance
    assert torch.allclose(ours, theirs.detach()[:, 0].double(), rtol=0, atol=1e-6)
