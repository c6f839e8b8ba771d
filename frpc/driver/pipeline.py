"""The driver: runs the stages in order, times them, checks each graph and keeps it for printing.

capture -> canonicalize -> assign -> plan -> emit -> optimize -> lower
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assignment, assign
from frpc.canonicalize import passes as canonicalize
from frpc.canonicalize.batch_norm import fold_batch_norm
from frpc.capture.batch import FIRST, Batch
from frpc.capture.decompose import spell_out, spell_out_at_one_point
from frpc.capture.export import tree
from frpc.core.graph import origin_of
from frpc.core.patterns import Pattern, check_patterns
from frpc.core.refusal import Refusal
from frpc.core.stages import Clock, Stage, copy_graph, named, run_passes
from frpc.driver.prepare import PreparedModel
from frpc.driver.sources import demand_path, demand_samples, unreached
from frpc.emit.plan import Plan, Query, Strategy, check_strategy, make_plan
from frpc.emit.program import emit, only_aten, varying_references
from frpc.errors import BatchError, CompileError
from frpc.optimize import passes as optimize
from frpc.optimize.backends.backends import Backend, check_backend, executable, lower_program
from frpc.optimize.backends.bound import Program
from frpc.optimize.lower.footprint import footprint
from frpc.rules.sets.ruleset import RuleSet

aten = torch.ops.aten

__all__ = ["CompileOptions", "Compiled", "Query", "Stage", "assign_rules", "compile_query", "deep_copy", "gaps_and_rules"]


@dataclass(frozen=True)
class CompileOptions:
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

    def with_names(self, backend: str, mode: str, strategy: str) -> CompileOptions:
        """Returns these options with a backend and a strategy by their names.

        Raises:
            OptionError: for an unknown name, or a backend that is not available.
        """
        return dataclasses.replace(self, backend=check_backend(backend, mode), strategy=check_strategy(strategy))


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


def deep_copy(
    prepared: PreparedModel, programs: Sequence[Compiled], memo: dict[int, Any]
) -> tuple[PreparedModel, list[Compiled]]:
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

    captured = dataclasses.replace(prepared.captured, graph_module=own(prepared.captured.graph_module))
    canonical, copies = own(prepared.canonical), [own_program(p) for p in programs]
    ledger = prepared.ledger.copied(pairs)
    return dataclasses.replace(prepared, captured=captured, canonical=canonical, ledger=ledger), copies


def compile_query(prepared: PreparedModel, options: CompileOptions, query: Query) -> Compiled:
    """Compiles the program that answers one query.

    Raises:
        UnsupportedOpError: if nodes have no rule.
        CompileError: if a pass breaks the graph.
    """
    clock = Clock(list(prepared.stages))
    assignment = assign_rules(prepared, options, query, clock)
    plan = make_plan(assignment, query)
    demand_path(assignment, plan)
    clock.note("plan", plan)
    emitted = emit(assignment, plan, prepared.captured.fake_mode)
    clock.note("emit", emitted)
    optimized = copy_graph(emitted)
    clock.note("optimize", optimized, named(optimize.PASSES, run_passes(optimize.PASSES, optimized, prepared.ledger)))
    lowered = lower_program(optimized, options.backend)
    clock.note("lower", lowered.program, lowered.passes)
    if foreign := only_aten(lowered.program, prepared.captured.graph_module, lowered.operators):
        raise CompileError(f"the program contains calls that are not ATen operators: {', '.join(sorted(set(foreign)))}")
    refusals, static = lowered.refusals, prepared.captured.static_batch_reason
    if static:
        refusals = (*refusals, Refusal("a free batch size", "capture", static))
    if prepared.trial.untested is not None:
        refusals = (*refusals, Refusal("the test that samples are independent", "verification", prepared.trial.untested))
    refusals = (*refusals, *unreached(assignment, plan))
    for node, why in assignment.notes:
        refusals = (*refusals, Refusal(f"{options.rules.name}'s own rule", origin_of(node).module or node.name, why))
    if options.backend.name != "inductor":  # which plans memory of its own
        plan = dataclasses.replace(plan, footprint=footprint(lowered.program, query.columns))
    references = varying_references(assignment)
    return Compiled(lowered.program, assignment, plan, tuple(clock.stages), refusals, references, options.backend, bool(static))


def assign_rules(prepared: PreparedModel, options: CompileOptions, query: Query, clock: Clock | None = None) -> Assignment:
    """Folds batch norm, layers the query names excepted, and gives every node its rule.

    Raises:
        UnsupportedOpError: if nodes have no rule.
        BatchError: if the model does not treat samples apart.
        OptionError: if a pattern of the rule set, or of ``constant``, matches nothing.
    """
    clock = clock or Clock([])
    constant = (Pattern("constant", path) for path in options.constant)
    check_patterns((*options.rules.patterns(), *constant), prepared.canonical.graph, prepared.modules)
    canonical = copy_graph(prepared.canonical)
    with prepared.ledger.recording():
        folded = fold_batch_norm(canonical, frozenset((*query.layers, query.of, *(options.source or ()))))
    canonical.recompile()
    clock.note("fold batch norm", canonical, ("fold_batch_norm",) if folded else ())
    if options.rules.account.spelled_out:
        canonical = copy_graph(canonical)
        on_the_way = options.rules.account.from_reference
        passes = (spell_out if on_the_way else spell_out_at_one_point, *canonicalize.PASSES)
        clock.note("spell out", canonical, named(passes, run_passes(passes, canonical, prepared.ledger)))
    fixed = prepared.captured.inputs[0].batch
    if prepared.trial.misshapen is not None:
        raise BatchError(prepared.trial.misshapen)  # no rule could mend that the output is not one result a sample
    assignment = assign(canonical, options.rules, options.constant, fixed, options.source, query.of, query.layers)
    if all(gap.samples for gap in assignment.gaps):  # for want of a rule nothing else can be said
        if prepared.trial.mixing is not None:
            raise BatchError(prepared.trial.mixing)
        demand_samples(assignment)
    assignment.demand_complete()
    clock.note("assign", assignment)
    return assignment


def gaps_and_rules(
    prepared: PreparedModel, rules: RuleSet, constant: Sequence[str] = (), source: Sequence[str] | None = None
) -> Assignment:
    """Gives every node of a graph its rule. Raises nothing: nodes without a rule are listed in ``gaps``."""
    return assign(prepared.canonical, rules, constant, prepared.fixed_batch, source)
