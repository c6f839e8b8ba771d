"""The driver: runs the stages in order, times them, checks each graph and keeps it for printing.

capture -> canonicalize -> assign -> plan -> emit -> optimize -> lower
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from frpc import canonicalize, lower, optimize
from frpc.assign import Assignment, assign
from frpc.bound import Program, bound
from frpc.capture import Captured, InputSpec, capture, tensors_of, tree
from frpc.decompose import spell_out
from frpc.emit import emit, only_aten, varying_references
from frpc.errors import BatchError, CompileError
from frpc.folding import fold_batch_norm
from frpc.graph import empty_like
from frpc.lineage import Ledger
from frpc.mixing import mixing
from frpc.plan import Plan, Query, make_plan
from frpc.precision import rounding
from frpc.rules.ruleset import RuleSet

__all__ = [
    "Choice",
    "Compiled",
    "Front",
    "Stage",
    "compile_query",
    "confirm",
    "duplicated",
    "front",
    "lower_program",
    "renewed",
    "verify",
]


@dataclass(frozen=True)
class Stage:
    """One stage of a compilation.

    Attributes:
        name: ``capture``, ``canonicalize``, ...
        seconds: wall time.
        passes: the passes that changed something.
        program: what came out: a runnable graph, or a printable record.
    """

    name: str
    seconds: float
    passes: tuple[str, ...]
    program: Any


@dataclass(frozen=True)
class Front:
    """What all queries about one model share: its graph, captured and in canonical form before folding.

    ``output`` is an output of its without samples.
    ``mixing`` says how the model fails to treat samples apart, if it does; ``ledger`` knows how the tensors that passes made
    came about.
    """

    captured: Captured
    canonical: fx.GraphModule
    stages: tuple[Stage, ...]
    mixing: str | None
    ledger: Ledger
    output: Tensor


@dataclass(frozen=True)
class Choice:
    """What the caller chose for all queries about a model.

    Attributes:
        rules: the rule set.
        constant: module path patterns whose results count as constants.
        source: ``("input",)`` or module paths relevance is asked about; None for the usual ones.
        output: which of several outputs is explained.
    """

    rules: RuleSet
    constant: tuple[str, ...] = ()
    source: tuple[str, ...] | None = None
    output: str | int | None = None


@dataclass
class Compiled:
    """The answer to one query.

    Attributes:
        program: the runnable graph, ``(*inputs, seed) -> (output, relevance..., constants)``.
        assignment: rules of the canonical graph.
        plan: how it is answered.
        stages: every stage, in order.
        refusals: faster ways not taken, with reasons.
        references: what else the program takes, for each reference input that maps are averaged over: the value of every source;
            nothing where the reference is part of the program.
    """

    program: fx.GraphModule
    assignment: Assignment
    plan: Plan
    stages: tuple[Stage, ...]
    refusals: tuple[lower.Refusal, ...] = field(default_factory=tuple)
    references: tuple[tuple[Tensor, ...], ...] = ((),)

    @cached_property
    def function(self) -> Program:
        """The program as a plain function, which is what runs."""
        return bound(self.program)

    @property
    def portable(self) -> fx.GraphModule:
        """The program before it was put into a form for one device: plain ATen operators that overwrite nothing."""
        found = next(stage.program for stage in self.stages if stage.name == "optimize")
        assert isinstance(found, fx.GraphModule)
        return found


def front(model: nn.Module, inputs: Sequence[Tensor], output: str | int | None, names: Sequence[str] = ()) -> Front:
    """Captures and canonicalizes a model; see :func:`frpc.capture.capture`."""
    start = time.perf_counter()
    captured = capture(model, inputs, output, names)
    taken = Stage("capture", time.perf_counter() - start, (), captured.graph_module)
    canonical, canonized, ledger = _canonical(captured)
    return Front(captured, canonical, (taken, canonized), mixing(captured, inputs), ledger, _output(canonical))


def _canonical(captured: Captured) -> tuple[fx.GraphModule, Stage, Ledger]:
    """Puts a captured graph into canonical form; the ledger notes how what it holds came about."""
    start = time.perf_counter()
    ledger, canonical = Ledger(), copy_graph(captured.graph_module)
    ledger.name(captured.graph_module)
    passes = _named(canonicalize.PASSES, _run(canonicalize.PASSES, canonical, ledger))
    return canonical, Stage("canonicalize", time.perf_counter() - start, passes, canonical), ledger


def _output(canonical: fx.GraphModule) -> Tensor:
    return empty_like(canonical.graph.output_node().args[0].meta["val"])  # type: ignore[union-attr]


def renewed(shared: Front, model: nn.Module) -> Front:
    """Returns what queries share for other weights: the graph as it was captured, with the tensors of ``model``.

    Raises:
        WeightsError: if a tensor of the graph is missing in the model, or has another shape, dtype or device there.
    """
    old = shared.captured.graph_module
    captured = dataclasses.replace(shared.captured, graph_module=copy_graph(old, tensors_of(old, model)))
    canonical, canonized, ledger = _canonical(captured)
    taken = Stage("capture", 0.0, (), captured.graph_module)
    return Front(captured, canonical, (taken, canonized), shared.mixing, ledger, shared.output)


def duplicated(shared: Front, programs: Sequence[Compiled], memo: dict[int, Any]) -> tuple[Front, list[Compiled]]:
    """Copies captured graphs and programs with tensors of their own; what shares memory shares it in the copy.

    Rules, plans and stages are records of the compilation and stay common to both.

    Args:
        shared: what the programs share.
        programs: compiled from it.
        memo: as for ``copy.deepcopy``.
    """
    pairs: list[tuple[Tensor, Tensor]] = []

    def own(graph_module: fx.GraphModule) -> fx.GraphModule:
        old = dict(graph_module.named_buffers(remove_duplicate=False))
        # What oneDNN packed has no memory that Python could copy.
        new = {name: value.clone() if value.is_mkldnn else copy.deepcopy(value, memo) for name, value in old.items()}
        pairs.extend((old[name], new[name]) for name in old)
        return copy_graph(graph_module, tree(new))

    def own_program(compiled: Compiled) -> Compiled:
        portable = own(compiled.portable)
        stages = tuple(dataclasses.replace(s, program=portable) if s.name == "optimize" else s for s in compiled.stages)
        references = copy.deepcopy(compiled.references, memo)
        return dataclasses.replace(compiled, program=own(compiled.program), stages=stages, references=references)

    captured = dataclasses.replace(shared.captured, graph_module=own(shared.captured.graph_module))
    canonical, copies = own(shared.canonical), [own_program(p) for p in programs]
    ledger = shared.ledger.copied(pairs)
    return dataclasses.replace(shared, captured=captured, canonical=canonical, ledger=ledger), copies


def copy_graph(graph_module: fx.GraphModule, root: nn.Module | None = None) -> fx.GraphModule:
    """Copies a graph; its tensors are shared (the earlier stage stays printable and runnable), or those of ``root``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, copies)
    graph.output(result)
    for old, new in copies.items():
        new.meta = dict(old.meta)
    fresh = nn.Module()
    source = root or graph_module
    for name, part in source._modules.items():
        fresh.add_module(name, part)
    for name, value in source._buffers.items():
        fresh.register_buffer(name, value)
    return fx.GraphModule(fresh, graph, class_name=type(graph_module).__name__)


