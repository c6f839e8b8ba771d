"""Emission: values and relevance traced into one runnable graph of ATen operators.

The program takes the model's inputs and a seed (a linear functional of the output, ``[B, ...]`` like the output or
``[K, B, ...]`` with columns) and returns ``(output, relevance of each wanted node ..., share of constants)``; of inner layers it
returns ``(output, relevance of each ..., value of each ...)``. Where rules follow
no constants, the share is what the map leaves of the explained number: what rules absorbed. With several reference inputs the
program takes one more input, the reference; a single one is a constant, and all that follows from it is computed now.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assignment
from frpc.assign.receptive import receptive_fields
from frpc.capture.batch import one_per_sample
from frpc.core.graph import fetch, first_result, origin_of
from frpc.core.torch_compat import FakeTensorMode, OpOverload, enable_python_dispatcher, make_fx, symbolic, traced_graph
from frpc.emit.bias import Tally, field_constants
from frpc.emit.exact import in_float64
from frpc.emit.plan import Plan
from frpc.emit.propagate import Pulled, affine_maps, evaluate, pull

__all__ = ["at_reference", "emit", "reference_constants", "run_eagerly", "varying_references"]


def run_eagerly(
    assignment: Assignment, plan: Plan, constants: Mapping[str, Any], inputs: Sequence[Tensor], seed: Tensor, observe: Any = None
) -> tuple[Tensor, ...]:
    """Runs a plan as plain tensor code: the emitted program is traced from it and must give the same.

    Args:
        assignment: rules of the graph.
        plan: what to compute.
        constants: every ``get_attr`` target, the spreading matrices of the bias policy, and the reference inputs.
        inputs: the model's inputs.
        seed: ``[B, ...]`` like the output, or ``[K, B, ...]``.
        observe: see :data:`frpc.emit.propagate.Observer`.
    """
    hooks = {} if observe is None else {"observe": observe}
    graph = assignment.graph_module.graph
    values = evaluate(graph, constants, inputs, **hooks)
    references = at_reference(assignment, constants, inputs, values, **hooks)
    maps = affine_maps(assignment, values, plan.pulled, references=references, **hooks)
    output = first_result(values[plan.result])
    there = None if references is None else first_result(references[plan.result])
    functional = plan.query.top(seed, output, there)
    tally = Tally(plan.query.bias, {k: v for k, v in constants.items() if k.startswith("field_")})
    spread = tally.add if assignment.account.constants else None
    pulled = pull(assignment, maps, {plan.result: functional}, plan.wanted, spread, **hooks)
    explained = _explained(functional, output if there is None else output - there)
    if plan.result not in assignment.carried:  # an output of constants alone is all bias
        tally.everywhere = explained
    found = [_relevance(assignment, node, values, references, pulled, functional, output) for node in plan.wanted]
    if plan.query.layers:
        return output, *found, *(first_result(values[node]) for node in plan.wanted)
    if not assignment.account.constants:
        tally.everywhere = _absorbed(assignment, plan, explained, found)
    cells = sum(_cells(assignment, n) for n in assignment.sources)
    maps_ = [
        tally.on_map(r, first_result(values[n]).dim(), assignment.batches[n], cells)
        for r, n in zip(found, plan.wanted, strict=True)
    ]
    return output, *maps_, tally.total(explained)


def at_reference(
    assignment: Assignment,
    constants: Mapping[str, Any],
    inputs: Sequence[Tensor],
    values: Mapping[fx.Node, Any],
    observe: Any = None,
    until: fx.Node | None = None,
) -> dict[fx.Node, Any] | None:
    """Returns the value of every node when the sources have their reference values, or None without a reference.

    Args:
        assignment: rules of the graph.
        constants: every ``get_attr`` target; ``reference_0``, ... for the sources, where they do not depend on the input.
        inputs: the model's inputs.
        values: the value of every node at the input.
        observe: see :data:`frpc.emit.propagate.Observer`.
        until: the last node wanted; all by default.
    """
    reference = assignment.account.reference
    if reference is None:
        return None
    given: dict[fx.Node, Any] = {}
    merged = any(a.batch.axis != 0 or a.batch.factor != 1 for a in assignment.rules.values())
    fixed = any(not isinstance(n.meta["val"].shape[0], torch.SymInt) for n in assignment.sources)
    for position, source in enumerate(assignment.sources):
        here = first_result(values[source])
        if f"reference_{position}" in constants:
            there = constants[f"reference_{position}"]
            # Where a dimension holds more than samples, or the graph knows their number, one reference does not broadcast: it is
            # repeated from the start.
            given[source] = there.expand(here.shape).contiguous() if merged or fixed else there  # views are of memory in order
        else:
            given[source] = reference.blur(here) if reference.kind == "blur" else torch.zeros_like(here)
    hooks: dict[str, Any] = {} if observe is None else {"observe": lambda node, phase: observe(node, "reference")}
    graph = assignment.graph_module.graph
    if _computed_now(assignment, constants, given):
        return in_float64(graph, constants, given, until, **hooks)
    return evaluate(graph, constants, inputs, until=until, given=given, **hooks)


def _computed_now(assignment: Assignment, constants: Mapping[str, Any], given: Mapping[fx.Node, Tensor]) -> bool:
    """Says whether all that follows from a reference is known when a program is compiled."""
    known = [f"reference_{k}" in constants for k in range(len(given))]
    placeholders = assignment.graph_module.graph.find_nodes(op="placeholder")
    sized = all(isinstance(n, int) for value in given.values() for n in value.shape)
    return all(known) and sized and set(placeholders) <= set(given) and not _varies(assignment)


def _explained(functional: Tensor, output: Tensor) -> Tensor:
    """``<G, z>`` for each column and sample, ``[*K, B]``."""
    product = functional * output
    lead = functional.dim() - output.dim() + 1
    return product.flatten(lead).sum(-1) if product.dim() > lead else product


def _relevance(
    assignment: Assignment,
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    references: Mapping[fx.Node, Any] | None,
    pulled: Pulled,
    functional: Tensor,
    output: Tensor,
) -> Tensor:
    """``a G_a`` of a node, ``(a - a_ref) G_a`` of increments, or ``G_a`` alone; and what first layers gave to it."""
    a = first_result(values[node])
    carried = a if references is None else a - first_result(references[node])
    multiplier = pulled.multiplier.get(node)
    parts = [] if multiplier is None else [multiplier if assignment.account.gives == "multiplier" else carried * multiplier]
    parts += [pulled.direct[node]] if node in pulled.direct else []
    if not parts:
        lead = functional.shape[: functional.dim() - output.dim()]
        return (a * 0).expand([*lead, *a.shape])
    return sum(parts[1:], parts[0])


def _absorbed(assignment: Assignment, plan: Plan, explained: Tensor, found: Sequence[Tensor]) -> Tensor:
    """The part of the explained number that maps do not contain, ``[*K, B]``; empty if they are not relevance."""
    if assignment.account.gives == "multiplier":
        return torch.zeros_like(explained)
    lead = explained.dim() - 1
    pairs = zip(found, plan.wanted, strict=True)
    return explained - sum(one_per_sample(r, r.dim() - lead, assignment.batches[node]) for r, node in pairs)


def _cells(assignment: Assignment, node: fx.Node) -> int:
    """The number of cells that a source has for one sample."""
    batch = assignment.batches[node]
    sizes = first_result(node.meta["val"]).shape
    return batch.factor * math.prod(int(size) for axis, size in enumerate(sizes) if axis != batch.axis)


def emit(assignment: Assignment, plan: Plan, fake_mode: FakeTensorMode) -> fx.GraphModule:
    """Returns the program that answers ``plan``, as one graph of ATen operators."""
    module = assignment.graph_module
    constants = {str(n.target): fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    constants.update(_matrices(assignment, plan))
    references = reference_constants(assignment)
    changing = references if _varies(assignment) else {}
    constants.update({} if changing else references)
    placeholders = module.graph.find_nodes(op="placeholder")
    names = list(constants)

    def program(fakes: list[Any], inputs: list[Any], seed: Tensor, others: list[Any]) -> tuple[Tensor, ...]:
        known = dict(zip([*names, *changing], [*fakes, *others], strict=True))
        return run_eagerly(assignment, plan, known, inputs, seed, _mark)

    # The dispatcher keeps sizes symbolic in operators whose C++ would fix the batch at its example size.
    with fake_mode, torch.no_grad(), enable_python_dispatcher():
        fakes = [fake_mode.from_tensor(c, static_shapes=True) if isinstance(c, Tensor) else c for c in constants.values()]
        seed = _example_seed(plan.result.meta["val"], plan.query.columns, fake_mode)
        others = [fake_mode.from_tensor(t, static_shapes=True) for t in changing.values()]
        traced = make_fx(program)(fakes, [n.meta["val"] for n in placeholders], seed, others)
    return _named(traced, constants, [*(n.name for n in placeholders), "seed", *changing])


def reference_constants(assignment: Assignment, which: int = 0) -> dict[str, Tensor]:
    """Returns the reference value of every source by name, ``[1, ...]`` each; empty where it depends on the input.

    Raises:
        ShapeError: if a given reference does not look like one sample of the input.
    """
    reference = assignment.account.reference
    if reference is None or any(source.op != "placeholder" for source in assignment.sources):
        return {}
    found = {}
    for position, source in enumerate(assignment.sources):
        value = source.meta["val"]
        sizes = [int(n) for n in value.shape[1:]]
        tensors = reference.tensors(sizes, value.dtype, value.device, source.name)
        if tensors:
            found[f"reference_{position}"] = tensors[which]
    return found


def _varies(assignment: Assignment) -> bool:
    """Says whether one program has to serve several references."""
    return assignment.account.reference is not None and assignment.account.reference.count > 1


def varying_references(assignment: Assignment) -> tuple[tuple[Tensor, ...], ...]:
    """Returns what a program takes in addition to its inputs and the seed, once for every reference."""
    if not _varies(assignment):
        return ((),)
    assert assignment.account.reference is not None
    return tuple(tuple(reference_constants(assignment, k).values()) for k in range(assignment.account.reference.count))


def _matrices(assignment: Assignment, plan: Plan) -> dict[str, Tensor]:
    if plan.query.bias != "receptive_field" or plan.query.layers:
        return {}
    example = assignment.sources[0].meta["val"]
    with_constant = [n for n in plan.pulled if assignment.rules[n].example.constant is not None]
    fields = receptive_fields(assignment)
    return field_constants(fields, [int(s) for s in example.shape[2:]], with_constant, example.dtype)


def _example_seed(output: Tensor, columns: bool, fake_mode: FakeTensorMode) -> Tensor:
    if not columns:
        return torch.empty_like(output)
    counted = symbolic(fake_mode, (3, 1), "columns", (True, False))
    return output.new_empty([counted.shape[0], *output.shape])


@contextmanager
def _mark(node: fx.Node, phase: str) -> Iterator[None]:
    """Notes on every node traced inside whose work it is."""
    graph = traced_graph()
    before = next(iter(reversed(graph.nodes)))
    yield
    new = before.next
    while new.op != "root":
        new.meta.setdefault("origin", origin_of(node))
        new.meta.setdefault("phase", phase)
        new.meta.setdefault("of", node.name)
        new = new.next


def _named(traced: fx.GraphModule, constants: Mapping[str, Any], inputs: Sequence[str]) -> fx.GraphModule:
    """Turns the traced placeholders of constants back into ``get_attr`` nodes and names the inputs as the model does."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    root = torch.nn.Module()
    placeholders = traced.graph.find_nodes(op="placeholder")
    for name, node in zip(inputs, placeholders[len(constants) :], strict=True):
        copies[node] = graph.placeholder(name)
        copies[node].meta = dict(node.meta)
    for (name, value), node in zip(constants.items(), placeholders, strict=False):
        if node.users:
            free = name.replace(".", "_")
            root.register_buffer(free, value)
            copies[node] = graph.create_node("get_attr", free, name=free)
            copies[node].meta = {**node.meta, "constant": name}
    for node in traced.graph.nodes:
        if node.op in ("call_function", "output"):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        elif node.op == "get_attr":  # a tensor literal met while tracing
            root.register_buffer(str(node.target), getattr(traced, str(node.target)))
            copies[node] = graph.node_copy(node)
    graph.lint()
    return fx.GraphModule(root, graph, class_name="Program")


def only_aten(graph_module: fx.GraphModule, model: fx.GraphModule, beside: Sequence[OpOverload] = ()) -> list[str]:
    """Returns the calls that are not ATen operators, the model's own or arithmetic on sizes; empty for a correct program.

    Args:
        graph_module: an emitted program.
        model: the captured graph, in which operators registered with ``torch.library`` stay whole.
        beside: other operators that it may contain: those from lowering.
    """
    own = {n.target for n in model.graph.nodes if isinstance(n.target, OpOverload)}
    arithmetic = (operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv, operator.mod)
    known = (*arithmetic, *own, *beside)
    return [
        str(n.target)
        for n in graph_module.graph.nodes
        if n.op in ("call_module", "call_method")
        or (n.op == "call_function" and n.target not in known and getattr(n.target, "namespace", "") != "aten")
    ]
