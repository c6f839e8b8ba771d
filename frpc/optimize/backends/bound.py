"""A program as one plain function: operators and constants are found once, and values go as soon as they are read.

A ``GraphModule`` looks up each operator and each tensor by name at every call; for a small net that is half of the time.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.graph import fetch
from frpc.core.torch_compat import OpOverload, builtin_of

__all__ = ["Program", "bound"]

Program = Callable[..., Sequence[Tensor]]

aten = torch.ops.aten
_BINDINGS: dict[Any, Callable[..., Any]] = {  # the same operators; Python's own way to them is half as long
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: Tensor.add_,
    aten.addcmul.default: torch.addcmul,
    aten.addmm.default: torch.addmm,
    aten.addmv.default: torch.addmv,
    aten.bmm.default: torch.bmm,
    aten.div.Tensor: torch.div,
    aten.div_.Tensor: Tensor.div_,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: Tensor.mul_,
    aten.mv.default: torch.mv,
    aten.permute.default: torch.permute,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.reshape.default: torch.reshape,
    aten.sub.Tensor: torch.sub,
    aten.sym_size.int: Tensor.size,
}


def bound(graph_module: fx.GraphModule) -> Program:
    """Returns ``(*inputs, seed, ...) -> results`` of a graph of calls; it holds the graph's tensors, not their names."""
    writer = _Writer(graph_module)
    source = writer.write()
    name = f"<program {id(graph_module):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # tracebacks show its lines
    scope: dict[str, Any] = dict(writer.things)
    exec(compile(source, name, "exec"), scope)  # of names and numbers that the writer made, whatever the graph's are
    program: Program = scope["program"]
    return program


class _Writer:
    """Writes a graph as a function in which every name is made here; everything else is a thing it refers to."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.things: dict[str, Any] = {}
        self._known: dict[int, str] = {}
        self._names: dict[fx.Node, str] = {}

    def write(self) -> str:
        lines, parameters = [], []
        dying = self._last_reads()
        for at, node in enumerate(self.graph_module.graph.nodes):
            if node.op == "get_attr":
                self._names[node] = self._thing(fetch(self.graph_module, str(node.target)))
                continue
            if node.op == "output":
                lines.append(f"    return {self._text(node.args[0])}")
                break
            name = self._names[node] = f"v{at}"
            if node.op == "placeholder":
                parameters.append(name)
            else:
                assert node.op == "call_function", f"{node.op} {node.name}"
                direct = builtin_of(node.target) if isinstance(node.target, OpOverload) else node.target
                target = _BINDINGS.get(node.target, direct)
                arguments = [self._text(a) for a in node.args] + [f"{k}={self._text(v)}" for k, v in node.kwargs.items()]
                lines.append(f"    {name} = {self._thing(target)}({', '.join(arguments)})")
            if ended := [self._names[n] for n in dying.get(node, ()) if n.op != "get_attr"]:
                lines.append(f"    del {', '.join(ended)}")
        return "\n".join([f"def program({', '.join(parameters)}):", *lines, ""])

    def _last_reads(self) -> dict[fx.Node, list[fx.Node]]:
        """Which values each node is the last to read; a value that nobody reads goes at once."""
        last = {used: node for node in self.graph_module.graph.nodes for used in [node, *node.all_input_nodes]}
        ends: dict[fx.Node, list[fx.Node]] = {}
        for used, node in last.items():
            if node.op != "placeholder":  # what a caller gives is the caller's
                ends.setdefault(node, []).append(used)
        return ends

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._names[value]
        if isinstance(value, tuple | list):
            inside = ", ".join(self._text(v) for v in value)
            return f"({inside}{',' * (len(value) == 1)})" if isinstance(value, tuple) else f"[{inside}]"
        return repr(value) if value is None or type(value) in (bool, int) else self._thing(value)

    def _thing(self, value: Any) -> str:
        if id(value) not in self._known:
            self._known[id(value)] = name = f"k{len(self._known)}"
            self.things[name] = value
        return self._known[id(value)]
