"""Emission: values and relevance traced into one runnable graph of ATen operators.

The program takes the model's inputs and a seed (a linear functional of the output, ``[B, ...]`` like the output or
``[K, B, ...]`` with columns) and returns ``(output, relevance of each wanted node ..., share of constants)``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from frpc.assign import Assignment
from frpc.bias import Tally, field_constants
from frpc.graph import fetch, first_result, origin_of
from frpc.plan import Plan
from frpc.propagate import affine_maps, evaluate, pull
from frpc.receptive import receptive_fields

__all__ = ["emit", "run_eagerly"]


def run_eagerly(
    assignment: Assignment, plan: Plan, constants: Mapping[str, Any], inputs: Sequence[Tensor], seed: Tensor, observe: Any = None
) -> tuple[Tensor, ...]:
    """Answers a plan by plain tensor code: what the emitted program must equal, and what it is traced from.

    Args:
        assignment: rules of the graph.
        plan: what is asked.
        constants: every ``get_attr`` target, and the spreading matrices of the bias policy.
        inputs: the model's inputs.
        seed: ``[B, ...]`` like the output, or ``[K, B, ...]``.
        observe: see :data:`frpc.propagate.Observer`.
    """
    hooks = {} if observe is None else {"observe": observe}
    graph = assignment.graph_module.graph
    values = evaluate(graph, constants, inputs, **hooks)
    maps = affine_maps(assignment, values, plan.pulled, **hooks)
    tally = Tally(plan.query.bias, {k: v for k, v in constants.items() if k.startswith("field_")})
    pulled = pull(assignment, maps, {plan.result: seed}, plan.wanted, tally.add, **hooks)
    output = first_result(values[plan.result])
    if plan.result not in assignment.carried:  # an output of constants alone is all bias
        tally.everywhere = (seed * output).flatten(seed.dim() - output.dim() + 1).sum(-1) if output.dim() > 1 else seed * output
    return output, *_answers(assignment, plan, values, pulled, tally, seed, output)


def _answers(
    assignment: Assignment,
    plan: Plan,
    values: Mapping[fx.Node, Any],
    pulled: Mapping[fx.Node, Tensor],
    tally: Tally,
    seed: Tensor,
    output: Tensor,
) -> Iterator[Tensor]:
    """Yields ``a * G_a`` of each wanted node, with the constants put on inputs, and the total of the constants."""
    lead = seed.dim() - output.dim()
    cells = sum(_cells(n) for n in assignment.sources)
    for node in plan.wanted:
        a = first_result(values[node])
        relevance = a * pulled[node] if node in pulled else (a * 0).expand([*seed.shape[:lead], *a.shape])
        yield relevance if plan.query.layers else tally.on_map(relevance, a.dim(), cells)
    # Summed over what is not batch: [*L, B], the shape of the total even where no constant was met.
    yield tally.total(seed.flatten(lead + 1).sum(-1) if seed.dim() > lead + 1 else seed)


def _cells(node: fx.Node) -> int:
    count = 1
    for size in node.meta["val"].shape[1:]:
        count *= int(size)
    return count


def emit(assignment: Assignment, plan: Plan, fake_mode: FakeTensorMode) -> fx.GraphModule:
    """Returns the program that answers ``plan``, as one graph of ATen operators."""
    module = assignment.graph_module
    constants = {str(n.target): fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    constants.update(_matrices(assignment, plan))
    placeholders = module.graph.find_nodes(op="placeholder")
    names = list(constants)

    def program(fakes: list[Any], inputs: list[Any], seed: Tensor) -> tuple[Tensor, ...]:
        return run_eagerly(assignment, plan, dict(zip(names, fakes, strict=True)), inputs, seed, _mark)

    # The dispatcher keeps sizes symbolic in operators whose C++ would fix the batch at its example size.
    with fake_mode, torch.no_grad(), enable_python_dispatcher():
        fakes = [fake_mode.from_tensor(c, static_shapes=True) if isinstance(c, Tensor) else c for c in constants.values()]
        seed = _example_seed(plan.result.meta["val"], plan.query.columns, fake_mode)
        traced = make_fx(program)(fakes, [n.meta["val"] for n in placeholders], seed)
    return _named(traced, constants, [n.name for n in placeholders])


def _matrices(assignment: Assignment, plan: Plan) -> dict[str, Tensor]:
    if plan.query.bias != "receptive_field" or plan.query.layers:
        return {}
    example = assignment.sources[0].meta["val"]
    with_constant = [n for n in plan.pulled if assignment.rules[n].example.constant is not None]
    fields = receptive_fields(assignment)
    return field_constants(fields, [int(s) for s in example.shape[2:]], with_constant, example.dtype)


def _example_seed(output: Tensor, columns: bool, fake_mode: FakeTensorMode) -> Tensor:
    from torch._dynamo.source import LocalSource  # loads all of Dynamo: seconds that a first look need not pay

    if not columns:
        return torch.empty_like(output)
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    with unset_fake_temporarily():
        columns_like = torch.empty(3, 1)
    counted = fake_mode.from_tensor(columns_like, source=LocalSource("columns"), symbolic_context=context)
    return output.new_empty([counted.shape[0], *output.shape])


@contextmanager
def _mark(node: fx.Node, phase: str) -> Iterator[None]:
    """Notes on every node traced inside whose work it is."""
    mode = get_proxy_mode()
    assert mode is not None
    graph = mode.tracer.graph
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
    for name, node in zip([*inputs, "seed"], placeholders[len(constants) :], strict=True):
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


def only_aten(graph_module: fx.GraphModule, model: fx.GraphModule) -> list[str]:
    """Returns the calls that are no ATen operators, none of the model's own and no arithmetic on sizes; empty for every program.

    Args:
        graph_module: an emitted program.
        model: the captured graph, in which operators registered with ``torch.library`` stay whole.
    """
    own = {n.target for n in model.graph.nodes if isinstance(n.target, OpOverload)}
    arithmetic = (operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv, operator.mod)
    return [
        str(n.target)
        for n in graph_module.graph.nodes
        if n.op in ("call_module", "call_method")
        or (n.op == "call_function" and n.target not in (*arithmetic, *own) and getattr(n.target, "namespace", "") != "aten")
    ]
