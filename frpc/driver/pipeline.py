"""The driver: runs the stages in order, times them, checks each graph and keeps it for printing.

capture -> canonicalize -> assign -> plan -> emit -> optimize -> lower
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from frpc.assign.assignment import Assignment, assign
from frpc.canonicalize import passes as canonicalize
from frpc.canonicalize.batch_norm import fold_batch_norm
from frpc.canonicalize.precision import rounding
from frpc.capture.batch import FIRST, Batch
from frpc.capture.decompose import spell_out, spell_out_at_one_point
from frpc.capture.export import Captured, capture, check_decisive, tensors_of, tree
from frpc.capture.mixing import NODES, Trial, trial
from frpc.core.editor import Editor
from frpc.core.graph import empty_like, origin_of
from frpc.core.lineage import Ledger
from frpc.core.patterns import Pattern, check_patterns
from frpc.core.reasons import failure, itself
from frpc.core.stages import Clock, Stage, copy_graph, named, run_passes
from frpc.driver.sources import demand_path, demand_samples, unreached
from frpc.emit.plan import Plan, Query, Strategy, make_plan
from frpc.emit.program import emit, only_aten, varying_references
from frpc.errors import BatchError, CompileError, FrpcError, ShapeError
from frpc.optimize import passes as optimize
from frpc.optimize.backends.backends import Backend, executable, lower_program
from frpc.optimize.backends.bound import Program
from frpc.optimize.lower import Refusal
from frpc.optimize.lower.footprint import footprint
from frpc.rules.sets.ruleset import RuleSet

aten = torch.ops.aten

__all__ = ["Choice", "Compiled", "Front", "Stage", "assign_rules", "compile_query", "duplicated", "front", "renewed"]


@dataclass(frozen=True, eq=False)
class Front:
    """What all queries about one model share: its graph, captured and in canonical form before folding.

    ``output`` is an output of its without samples.
    ``trial`` says whether the model treats samples apart; ``ledger`` knows how the tensors that passes made came about;
    ``rounding`` is the relative rounding of the coarsest type that the model computes in; ``modules`` are the paths of all
    modules.
    """

    captured: Captured
    canonical: fx.GraphModule
    stages: tuple[Stage, ...]
    trial: Trial
    ledger: Ledger
    output: Tensor
    rounding: float
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What the caller chose for all queries about a model.

    Attributes:
        rules: the rule set.
        constant: module path patterns whose results count as constants.
        source: ``("input",)`` or module paths relevance is asked about; None for the usual ones.
        output: which of several outputs is explained.
        backend: who runs the programs.
        strategy: how neurons of inner layers are answered where the question does not say.
    """

    rules: RuleSet
    constant: tuple[str, ...] = ()
    source: tuple[str, ...] | None = None
    output: str | int | None = None
    backend: Backend = field(default_factory=Backend)
    strategy: Strategy = "auto"


