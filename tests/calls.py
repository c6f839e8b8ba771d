"""Calls of operators: those that the cases make, and odd ones by hand. What is said of operators is tried on them."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from cases import CASES
from frpc.core.graph import bind, first_result
from frpc.core.traits import Operand
from frpc.rules.table import TABLE

aten = torch.ops.aten


@dataclass(frozen=True)
class Made:
    """One call.

    Attributes:
        op: the operator.
        args: its arguments by schema name, defaults filled in.
    """

    op: OpOverload
    args: Mapping[str, Any]

    @property
    def operands(self) -> dict[Operand, Tensor]:
        """Its floating-point tensors."""
        found: dict[Operand, Tensor] = {}
        for name, value in self.args.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                found[name] = value
            elif isinstance(value, list | tuple):
                found.update({(name, i): v for i, v in enumerate(value) if isinstance(v, Tensor) and v.is_floating_point()})
        return found

    def __call__(self, replaced: Mapping[Operand, Tensor] | None = None) -> Tensor:
        """The first result, with other tensors in place of some operands."""
        args = dict(self.args)
        for name, value in (replaced or {}).items():
            if isinstance(name, str):
                args[name] = value
            else:
                args[name[0]] = [value if i == name[1] else v for i, v in enumerate(args[name[0]])]
        with torch.no_grad():
            value = first_result(self.op(**args))
        assert isinstance(value, Tensor)
        return value

    def __str__(self) -> str:
        rest = {k: v for k, v in self.args.items() if not isinstance(v, Tensor | list) and v is not None}
        return f"{self.op}({', '.join(f'{k}={v}' for k, v in rest.items())})"


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Made]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _note(self.calls, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Reader(fx.Interpreter):
    """Runs a graph of composite operators, which a dispatch mode meets in parts only."""

    def __init__(self, graph_module: fx.GraphModule, calls: list[Made]) -> None:
        super().__init__(graph_module)
        self.calls = calls

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        _note(self.calls, target, args, kwargs)
        return super().call_function(target, args, kwargs)


def _note(calls: list[Made], op: Any, args: Any, kwargs: Any) -> None:
    if op in TABLE.rules and (call := Made(op, bind(op, args, kwargs))).operands:
        calls.append(call)


@functools.cache
def made() -> tuple[Made, ...]:
    """Every call of an operator with a rule that a case makes, and the odd ones."""
    calls: list[Made] = []
    warnings.filterwarnings("ignore", "Using padding='same'", UserWarning)  # torch's note on its speed
    for case in CASES:
        module, inputs = case.module(), case.inputs()
        with torch.no_grad():
            with _Recorder(calls):
                module(*inputs)
            _Reader(make_fx(module, pre_dispatch=True)(*inputs), calls).run(*inputs)
    return (*{_signature(c): c for c in calls}.values(), *odd())


def _signature(call: Made) -> tuple[Any, ...]:
    return call.op, *(tuple(v.shape) if isinstance(v, Tensor) else str(v) for v in call.args.values())


def odd() -> Iterator[Made]:
    """Calls whose result may be negative where a name suggests otherwise, or the other way round."""
    a, b = torch.randn(3, 4, 6, 5).double(), torch.randn(3, 4, 6, 5).double()
    m, n = torch.randn(3, 4).double(), torch.randn(4, 3).double()
    index = torch.tensor([2, 0, 3, 0])
    grid = torch.rand(3, 4, 2, 2).double() * 2.2 - 1.1

    def call(op: OpOverload, *args: Any, **kwargs: Any) -> Made:
        return Made(op, bind(op, args, kwargs))

    for beta, threshold in ((-1.0, 20.0), (2.0, -5.0), (-1.0, -5.0), (0.5, 0.0)):
        yield call(aten.softplus.default, a, beta, threshold)
    for low, high in ((0.0, None), (0.0, -1.0), (None, -1.0), (0.5, None), (-0.5, 2.0), (None, 0.0), (0.0, 0.0), (1.0, 0.5)):
        yield call(aten.clamp.default, a, low, high)
    for low, high in ((-1.0, 1.0), (0.0, 6.0), (-2.0, -1.0)):
        yield call(aten.hardtanh.default, a, low, high)
    for number in (-2.0, 0.0, 3.0):
        yield call(aten.mul.Tensor, a, number)
        yield call(aten.mul.Tensor, self=a, other=number)
        yield call(aten.add.Tensor, a, number)
        yield call(aten.add.Scalar, a, number, -1)
        yield call(aten.add.Tensor, a, b, alpha=number)
        yield call(aten.clamp_min.default, a, number)
        yield call(aten.clamp_max.default, a, number)
        yield call(aten.leaky_relu.default, a, number)
        yield call(aten.elu.default, a, 1.0, number)
        yield call(aten.pow.Tensor_Scalar, a, number)
        yield call(aten.pow.Tensor_Scalar, a, number + 0.5)
        yield call(aten.lerp.Scalar, a, b, number)
        yield call(aten.constant_pad_nd.default, a, [1, 1, 0, 2], number)
        yield call(aten.masked_fill.Scalar, a, a > 0, number)
        yield call(aten.index_fill.int_Scalar, a, 1, index, number)
        yield call(aten.scatter.value, a, 1, index[None, :, None, None].expand(3, 4, 6, 5), number)
        yield call(aten.index_add.default, a, 1, index, b, alpha=number)
        yield call(aten.addmm.default, m[:, :3], m, n, beta=number, alpha=1)
        yield call(aten.addmm.default, m[:, :3], m, n, beta=1, alpha=number)
        yield call(aten.where.ScalarOther, a > 0, a, number)
        yield call(aten.nan_to_num.default, a, posinf=number)
        yield call(aten.nan_to_num.default, a, nan=number)
        yield call(aten.threshold.default, a, number, 1.0)
        yield call(aten.threshold.default, a, 1.0, number)
        yield call(aten.rsub.Scalar, a, number)
        if number:
            yield call(aten.div.Tensor, a, number)
            yield call(aten.remainder.Scalar, a, number)
            yield call(aten.fmod.Scalar, a, number)
            yield call(aten.avg_pool2d.default, a, [2, 2], divisor_override=int(number))
        if number > 0:
            yield call(aten.pow.Scalar, number, a)
    for other in (torch.tensor(-1.0).double(), torch.tensor(2.0).double()):
        yield call(aten.remainder.Tensor, a, other)
        yield call(aten.masked_fill.Tensor, a, a > 0, other)
    for mode in (0, 1, 2):
        yield call(aten.grid_sampler_2d.default, a, grid, mode, 0, False)
    yield call(aten.mul.Tensor, a, a)
    yield call(aten.div.Tensor, a, b)
    yield call(aten.copy.default, a, b)
    yield call(aten.fmax.default, a, torch.where(b > 0.5, math.nan, b))
    yield call(aten.upsample_bicubic2d.vec, a, [9, 9], False, None)
    yield call(aten._native_batch_norm_legit_no_training.default, a, m[0], m[1], m[2], m[0].abs() + 0.1, 0.1, 1e-3)
    yield call(aten.linear.default, a, torch.randn(7, 5).double())
    yield call(aten._softmax.default, a, -1, False)
    yield call(aten.cumsum.default, a, 2)
    yield call(aten.sort.default, a, -1)
    yield call(aten.flip.default, a, [2])
    yield call(aten.roll.default, a, [2], [3])
    yield call(aten.cat.default, [a, b], 2)
    yield call(aten.slice_scatter.default, a, b[:, :, :3], 2, 1, 6, 2)
    yield call(aten.mean.dim, a, [2, 3], True)
    yield call(aten.mean.dim, a, [1], True)
    yield call(aten.permute.default, a, [1, 0, 2, 3])
    yield call(aten.transpose.int, a, 0, 1)
    yield call(aten.reshape.default, a, [6, 2, 6, 5])
    yield call(aten.expand.default, a[:, :, :1], [3, 4, 6, 5])
