"""A harness for rewrites: small graphs written as one line of ATen operators, graphs made of them at random, and their functions.

A :class:`Line` is a function of tensors in plain ATen calls. :class:`Build` writes lines into a graph, noting example values as
it goes, with a free batch or a fixed one. :func:`drawn` puts lines of a rewrite together at random, changes an argument here and
there, and lets inner values be read by others too: most of what comes out is a near miss. :func:`agree` runs two graphs.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.utils import _pytree as pytree

from frpc.core.stages import copy_graph

aten = torch.ops.aten
Pass = Callable[[fx.GraphModule], Any]
EXAMPLE = 2  # samples of the example; its other sizes may be 2 as well


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Multiples of 1/4, zeros among them: gates that are just shut, values that tie."""
    chance = torch.Generator().manual_seed(seed)
    if dtype is torch.bool or not dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=chance).to(dtype)
    return (torch.randn(shape, generator=chance, dtype=torch.float64) * 4).round().div(4).to(dtype)


class Constants:
    """Adds tensors to a graph: ``c(4, 3)`` is a constant of that shape, ``c(t)`` one of these values."""

    def __init__(self, build: Build) -> None:
        self.build = build

    def __call__(self, *shape: Any, dtype: torch.dtype | None = None) -> Any:
        given = shape[0] if isinstance(shape[0], Tensor) else None
        seed = len(list(self.build.root.buffers()))
        value = values(*shape, seed=seed, dtype=dtype or self.build.dtype) if given is None else given
        return self.build.constant(value)


@dataclass(frozen=True)
class Line:
    """One small graph: a function ``f(c, *inputs)`` in ATen operators, and the shapes of its inputs, batch first.

    Attributes:
        what: in words.
        shapes: one for each input, the batch left out; None stands for an input without a batch.
        fixed: the batch is fixed in the graph, at 2.
    """

    what: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    fixed: bool = False


@dataclass(frozen=True)
class Rewrite:
    """A pass, what it rewrites, and what it must leave alone.

    Attributes:
        fires: graphs that it changes.
        near: graphs that look like those, and that it must not change.
        dtype: what it works on; float64 where it works on that.
        drawn: random graphs are made of the lines.
        bound: relative and absolute; by default 1e-11 in float64, and 1e-5 in float32, where kernels take nothing else.
        widens: results may be of a wider type.
    """

    run: Pass
    fires: tuple[Line, ...]
    near: tuple[Line, ...]
    dtype: torch.dtype = torch.float64
    drawn: bool = True
    bound: float | None = None
    widens: bool = False

    call: Callable[[fx.GraphModule, Sequence[Tensor]], list[Tensor]] | None = None

    @property
    def name(self) -> str:
        return getattr(self.run, "__name__", str(self.run))


class _Noting(GraphAppendingTracer):
    """Notes the example value of every node as it is made."""

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode) -> None:
        super().__init__(graph)
        self.mode = mode

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind == "call_function":
            note(proxy.node)
        return proxy


