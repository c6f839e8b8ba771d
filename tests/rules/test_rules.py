"""Every rule: it conserves, its maps rebuild the operator's result, and its relevance is that of an independent twin."""

from __future__ import annotations

import math
from functools import partial

import mpmath
import pytest
import torch
from torch import Tensor

import frpc
from case import Case
from cases import CASES
from curves import CURVES, Curve
from frpc.core.graph import fetch
from frpc.driver.pipeline import Compiled
from frpc.emit.propagate import affine_maps, evaluate
from frpc.rules.table import TABLE
from rule_twins import TWINS, agrees, from_frozen, randn_like, rebuilt, rule_at

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's note on its speed


# Every operator ---------------------------------------------------------------------------------------------------------


def test_every_operator_has_a_case() -> None:
    missing = [str(op) for op in TABLE.rules if op not in {case.op for case in CASES}]
    assert not missing, f"add a line to tests/cases_*.py for {', '.join(missing)}"


def test_case_names_are_unique() -> None:
    names = [case.id for case in CASES]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_rule(case: Case) -> None:
    """The compiled program conserves and equals the twin; the operators' own maps rebuild their results."""
    module, inputs = case.module(), case.inputs()
    with torch.no_grad():
        output = module(*inputs)
    seed = randn_like(output)
    explainer = frpc.compile(module, inputs)
    explanation = explainer(*inputs, seed=seed)
    assert agrees(explanation.output, output, 1e-13)
    maps = explanation.relevance if isinstance(explanation.relevance, tuple) else (explanation.relevance,)
    flat = torch.cat([m.flatten(1) for m in maps], 1)
    error = (flat.sum(1) - (seed * output).flatten(1).sum(1)).abs()
    assert bool((error <= 1e-12 * flat.abs().sum(1)).all()), "the map does not sum to the explained output"
    twin = partial(from_frozen, case.frozen) if case.frozen else TWINS[case.twin]
    assert agrees(flat, twin(module, inputs, seed)), "the map is not the twin's"

    compiled = explainer.compiled(*inputs)
    met = {node.target for node in compiled.assignment.rules}
    if case.arguments is None:
        assert case.op in met, f"the canonical graph has no {case.op}, only {', '.join(map(str, met))}"
        check_maps(compiled, inputs)
    else:
        assert case.op not in met, f"{case.op} stands in the canonical graph: let the case find it there"
        (a,) = inputs
        affine, result = rule_at(case.op, a, *case.arguments)
        assert agrees(rebuilt(affine, dict.fromkeys(affine.terms, a)), result, 1e-14)


