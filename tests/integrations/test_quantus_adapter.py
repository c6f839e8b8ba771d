"""`frpc.integrations.quantus`: arrays in, arrays out, as Quantus calls it; and Quantus itself where it is installed."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import nn

import frpc
from families import built, mlp, pooled, randn
from frpc.errors import OptionError, TargetError
from frpc.integrations.quantus import Explain, explain


def classifier() -> tuple[nn.Sequential, np.ndarray, np.ndarray]:
    return built(lambda: pooled(True)), randn(4, 2, 6, 6, seed=3).numpy(), np.array([0, 2, 1, 2])


def test_maps_are_the_engines_and_sum_to_the_output():
    model, x, y = classifier()
    found = explain(model=model, inputs=x, targets=y, device="cpu")
    assert isinstance(found, np.ndarray) and found.shape == x.shape and found.dtype == np.float64
    output = model(torch.from_numpy(x)).detach().numpy()[range(4), y]
    assert np.abs(found.sum((1, 2, 3)) - output).max() / np.abs(found).sum((1, 2, 3)).max() <= 1e-12
    lid = explain(model, x, y, method="lid-ig", internal_batch_size=3)
    expected = frpc.compile(model, method="lid-ig")(torch.from_numpy(x), target=torch.from_numpy(y)).relevance
    np.testing.assert_allclose(lid, expected.numpy(), rtol=0, atol=1e-13)


def test_inputs_take_the_models_precision_and_targets_any_form():
    model, x, y = classifier()
    model.float()
    ask = Explain()
    for targets in (y, y.astype(np.uint8), y[:, None], y.tolist(), torch.from_numpy(y)):
        assert ask(model, x, targets).dtype == np.float32
    assert np.array_equal(ask(model, x, 1), ask(model, x, np.full(4, 1)))
    for targets in (y.astype(float), y[:3], np.eye(4, dtype=int)):
        with pytest.raises(TargetError, match=r"give class indices \[4\]"):
            ask(model, x, targets)
    with pytest.raises(OptionError, match="method='Saliency' is unknown"):
        explain(model, x, y, method="Saliency")


def test_compiled_once_for_each_model_and_again_for_new_weights():
    model, x, y = classifier()
    ask = Explain()
    first = ask(model, x, y)
    explainer = ask._compiled[model][1]
    assert np.array_equal(ask(model, x, y), first) and ask._compiled[model][1] is explainer
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    changed = ask(model, x, y)
    output = model(torch.from_numpy(x)).detach().numpy()[range(4), y]
    np.testing.assert_allclose(changed.sum((1, 2, 3)), output, atol=1e-12)
    other = built(lambda: mlp(True))
    ask(other, randn(2, 6, seed=1).numpy(), [0, 1])
    assert len(ask._compiled) == 2
    del other, explainer
    gc.collect()
    assert len(ask._compiled) == 1  # what was compiled for a model goes with it


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.factor = nn.Linear(4, 3), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x) * self.factor


def test_an_attribute_that_is_no_weight_is_followed():
    model, ask = Scaled().eval(), Explain()
    x, y = np.random.default_rng(0).random((2, 4)).astype(np.float32), np.array([0, 2])
    before = ask(model, x, y)
    model.factor = -2.0
    assert np.allclose(ask(model, x, y), -2 * before, atol=1e-6)


@pytest.mark.slow  # and Quantus, which brings OpenCV and pandas, is not in [test]
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_metrics_of_quantus():
    """One metric each that asks again, perturbs by rank, and randomises weights."""
    quantus = pytest.importorskip("quantus")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)).eval()
    x, y = np.random.default_rng(0).random((3, 1, 8, 8)).astype(np.float32), np.array([0, 1, 2])
    common = {"model": model, "x_batch": x, "y_batch": y, "device": "cpu"}

    ask = Explain("lid-ig")
    sensitivity = quantus.MaxSensitivity(nr_samples=3, display_progressbar=False)(**common, a_batch=None, explain_func=ask)
    assert len(sensitivity) == 3 and np.isfinite(sensitivity).all() and len(ask._compiled) == 1
    function = quantus.MaxSensitivity(nr_samples=1, display_progressbar=False)(
        **common, a_batch=None, explain_func=explain, explain_func_kwargs={"method": "gradient-input"}
    )
    assert np.isfinite(function).all()

    flipping = quantus.PixelFlipping(features_in_step=8, abs=False, normalise=False, display_progressbar=False)
    curves = np.array(flipping(**common, a_batch=explain(model, x, y)))
    assert curves.shape == (3, 8) and np.isfinite(curves).all()

    randomised = quantus.MPRT(display_progressbar=False)(**common, a_batch=None, explain_func=Explain())
    assert {layer: len(scores) for layer, scores in randomised.items()} and all(np.isfinite(s).all() for s in randomised.values())