def _run(
    passes: Sequence[Callable[[fx.GraphModule], Any]], graph_module: fx.GraphModule, ledger: Ledger | None = None
) -> list[Any]:
    """Runs passes and lints what each leaves; a broken graph is reported with the pass's name. Returns their results."""
    results = []
    for one_pass in passes:
        with nullcontext() if ledger is None else ledger.recording():
            results.append(one_pass(graph_module))
        try:
            graph_module.graph.lint()
        except RuntimeError as error:
            raise CompileError(f"pass {one_pass.__name__} left a broken graph: {error}") from error
    graph_module.recompile()
    return results


def _named(passes: Sequence[Callable[[fx.GraphModule], bool]], changed: Sequence[bool]) -> tuple[str, ...]:
    """Names the passes that changed something."""
    return tuple(p.__name__ for p, did in zip(passes, changed, strict=True) if did)


def compile_query(shared: Front, choice: Choice, query: Query) -> Compiled:
    """Compiles the program that answers one query.

    Raises:
        UnsupportedOpError: if nodes have no rule.
        CompileError: if a pass breaks the graph.
    """
    clock = _Clock(list(shared.stages))
    assignment = assign_rules(shared, choice, query, clock)
    plan = make_plan(assignment, query)
    clock.note("plan", plan)
    emitted = emit(assignment, plan, shared.captured.fake_mode)
    clock.note("emit", emitted)
    optimized = copy_graph(emitted)
    clock.note("optimize", optimized, _named(optimize.PASSES, _run(optimize.PASSES, optimized, shared.ledger)))
    lowered, refusals = lower_program(optimized)
    clock.note("lower", lowered, tuple(p.__name__ for p in lower.PASSES))
    if foreign := only_aten(lowered, shared.captured.graph_module, lower.OPERATORS):
        raise CompileError(f"the program holds calls that are no ATen operators: {', '.join(sorted(set(foreign)))}")
    if shared.captured.static_batch_reason:
        refusals.append(lower.Refusal("a free batch size", "capture", shared.captured.static_batch_reason))
    return Compiled(lowered, assignment, plan, tuple(clock.stages), tuple(refusals), varying_references(assignment))


def lower_program(program: fx.GraphModule) -> tuple[fx.GraphModule, list[lower.Refusal]]:
    """Puts a copy of a program into the form that runs fastest where its tensors live; also says what was refused."""
    lowered = copy_graph(program)
    return lowered, [refusal for found in _run(lower.PASSES, lowered) for refusal in found]


