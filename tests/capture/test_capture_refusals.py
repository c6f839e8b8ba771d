"""Objects that are not modules, and modules that cannot be captured: an error with the reason, the line and a hint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frpc
from captured_nets import agrees, randn, settled
from frpc.errors import (
    CaptureError,
    InputError,
)

# Objects that are not modules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda z: z, r"got the function <lambda>: write it as the forward of a module.\n  class Model\(nn.Module\):"),
        ("net.pt", r"got the path 'net.pt': make the model, load its weights with model.load_state_dict"),
        (nn.Linear(2, 2).state_dict(), r"got a dict of weights: they have no code. Make the model, load them"),
        (nn.Linear, r"got the class Linear: make one of it first, Linear\(...\)\."),
        (nn.LazyLinear(3), r"LazyLinear has parameters without a shape \(weight, bias\): call it once"),
        (3, r"frpc.compile takes a module \(nn.Module\), but got int\."),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_is_no_module(given: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        frpc.compile(given, (torch.ones(1, 2),))
    with pytest.raises(InputError, match=text):
        frpc.examine(given, (torch.ones(1, 2),))


def test_an_exported_program_is_a_model_too() -> None:
    model, x = settled(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))), randn(3, 4)
    dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1)},)}
    wanted = frpc.compile(model, (x,))(x, target=1)
    for options in (dynamic, {}):
        program = torch.export.export(model, (x,), **options)
        found = frpc.compile(program, (x,))(x, target=1)
        assert agrees(found.output, wanted.output) and agrees(found.relevance, wanted.relevance)


# Errors -----------------------------------------------------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def branch(h: Tensor) -> Tensor:
    return torch.cond(h.mean() > 0, lambda q: q.relu(), lambda q: q.tanh(), (h,))


def loop(h: Tensor) -> Tensor:
    from torch._higher_order_ops import while_loop

    return while_loop(lambda q: q.sum() < 10, lambda q: (q + 1,), (h,))[0]


def policy(h: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=h, validate_args=True).probs  # the default is off once Dynamo is loaded


def with_numpy(h: Tensor) -> Tensor:
    return h * float(h.detach().numpy().sum())


def own_gradient(h: Tensor) -> Tensor:
    given = h.detach().requires_grad_()
    return torch.autograd.grad((given**2).sum(), given)[0]


def too_wide(h: Tensor) -> Tensor:
    return h @ torch.ones(5, 2)


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (branch, "Operators that take functions (torch.cond, while_loop, map, scan)"),
        (loop, "Operators that take functions (torch.cond, while_loop, map, scan)"),
        (policy, "torch.distributions checks the values of its arguments: pass validate_args=False"),
        (with_numpy, "numpy does not work with tensors that have no values"),
        (too_wide, "Fails itself raises an error on these inputs, before capture: RuntimeError: "),
        (lambda h: h.half() @ torch.ones(4, 2), "Fails itself raises an error on these inputs"),
        (lambda h: h if h.sum() > 0 else -h, "Try: replace data-dependent Python branches"),
    ],
)
def test_reasons_and_hints(function: Callable[[Tensor], Tensor], hint: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One error of frpc's own, the user's line, a hint that fits, and nothing on stderr."""
    with pytest.raises(CaptureError) as error:
        frpc.compile(Fails(function).eval(), (torch.randn(2, 4),))
    text = str(error.value)
    assert hint in text
    assert "test_capture_refusals.py:" in text
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_int8_modules() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CaptureError, match="Quantized modules keep weights in a packed form"):
        frpc.compile(model, (torch.randn(2, 4),))


def test_logs_of_other_threads_are_left_alone() -> None:
    import threading

    from frpc.core.reasons import quiet_logs

    class Kept(logging.Handler):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.lines.append(record.getMessage())

    logger, kept = logging.getLogger("torch.some.part"), Kept()
    logger.addHandler(kept)
    with quiet_logs():
        logger.error("here")
        other = threading.Thread(target=lambda: logger.error("elsewhere"))
        other.start()
        other.join()
    logger.error("after")
    logger.removeHandler(kept)
    assert kept.lines == ["elsewhere", "after"]