@dataclass(eq=False)
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
        backend: who runs it.
        fixed_batch: it takes one batch size only.
        pending: a call of so many samples or more is still to be held against the model.
    """

    program: fx.GraphModule
    assignment: Assignment
    plan: Plan
    stages: tuple[Stage, ...]
    refusals: tuple[Refusal, ...] = field(default_factory=tuple)
    references: tuple[tuple[Tensor, ...], ...] = ((),)
    backend: Backend = field(default_factory=Backend)
    fixed_batch: bool = False
    pending: float = 1

    @cached_property
    def function(self) -> Program:
        """The program as its backend runs it."""
        return executable(self.program, self.backend)

    @cached_property
    def places(self) -> tuple[Batch, ...]:
        """Where the samples are in each relevance that it returns."""
        return tuple(self.assignment.batches.get(node, FIRST) for node in self.plan.wanted)

    @property
    def portable(self) -> fx.GraphModule:
        """The program before it was put into a form for one device: plain ATen operators that overwrite nothing."""
        found = next(stage.program for stage in self.stages if stage.name == "optimize")
        assert isinstance(found, fx.GraphModule)
        return found


def front(
    model: nn.Module,
    inputs: Sequence[Tensor],
    output: str | int | None,
    names: Sequence[str] = (),
    gradients: bool = False,
    apart: bool = True,
) -> Front:
    """Captures and canonicalizes a model, and finds where samples lie in its values.

    Args:
        model, inputs, output, names, gradients: as for :func:`frpc.capture.export.capture`.
        apart: try whether samples are treated apart.
    """
    start = time.perf_counter()
    _demand_one_batch(inputs)
    captured = capture(model, inputs, output, names, gradients)
    taken = Stage("capture", time.perf_counter() - start, (), captured.graph_module)
    canonical, canonized, ledger = _canonical(captured)
    call = functools.partial(model, **dict(zip(names, inputs, strict=True))) if names else functools.partial(model, *inputs)
    try:
        tried = trial(canonical, inputs, captured.inputs[0].batch, apart)
    except FrpcError:
        raise
    except Exception as error:  # an operator may refuse values though it took the examples' types
        raise failure(model, call, error, "The captured graph does not run, of") from error
    if tried.mixing is not None and (own := itself(model, call)) is not None:
        raise own
    unit = rounding(captured.graph_module, captured.graph_module.graph.output_node().args[0].meta["val"])  # type: ignore[union-attr]
    return Front(
        captured, canonical, (taken, canonized), tried, ledger, _output(canonical), unit, tuple(dict(model.named_modules()))
    )


def _demand_one_batch(inputs: Sequence[Tensor]) -> None:
    """Refuses inputs of different batch sizes.

    Raises:
        BatchError: if one of them may be the edges of a graph.
        ShapeError: otherwise.
    """
    sizes = sorted({int(x.shape[0]) for x in inputs if isinstance(x, Tensor) and x.dim()})
    if len(sizes) > 1:
        said = f"The inputs have different batch sizes: {sizes}."
        if any(not x.is_floating_point() and x.dim() == 2 and x.shape[0] == 2 for x in inputs):
            raise BatchError(f"{said}\n  {NODES}")
        if all(not x.is_floating_point() and x.dim() == 1 for x in inputs):
            said += " If they are tokens and offsets of an EmbeddingBag: give it bags of one length, [B, L], instead."
        raise ShapeError(f"{said} All inputs are [B, ...]; hold what is the same for all samples as a buffer of the model.")


def _canonical(captured: Captured) -> tuple[fx.GraphModule, Stage, Ledger]:
    """Puts a captured graph into canonical form; the ledger notes how what it holds came about."""
    start = time.perf_counter()
    ledger, canonical = Ledger(), copy_graph(captured.graph_module)
    ledger.name(captured.graph_module)
    passes = named(canonicalize.PASSES, run_passes(canonicalize.PASSES, canonical, ledger))
    _keep_one_result(canonical, captured.inputs[0].batch)
    return canonical, Stage("canonicalize", time.perf_counter() - start, passes, canonical), ledger


def _keep_one_result(canonical: fx.GraphModule, fixed: int | None) -> None:
    """``y -> y[None]`` where the model squeezed away a batch that is always 1."""
    output = canonical.graph.output_node()
    result: Any = output.args[0]
    if fixed == 1 and result.meta["val"].dim() == 0:
        output.args = (Editor(canonical, output).call(aten.unsqueeze.default, result, 0),)
        canonical.recompile()


def _output(canonical: fx.GraphModule) -> Tensor:
    return empty_like(canonical.graph.output_node().args[0].meta["val"])  # type: ignore[union-attr]


def renewed(shared: Front, model: nn.Module) -> Front:
    """Returns what queries share for other weights: the graph as it was captured, with the tensors of ``model``.

    Raises:
        WeightsError: if a tensor of the graph is missing in the model, or has another shape, dtype or device there, or if one
            whose values shaped the graph has others.
    """
    check_decisive(shared.captured, model)
    old = shared.captured.graph_module
    captured = dataclasses.replace(shared.captured, graph_module=copy_graph(old, tensors_of(old, model)))
    canonical, canonized, ledger = _canonical(captured)
    taken = Stage("capture", 0.0, (), captured.graph_module)
    _keep_samples(shared.canonical, canonical)
    return dataclasses.replace(shared, captured=captured, canonical=canonical, stages=(taken, canonized), ledger=ledger)


def _keep_samples(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Notes on a graph of other weights where samples lie: passes make the same of it, but for names."""
    if [n.target for n in old.graph.nodes] == [n.target for n in new.graph.nodes]:
        for one, other in zip(old.graph.nodes, new.graph.nodes, strict=True):
            if "samples" in one.meta:
                other.meta["samples"] = one.meta["samples"]


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