def note(node: fx.Node) -> None:
    """Computes the example value of a call from those of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with enable_python_dispatcher():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


class Build:
    """A graph under construction.

    Args:
        dtype: of inputs and constants.
        free: whether the batch is symbolic.
    """

    def __init__(self, dtype: torch.dtype, free: bool) -> None:
        self.graph, self.root, self.dtype, self.free = fx.Graph(), nn.Module(), dtype, free
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False, allow_non_fake_inputs=True)
        self.tracer = _Noting(self.graph, self.mode)
        self.shapes: list[tuple[int, ...]] = []

    def input(self, shape: tuple[int, ...]) -> Proxy:
        example = values(EXAMPLE, *shape, dtype=self.dtype)
        dims = [DimDynamic.DUCK if self.free else DimDynamic.STATIC, *[DimDynamic.STATIC] * len(shape)]
        node = self.graph.placeholder(f"x{len(self.shapes)}")
        node.meta["val"] = self.mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dims))
        self.shapes.append(shape)
        return Proxy(node, self.tracer)

    def constant(self, value: Tensor) -> Proxy:
        name = f"c{len(list(self.root.buffers()))}"
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return Proxy(node, self.tracer)

    def finish(self, results: Any) -> fx.GraphModule:
        self.graph.output(fx.node.map_aggregate(results, lambda p: p.node if isinstance(p, Proxy) else p))
        return fx.GraphModule(self.root, self.graph)


def written(line: Line, dtype: torch.dtype = torch.float64) -> tuple[fx.GraphModule, list[tuple[int, ...]]]:
    """The graph of one line, and the shapes of its inputs."""
    build = Build(dtype, not line.fixed)
    result = line.function(Constants(build), *[build.input(shape) for shape in line.shapes])
    return build.finish(result), build.shapes


# What two graphs compute ------------------------------------------------------------------------------------------------


class UnusableError(Exception):
    """A graph whose values are not finite, or that does not run: what it computes cannot be compared."""


def run(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of a graph; what it was given and what it holds stays as it is."""
    given, held = [x.clone() for x in inputs], {name: b.clone() for name, b in graph_module.named_buffers() if not b.is_mkldnn}
    results = [r.clone() if isinstance(r, Tensor) else r for r in pytree.tree_leaves(graph_module(*given))]
    assert all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True)), "an input was written into"
    assert all(torch.equal(b, held[name]) for name, b in graph_module.named_buffers() if name in held), "a constant was written"
    return [r for r in results if isinstance(r, Tensor)]