def assign_rules(shared: Front, choice: Choice, query: Query, clock: _Clock | None = None) -> Assignment:
    """Folds batch norm, layers the query names excepted, and gives every node its rule.

    Raises:
        UnsupportedOpError: if nodes have no rule.
        BatchError: if the model does not treat samples apart.
    """
    clock = clock or _Clock([])
    canonical = copy_graph(shared.canonical)
    with shared.ledger.recording():
        folded = fold_batch_norm(canonical, frozenset((*query.layers, query.of, *(choice.source or ()))))
    canonical.recompile()
    clock.note("fold batch norm", canonical, ("fold_batch_norm",) if folded else ())
    if choice.rules.account.spelled_out:
        canonical = copy_graph(canonical)
        passes = (spell_out, *canonicalize.PASSES)
        clock.note("spell out", canonical, _named(passes, _run(passes, canonical, shared.ledger)))
    fixed = shared.captured.inputs[0].batch
    if shared.mixing is not None and shared.mixing.startswith("The explained output"):
        raise BatchError(shared.mixing)  # no rule could mend that the output is not one result a sample
    assignment = assign(canonical, choice.rules, choice.constant, fixed, choice.source, query.of).demand_complete()
    if shared.mixing is not None:
        raise BatchError(shared.mixing)
    clock.note("assign", assignment)
    return assignment


class _Clock:
    """Records stages with the time since the last one."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.last = time.perf_counter()

    def note(self, name: str, program: Any, passes: tuple[str, ...] = ()) -> None:
        now = time.perf_counter()
        self.stages.append(Stage(name, now - self.last, passes, program))
        self.last = now


def verify(compiled: Compiled, shared: Front, inputs: Sequence[Tensor]) -> None:
    """Runs the program once and compares its output with the captured model's.

    Raises:
        CompileError: if they differ by more than rounding can explain.
    """
    with torch.no_grad():
        expected = shared.captured.graph_module(*inputs)
        kept = shared.canonical.graph.output_node().args[0].meta["val"].dtype  # type: ignore[union-attr]
        seed = torch.ones_like(expected, dtype=kept)  # a model in float64 may end in float32
        got = compiled.program(*inputs, seed, *compiled.references[0])[0]
    scale = expected.abs().amax() + torch.finfo(expected.dtype).tiny
    error = float((got - expected).abs().amax() / scale)
    unit = rounding(shared.captured.graph_module, expected)
    bound = 1e4 * unit  # folding and another memory order re-associate sums, no more
    if not error <= bound and bool(torch.isfinite(expected).all()):
        bound = max(bound, 1e2 * _sensitivity(shared, inputs, expected, unit))
        if not error <= bound:
            raise CompileError(
                f"the compiled program's output differs from the model's by {error:.1e} of its largest value (bound {bound:.1e})"
            )


def confirm(shared: Front, model: nn.Module, names: Sequence[str]) -> None:
    """Runs a model and its captured graph on one made-up input and compares: code may depend on more than weights.

    Args:
        shared: the graph, with the model's tensors.
        model: the model.
        names: names to pass inputs by; empty to pass them by position.

    Raises:
        CompileError: if they differ.
    """
    inputs = [_made_up(spec) for spec in shared.captured.inputs]
    with torch.no_grad():
        got = shared.captured.graph_module(*inputs)
        found = model(**dict(zip(names, inputs, strict=True))) if names else model(*inputs)
    given = [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and (x.shape, x.dtype) == (got.shape, got.dtype)]
    bound = 1e4 * rounding(shared.captured.graph_module, got) * float(got.abs().amax())
    if bool(torch.isfinite(got).all()) and not any(float((x - got).abs().amax()) <= bound for x in given):
        raise CompileError(
            f"{type(model).__name__} computes something else than what was captured from it, with the same weights: its code or "
            "an attribute that is no parameter or buffer has changed. Compile it anew."
        )


def _made_up(spec: InputSpec) -> Tensor:
    """An input of the right kind: standard normal numbers, the index 0, masks that hide nothing."""
    shape = [spec.batch or 2, *spec.shape]
    if spec.dtype.is_floating_point:
        chance = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=chance).to(spec.device, spec.dtype)
    return torch.full(shape, spec.dtype is torch.bool, dtype=spec.dtype, device=spec.device)


def _sensitivity(shared: Front, inputs: Sequence[Tensor], expected: Tensor, unit: float) -> float:
    """How much the model's own output moves, relative to its largest value, where its input moves by about one rounding.

    A deep net with weights that nobody trained can blow such a change up a millionfold; its output is then known no better.
    """
    chance = torch.Generator(device=expected.device).manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=chance, device=x.device) if x.is_floating_point() else None
        return x if noise is None else x * (1 + unit * noise.to(x.dtype))

    with torch.no_grad():
        changes = [shared.captured.graph_module(*(moved(x) for x in inputs)) - expected for _ in range(3)]
    return max(float(change.abs().amax()) for change in changes) / float(expected.abs().amax() + torch.finfo(expected.dtype).tiny)