def compile_query(shared: Front, choice: Choice, query: Query) -> Compiled:
    """Compiles the program that answers one query.

    Raises:
        UnsupportedOpError: if nodes have no rule.
        CompileError: if a pass breaks the graph.
    """
    clock = Clock(list(shared.stages))
    assignment = assign_rules(shared, choice, query, clock)
    plan = make_plan(assignment, query)
    demand_path(assignment, plan)
    clock.note("plan", plan)
    emitted = emit(assignment, plan, shared.captured.fake_mode)
    clock.note("emit", emitted)
    optimized = copy_graph(emitted)
    clock.note("optimize", optimized, named(optimize.PASSES, run_passes(optimize.PASSES, optimized, shared.ledger)))
    lowered = lower_program(optimized, choice.backend)
    clock.note("lower", lowered.program, lowered.passes)
    if foreign := only_aten(lowered.program, shared.captured.graph_module, lowered.operators):
        raise CompileError(f"the program holds calls that are no ATen operators: {', '.join(sorted(set(foreign)))}")
    refusals, static = lowered.refusals, shared.captured.static_batch_reason
    if static:
        refusals = (*refusals, Refusal("a free batch size", "capture", static))
    if shared.trial.untested is not None:
        refusals = (*refusals, Refusal("the trial that samples are treated apart", "verification", shared.trial.untested))
    refusals = (*refusals, *unreached(assignment, plan))
    for node, why in assignment.notes:
        refusals = (*refusals, Refusal(f"{choice.rules.name}'s own rule", origin_of(node).module or node.name, why))
    if choice.backend.name != "inductor":  # which plans memory of its own
        plan = dataclasses.replace(plan, footprint=footprint(lowered.program, query.columns))
    references = varying_references(assignment)
    return Compiled(lowered.program, assignment, plan, tuple(clock.stages), refusals, references, choice.backend, bool(static))


def assign_rules(shared: Front, choice: Choice, query: Query, clock: Clock | None = None) -> Assignment:
    """Folds batch norm, layers the query names excepted, and gives every node its rule.

    Raises:
        UnsupportedOpError: if nodes have no rule.
        BatchError: if the model does not treat samples apart.
        OptionError: if a pattern of the rule set, or of ``constant``, matches nothing.
    """
    clock = clock or Clock([])
    constant = (Pattern("constant", path) for path in choice.constant)
    check_patterns((*choice.rules.patterns(), *constant), shared.canonical.graph, shared.modules)
    canonical = copy_graph(shared.canonical)
    with shared.ledger.recording():
        folded = fold_batch_norm(canonical, frozenset((*query.layers, query.of, *(choice.source or ()))))
    canonical.recompile()
    clock.note("fold batch norm", canonical, ("fold_batch_norm",) if folded else ())
    if choice.rules.account.spelled_out:
        canonical = copy_graph(canonical)
        on_the_way = choice.rules.account.from_reference
        passes = (spell_out if on_the_way else spell_out_at_one_point, *canonicalize.PASSES)
        clock.note("spell out", canonical, named(passes, run_passes(passes, canonical, shared.ledger)))
    fixed = shared.captured.inputs[0].batch
    if shared.trial.misshapen is not None:
        raise BatchError(shared.trial.misshapen)  # no rule could mend that the output is not one result a sample
    assignment = assign(canonical, choice.rules, choice.constant, fixed, choice.source, query.of, query.layers)
    if all(gap.samples for gap in assignment.gaps):  # for want of a rule nothing else can be said
        if shared.trial.mixing is not None:
            raise BatchError(shared.trial.mixing)
        demand_samples(assignment)
    assignment.demand_complete()
    clock.note("assign", assignment)
    return assignment