def check_maps(compiled: Compiled, inputs: tuple[Tensor, ...]) -> None:
    """`sum_k M_k a_k + c` is the operator's result, and each M_k is the transpose of its transpose."""
    module = compiled.assignment.graph_module
    constants = {str(n.target): fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    values = evaluate(module.graph, constants, inputs)
    values = {node: value[0] if isinstance(value, tuple | list) else value for node, value in values.items()} | {
        node: values[node] for node in compiled.assignment.rules
    }
    for node, affine in affine_maps(compiled.assignment, values, compiled.assignment.rules).items():
        result = values[node][0] if isinstance(values[node], tuple | list) else values[node]
        operands = {name: values[n] for name, n in compiled.assignment.rules[node].operands.items()}
        terms = [affine.terms[name].push(a) for name, a in operands.items()]
        size = sum((t.abs().sum() for t in terms), result.abs().sum())
        assert bool((rebuilt(affine, operands) - result).abs().sum() <= 1e-14 * size), f"{node.target}: M a + c is not the result"
        v = randn_like(result)
        for name, a in operands.items():
            u = randn_like(a, 8)
            pushed, pulled = affine.terms[name].push(u), affine.terms[name].pull(v)
            assert (pushed.shape, pulled.shape) == (result.shape, a.shape)
            bound = 1e-12 * (pushed.abs() * v.abs()).sum()
            assert bool((inner(pushed, v) - inner(u, pulled)).abs() <= bound), f"{node.target}: pull is not push's transpose"


def inner(a: Tensor, b: Tensor) -> Tensor:
    """`sum a b`; complex numbers count as pairs of real ones."""
    return (a.conj() * b).real.sum() if a.is_complex() else (a * b).sum()


# Secants where division fails -------------------------------------------------------------------------------------------


def is_elementwise(op: torch._ops.OpOverload) -> bool:
    function = TABLE.rules[op].function
    return function.__module__ == "frpc.rules.functions.elementwise" or function.__qualname__.startswith("elementwise.")


def test_every_elementwise_operator_has_a_curve() -> None:
    missing = [str(op) for op in TABLE.rules if is_elementwise(op) and op not in {curve.op for curve in CURVES}]
    assert not missing, f"add a line to tests/curves.py for {', '.join(missing)}"


def points(curve: Curve, dtype: torch.dtype) -> list[float]:
    """Zeros, denormals, either side of the switch to a series, knees, saturation: where f and its secant are numbers."""
    info = torch.finfo(dtype)
    root = math.sqrt(info.eps)
    denormal = info.smallest_normal * info.eps
    sizes = (denormal, 3 * denormal, info.smallest_normal / 2, info.smallest_normal, 1e-30, 1e-8, 0.99 * root, 1.01 * root)
    sizes += (1e-3, 0.1, 0.3, 0.4999, 0.5001, 1.0, 2.5, 2.999, 3.001, 5.9, 6.1, 9.0, 15.0, 19.9, 20.1, 25.0, 30.0, 1e2, 1e4)
    rounded = torch.tensor([0.0, *sizes, -0.0, *(-s for s in sizes)], dtype=dtype).tolist()
    return [z for z in rounded if curve.low < z < curve.high and max(map(abs, exactly(curve, z))) < info.max]


def exactly(curve: Curve, z: float) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """f(z) and, from the left and from the right where z = 0, the secant; with digits enough for the subtraction."""
    with mpmath.workdps(40 + (max(0, -math.frexp(z)[1]) if z else 400)):
        a = mpmath.mpf(z)
        value, zero = curve.exact(a), mpmath.mpf(0) if curve.whole else curve.exact(mpmath.mpf(0))
        steps = (a, a) if z else (mpmath.mpf("-1e-360"), mpmath.mpf("1e-360"))
        return value, *((curve.exact(h) - zero) / h for h in steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.id)
def test_secant(curve: Curve, dtype: torch.dtype) -> None:
    """`secant * a + f(0)` is PyTorch's f(a) to rounding, and the secant is the true one, down to a = 0.

    Where PyTorch's own f(a) is off (GELU far below 0 is a difference of near equals), the account may be off by as much.
    """
    at = points(curve, dtype)
    a = torch.tensor(at, dtype=dtype)
    arguments = [x.to(dtype) if isinstance(x, Tensor) else x for x in curve.arguments]
    affine, result = rule_at(curve.op, a, *arguments, **curve.named)
    (only,) = affine.terms.values()
    secant, carried = only.push(torch.ones_like(a)).double(), only.push(a).double()
    base = 0.0 if affine.constant is None else float(affine.constant)
    assert bool(torch.isfinite(secant).all()), f"no finite secant at {a[~torch.isfinite(secant)].tolist()}"

    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    wrong = []
    for i, z in enumerate(at):
        exact, *slopes = exactly(curve, z)
        own = abs(float(exact - mpmath.mpf(result[i].item())))
        account = abs(carried[i].item() + base - result[i].item())
        if account > 4 * eps * (abs(carried[i].item()) + abs(base)) + 2 * own + smallest:
            wrong.append(f"at {z!r}: {carried[i].item()!r} + {base!r} is not {result[i].item()!r}")
        low, high = sorted(float(s) for s in slopes)
        allowed = 16 * eps * max(abs(low), abs(high)) + (2 * own / abs(z) if abs(z) > smallest else 0.0) + smallest
        if not low - allowed <= secant[i].item() <= high + allowed:
            wrong.append(f"at {z!r}: secant {secant[i].item()!r}, exactly {low!r}")
    assert not wrong, "\n".join(wrong)
