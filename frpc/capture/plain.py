"""A program of ``torch.export`` as one plain graph, which remembers where each node came from.

Placeholders are the inputs, ``get_attr`` nodes the parameters and buffers. There is one output tensor, the one to be explained.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from frpc.capture import tracing
from frpc.capture.tracing import Traced
from frpc.core import stopped
from frpc.core.graph import Origin, describe, name_layers, origin_of
from frpc.core.reasons import without_warnings
from frpc.core.stopped import settle
from frpc.core.torch_compat import HigherOrderOperator
from frpc.errors import Gap, UnsupportedOpError

__all__ = ["plain_graph"]

_MODEL = "model."  # what torch.export puts before the names of a model inside Traced


def plain_graph(program: ExportedProgram, traced: Traced) -> tuple[fx.Graph, dict[str, Any]]:
    """Rebuilds the exported graph with parameters as ``get_attr`` nodes and the explained tensor as its only output.

    Returns the graph and the tensors that its ``get_attr`` nodes name.

    Raises:
        UnsupportedOpError: if an operator runs functions that it is given.
    """
    graph = fx.Graph()
    constants: dict[str, Any] = {}
    kinds = {s.arg.name: s for s in program.graph_signature.input_specs}
    copies: dict[fx.Node, fx.Node] = {}
    explained, *returned = _results(program)
    names, noted = _input_names(traced, program), set(returned)
    for node in program.graph.nodes:
        if node.op == "placeholder" and kinds[node.name].kind is not InputKind.USER_INPUT:
            target = kinds[node.name].target
            assert target is not None
            name = target.removeprefix(_MODEL)
            constants[name] = _constant(program, target)
            with without_warnings("Attempted to insert a get_attr Node"):
                copies[node] = graph.get_attr(name)
            copies[node].meta = dict(node.meta)
        elif node.op == "placeholder":
            copies[node] = graph.placeholder(names.pop(0))
            copies[node].meta = dict(node.meta)
        elif node.op == "output":
            graph.output(copies[explained])
        elif node not in noted:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta["origin"] = _origin(node)
    _refuse_control_flow(graph)
    settle(graph)
    name_layers([(copies[_noted(note)], _origin(note).module) for note in returned], traced.returned)
    graph.eliminate_dead_code()  # what only the copies used, and other outputs
    return graph, constants


def _noted(copied: fx.Node) -> fx.Node:
    """The node that a copy was taken of; where autograd does not follow, the copy is marked."""
    copied = copied.args[0] if copied.target is torch.ops.frpc.stop.default else copied  # type: ignore[assignment]
    assert copied.target is torch.ops.aten.clone.default and isinstance(copied.args[0], fx.Node)
    return copied.args[0]


def _results(program: ExportedProgram) -> list[Any]:
    """The nodes of the explained tensor and of the copies of what modules returned."""
    specs, node = program.graph_signature.output_specs, program.graph.output_node()
    return [a for a, s in zip(node.args[0], specs, strict=True) if s.kind is OutputKind.USER_OUTPUT]


def _input_names(traced: Traced, program: ExportedProgram) -> list[str]:
    """Names the inputs as the model's ``forward`` does."""
    if traced.names:
        return list(traced.names)
    count = sum(s.kind is InputKind.USER_INPUT for s in program.graph_signature.input_specs)
    names: list[str] = []
    for parameter in inspect.signature(traced.model.forward).parameters.values():
        several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{parameter.name}_{i}" for i in range(count - len(names))] if several else [parameter.name]
    return names[:count]


def _refuse_control_flow(graph: fx.Graph) -> None:
    """Raises an error for operators that take functions (``torch.cond``, ``while_loop``): what they run is not in the graph.

    Raises:
        UnsupportedOpError: naming all whose results are used.
    """
    calls = [n for n in graph.nodes if n.op == "call_function"]
    found = [n for n in calls if isinstance(n.target, HigherOrderOperator) and n.users]
    if found:
        reason = "it runs functions that it is given, which frpc does not look into"
        places = [(n, origin_of(n)) for n in found]
        gaps = [Gap(n.name, str(n.target), reason, o.module, o.where, o.source, describe(n.meta.get("val"))) for n, o in places]
        raise UnsupportedOpError(gaps, len(calls))


def _constant(program: ExportedProgram, target: str) -> Any:
    value = program.state_dict[target] if target in program.state_dict else program.constants[target]
    return value.detach() if isinstance(value, Tensor) else value


def _origin(node: fx.Node) -> Origin:
    paths = [entry[0].removeprefix(_MODEL) for entry in node.meta.get("nn_module_stack", {}).values()]
    modules = tuple(path for path in paths if path not in ("", _MODEL.removesuffix(".")))
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
    frames = [f for f in frames if not f[0].startswith((tracing.__file__, stopped.__file__, "<eval_with_key>"))]
    user = [f for f in frames if not f[0].startswith(f"{torch.__path__[0]}/nn/")] or frames
    file, line, source = user[-1] if user else ("", "0", "")
    return Origin(modules[-1] if modules else "", modules, file, int(line), source.strip(), node.target)
