"""Conservation operator by operator: what every node received, and what it passed on.

The same rules as in the compiled program, run as plain tensor code. In float64 rounding is no excuse: a rule that does not
reproduce its result, ``z = sum M_k a_k + c``, shows itself by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assigned, Assignment
from frpc.capture.batch import one_per_sample
from frpc.capture.export import tree
from frpc.core.graph import fetch, first_result
from frpc.core.stages import copy_graph
from frpc.core.torch_compat import OpOverload, schema_of
from frpc.emit.bias import Tally
from frpc.emit.plan import Plan
from frpc.emit.propagate import affine_maps, evaluate, pull
from frpc.rules.table import Operand

__all__ = ["Audit", "NodeAccount", "audit", "widened"]


@dataclass(frozen=True)
class NodeAccount:
    """The relevance that one node received and passed on, summed over samples.

    Attributes:
        assigned: the node and its rule.
        received: ``<G_z, z>``.
        lost: ``<G_z, z> - sum_k <G_k, a_k> - <G_z, c>``.
        constants: ``<G_z, c>``.
        error: ``|lost|`` over the larger of ``sum |G_z z|`` and ``sum_k sum |G_k a_k|``.
    """

    assigned: Assigned
    received: float
    lost: float
    constants: float
    error: float


@dataclass(frozen=True, eq=False)
class Audit:
    """What :func:`audit` found.

    Attributes:
        nodes: every node that relevance was pulled through, from the output back.
        explained: ``<G, y>`` of each sample, ``[*K, B]``.
        lost: ``sum V + constants - <G, y>`` of each sample, ``[*K, B]``.
        size: ``sum |V| + |constants|`` of each sample, ``[*K, B]``.
        resolution: ``sum |G_z| (|z| + sum_k |a_k|)`` of all nodes: how far a relative change of what operators give, as large as
            their operands, moves the explained number; of each sample, ``[*K, B]``.
    """

    nodes: tuple[NodeAccount, ...]
    explained: Tensor
    lost: Tensor
    size: Tensor
    resolution: Tensor

    @property
    def worst(self) -> NodeAccount | None:
        """The node with the largest error."""
        return max(self.nodes, key=lambda node: node.error if node.error == node.error else float("inf"), default=None)

    @property
    def error(self) -> float:
        """The largest ``|lost| / size`` of the samples; NaN where a map holds NaN."""
        return float(torch.where(self.lost == 0, 0.0, self.lost.abs() / self.size).amax())


def audit(assignment: Assignment, plan: Plan, inputs: Sequence[Tensor], seed: Tensor) -> Audit:
    """Runs a plan operator by operator, and records what every node received; for rule sets that track constants.

    Args:
        assignment: rules of the graph.
        plan: what to compute.
        inputs: the model's inputs.
        seed: ``[B, ...]`` like the output, or ``[K, B, ...]``.
    """
    module = assignment.graph_module
    constants = {str(n.target): fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    nodes: list[NodeAccount] = []
    uncertain: list[Tensor] = []
    with torch.no_grad():
        values = evaluate(module.graph, constants, [x.detach() for x in inputs])
        maps = affine_maps(assignment, values, plan.pulled)
        output = first_result(values[plan.result])
        functional = plan.query.top(seed, output, None)

        def value(node: fx.Node) -> Tensor:
            found: Tensor = first_result(values[node])
            return found.double()

        def record(assigned: Assigned, v: Tensor, passed: Mapping[Operand, Tensor]) -> None:
            z = value(assigned.node)
            beside = [a.abs() for a in map(value, assigned.operands.values()) if a.shape == z.shape]
            uncertain.append(one_per_sample(v.double().abs() * sum(beside, z.abs()), z.dim(), assigned.batch))
            nodes.append(_node_account(assigned, v, value(assigned.node), passed, value, maps[assigned.node].constant))

        tally = Tally("separate", {})
        pulled = pull(assignment, maps, {plan.result: functional}, plan.wanted, tally.add, record=record)
        lead = functional.dim() - output.dim()
        explained = one_per_sample(functional.double() * output.double(), output.dim(), assignment.batches[plan.result])
        total, size = torch.zeros_like(explained), torch.zeros_like(explained)
        for node in plan.wanted:
            a, batch = value(node), assignment.batches[node]
            parts = [a * pulled.multiplier[node].double()] if node in pulled.multiplier else []
            parts += [pulled.direct[node].double()] if node in pulled.direct else []
            if parts:
                local = sum(parts[1:], parts[0])
                total = total + one_per_sample(local, local.dim() - lead, batch)
                size = size + one_per_sample(local.abs(), local.dim() - lead, batch)
        spread = tally.total(explained)
    resolution = sum(uncertain, torch.zeros_like(explained))
    return Audit(tuple(nodes), explained, total + spread - explained, size + spread.abs(), resolution)


def _node_account(
    assigned: Assigned, v: Tensor, z: Tensor, passed: Mapping[Operand, Tensor], value: Any, constant: Tensor | float | None
) -> NodeAccount:
    received = v.double() * z
    shares = [share.double() * value(assigned.operands[name]) for name, share in passed.items()]
    kept = 0.0 if constant is None else float((v.double() * constant).sum())
    whole = float(received.sum())
    lost = whole - sum(float(s.sum()) for s in shares) - kept
    size = max(float(received.abs().sum()), sum(float(s.abs().sum()) for s in shares))
    return NodeAccount(assigned, whole, lost, kept, 0.0 if lost == 0 else abs(lost) / size if size else float("inf"))


def widened(assignment: Assignment, plan: Plan) -> tuple[Assignment, Plan]:
    """Returns rules and plan on a copy of the graph that computes in float64 throughout; the tensors it holds are copied."""
    module, copies = assignment.graph_module, {}
    wide = copy_graph(module)
    for old, new in zip(module.graph.nodes, wide.graph.nodes, strict=True):
        copies[old] = new
        new.args, new.kwargs = fx.node.map_aggregate((new.args, new.kwargs), _wide_type)
        if new.op == "call_function" and _makes_floats(new):
            new.kwargs = {**new.kwargs, "dtype": torch.float64}
    held = module.named_buffers(remove_duplicate=False)
    graph_module = fx.GraphModule(tree({name: t.double() if t.is_floating_point() else t for name, t in held}), wide.graph)
    rules = {
        copies[node]: dataclasses.replace(
            assigned, node=copies[node], operands={name: copies[n] for name, n in assigned.operands.items()}
        )
        for node, assigned in assignment.rules.items()
    }
    there = dataclasses.replace(
        assignment,
        graph_module=graph_module,
        sources=tuple(copies[n] for n in assignment.sources),
        rules=rules,
        carried=frozenset(copies[n] for n in assignment.carried),
        batches={copies[n]: batch for n, batch in assignment.batches.items()},
    )
    moved = dataclasses.replace(
        plan,
        result=copies[plan.result],
        wanted=tuple(copies[n] for n in plan.wanted),
        pulled=tuple(copies[n] for n in plan.pulled),
    )
    return there, moved


def _wide_type(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _makes_floats(node: fx.Node) -> bool:
    """Says whether a call makes floating-point numbers of no others, in a type that it may be told."""
    value = first_result(node.meta.get("val"))
    if not isinstance(value, Tensor) or not value.is_floating_point() or not isinstance(node.target, OpOverload):
        return False
    told = any(a.name == "dtype" for a in schema_of(node.target).arguments)
    fed = (first_result(n.meta.get("val")) for n in node.all_input_nodes)
    return told and not any(isinstance(x, Tensor) and x.is_floating_point() for x in fed)