class _Finite(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise UnusableError
        return value


def batches(free: bool) -> tuple[int, ...]:
    return (1, 2, 3) if free else (EXAMPLE,)


def agree(rewrite: Rewrite, before: fx.GraphModule, after: fx.GraphModule, shapes: Sequence[tuple[int, ...]], free: bool) -> int:
    """Compares what two graphs compute at other inputs than the example; returns at how many batches they could be compared."""
    compared = 0
    for batch in batches(free):
        inputs = [values(batch, *shape, seed=10 * batch + i + 1, dtype=rewrite.dtype) for i, shape in enumerate(shapes)]
        try:
            with torch.no_grad():
                _Finite(before).run(*[x.clone() for x in inputs])
                expected = run(before, inputs)
                if any(not torch.equal(a, b) for a, b in zip(expected, run(before, inputs), strict=True)):
                    raise UnusableError  # it draws random numbers
        except (UnusableError, RuntimeError, IndexError, ValueError, TypeError, AssertionError, NotImplementedError):
            continue
        with torch.no_grad():
            found = (rewrite.call or run)(after, inputs)
        assert len(found) == len(expected)
        bound = rewrite.bound or (1e-11 if rewrite.dtype is torch.float64 else 1e-5)
        for got, want in zip(found, expected, strict=True):
            assert got.shape == want.shape and (got.dtype == want.dtype or rewrite.widens), (
                f"{got.shape} {got.dtype} {want.dtype}"
            )
            got = got.to(want.dtype) if rewrite.widens else got
            scale = max(1.0, float(want.abs().max())) if want.is_floating_point() and want.numel() else 1.0
            torch.testing.assert_close(got, want, rtol=bound, atol=bound * scale)
        compared += 1
    return compared


def code(graph_module: fx.GraphModule) -> str:
    graph_module.recompile()
    return graph_module.code


def rewritten(one_pass: Pass, before: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
    """A copy after the pass, and whether that changed it."""
    after = copy_graph(before)
    same = code(after)
    one_pass(after)
    after.graph.lint()
    return after, code(after) != same


# Graphs at random -------------------------------------------------------------------------------------------------------


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return ([str(n) for n in value.shape], value.dtype) if isinstance(value, Tensor) else None


@st.composite
def drawn(draw: Any, rewrite: Rewrite) -> tuple[fx.GraphModule, list[tuple[int, ...]], bool]:
    """A graph of a few lines of a rewrite, one after another or side by side, changed here and there.

    An argument of a line is a value computed before wherever one fits; up to two arguments anywhere are changed afterwards, to
    another number or another value of the same shape; up to two inner values are results too.
    """
    lines = [*rewrite.fires, *rewrite.near]
    chosen = [draw(st.sampled_from(rewrite.near if draw(st.booleans()) else lines)) for _ in range(draw(st.integers(1, 3)))]
    build = Build(rewrite.dtype, free := not any(line.fixed for line in chosen))
    constants, results = Constants(build), []
    for line in chosen:
        arguments = []
        for shape in line.shapes:
            fitting = [n for n in build.graph.nodes if n.op != "get_attr" and _fits(n, shape, rewrite.dtype, free)]
            reuse = fitting and draw(st.integers(0, 3)) > 0
            arguments.append(Proxy(draw(st.sampled_from(fitting)), build.tracer) if reuse else build.input(shape))
        results += [r for r in pytree.tree_leaves(line.function(constants, *arguments)) if isinstance(r, Proxy)]
    for _ in range(draw(st.integers(0, 2))):
        _change(draw, build.graph)
    inner = [n for n in build.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]
    more = [draw(st.sampled_from(inner)) for _ in range(draw(st.integers(0, 2)))] if inner else []
    graph_module = build.finish([*results, *[Proxy(n, build.tracer) for n in dict.fromkeys(more)]])
    try:
        for node in graph_module.graph.nodes:
            if node.op == "call_function":
                note(node)
    except Exception:
        hypothesis.reject()
    return graph_module, build.shapes, free


def _fits(node: fx.Node, shape: tuple[int, ...], dtype: torch.dtype, free: bool) -> bool:
    """Says whether a value is a batch of this shape: of as many samples as the inputs have."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != len(shape) + 1:
        return False
    samples = value.shape[0].node.expr.is_Symbol if isinstance(value.shape[0], torch.SymInt) else value.shape[0] == EXAMPLE
    return list(value.shape[1:]) == list(shape) and samples and isinstance(value.shape[0], torch.SymInt) is free


NUMBERS = (-2, -1, 0, 1, 2, 3, 0.5, -0.5, 0.0, True, False)


def _change(draw: Any, graph: fx.Graph) -> None:
    """Changes one argument of one call to something of its kind."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.target, OpOverload)]
    if not nodes:
        return
    node = draw(st.sampled_from(nodes))
    schema = {a.name for a in node.target._schema.arguments if a.kwarg_only}
    if "alpha" in schema and draw(st.booleans()):
        node.kwargs = {**node.kwargs, "alpha": draw(st.sampled_from((1, 2, -1)))}
        return
    places = [*range(len(node.args)), *node.kwargs]
    place = draw(st.sampled_from(places)) if places else None
    if place is None:
        return
    old = node.args[place] if isinstance(place, int) else node.kwargs[place]
    new = _other(draw, graph, node, old)
    if isinstance(place, int):
        node.update_arg(place, new)
    else:
        node.update_kwarg(place, new)


def _other(draw: Any, graph: fx.Graph, node: fx.Node, old: Any) -> Any:
    if isinstance(old, fx.Node):
        before = list(itertools.takewhile(lambda n: n is not node, graph.nodes))
        alike = [n for n in before if _shape(n) is not None and _shape(n) == _shape(old)]
        return draw(st.sampled_from(alike)) if alike else old
    if isinstance(old, list | tuple) and old and not isinstance(old[0], fx.Node):
        at = draw(st.integers(0, len(old) - 1))
        return [*old[:at], _other(draw, graph, node, old[at]), *old[at + 1 :]]
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return draw(st.sampled_from([n for n in NUMBERS if type(n) is int]))
    if isinstance(old, float):
        return draw(st.sampled_from([n for n in NUMBERS if type(n) is not bool and not math.isnan(n)]))
    return old


def check_random_graphs(rewrite: Rewrite, count: int) -> None:
    """Draws graphs, runs the pass on each, and compares what is computed before and after."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # graphs are small as they come, and printed
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn(rewrite))
    def agrees(graph: Any) -> None:
        before, shapes, free = graph
        try:
            after, changed = rewritten(rewrite.run, before)
            compared = agree(rewrite, before, after, shapes, free)
        except Exception as error:
            raise AssertionError(f"{shapes}, {'free' if free else 'fixed'} batch\n{code(before)}") from error
        seen[("rewritten" if changed else "left") if compared else "not comparable"] += 1

    agrees()
    assert min(seen["rewritten"], seen["left"]) >= count // 20, f"{rewrite.name}: {dict(seen)}"
