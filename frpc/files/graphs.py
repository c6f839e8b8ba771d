"""One compiled program as JSON and back: calls of listed operators on results above them, nothing else.

A file holds a program before it was lowered, so that any device can run it. A graph read from a file gets its operators from the
closed list and every name checked, since torch.fx writes both into Python code. Reading builds the graph and runs none of it.
"""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from frpc.core.graph import fetch
from frpc.core.torch_compat import FakeTensorMode, OpOverload, expression_of, schema_of, shape_env
from frpc.driver import printing
from frpc.files.operators import ARITHMETIC, DTYPES, may_hold, operator_named
from frpc.files.values import FaultError, integer, read_value, record, sequence, show, text, write_value

__all__ = ["MOST_NODES", "SYMBOLS", "read_program", "runnable", "write_program"]

MOST_NODES = 200_000
"""Nodes that the programs of one file may have together."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}", re.ASCII)
_TAKEN = {
    *keyword.kwlist,
    *dir(builtins),
    *("self", "torch", "device", "inf", "nan", "NoneType", "math", "operator", "pytree", "fx_pytree", "fx", "typing"),
}
_KINDS = {"placeholder": "input", "get_attr": "constant", "output": "output"}


def write_program(program: fx.GraphModule, constants: Mapping[int, str], rules: Mapping[str, str]) -> list[dict[str, Any]]:
    """Writes a program's nodes as JSON.

    Args:
        program: a program before lowering.
        constants: names of its tensors, by identity.
        rules: names of rules by node, for comments in printed code.

    Raises:
        FaultError: names every operator that the list does not have.
    """
    places: dict[fx.Node, int] = {}

    def reference(value: Any) -> dict[str, Any] | None:
        return {"node": places[value]} if isinstance(value, fx.Node) else None

    _demand_listed(program)
    symbols = _symbols(program)
    written: list[dict[str, Any]] = []
    for node in program.graph.nodes:
        places[node] = len(written)
        entry: dict[str, Any] = {"op": _KINDS.get(node.op) or _written_name(node.target), "name": node.name}
        if node.op == "get_attr":
            entry["constant"] = constants[id(fetch(program, str(node.target)))]
        elif node.op != "placeholder":
            entry["args"] = [write_value(a, reference) for a in node.args]
        if node.kwargs:
            entry["kwargs"] = {k: write_value(v, reference) for k, v in node.kwargs.items()}
        entry |= {"phase": node.meta["phase"]} if "phase" in node.meta else {}
        entry |= {"value": _written_value(node.meta.get("val"), symbols)} if node.op != "output" else {}
        for key, words in (("place", printing.place(node)), ("rule", printing.rule_name(node, rules))):
            entry |= {key: _line(words)} if words and node.op in ("call_function", "get_attr") else {}
        written.append(entry)
    return written


def _symbols(program: fx.GraphModule) -> dict[Any, int]:
    """The batch and K, as the sizes of the inputs and of the seed name them, with the numbers they are written as."""
    sizes = [n for node in program.graph.find_nodes(op="placeholder") for n in node.meta["val"].shape]
    symbols = [s for n in sizes if isinstance(n, torch.SymInt) for s in expression_of(n).free_symbols]
    batch_first = sorted(dict.fromkeys(symbols), key=symbols.index)
    return dict(zip(batch_first, SYMBOLS, strict=False))


def _written_value(value: Any, symbols: Mapping[Any, int]) -> Any:
    """Type and sizes of a result, of each where there are several; the batch and K are written as numbers that stand for them."""
    if isinstance(value, list | tuple):
        return [_written_value(v, symbols) for v in value]
    if not isinstance(value, Tensor):
        return None
    name = next(name for name, dtype in DTYPES.items() if dtype is value.dtype)
    return {"dtype": name, "sizes": [_size(n, symbols) for n in value.shape]}


def _size(size: Any, symbols: Mapping[Any, int]) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = expression_of(size)
    if not (expression.is_Symbol or expression.is_Mul) or not expression.free_symbols <= set(symbols):
        raise FaultError(f"a size of {expression}")
    return int(expression.subs(symbols))


SYMBOLS = (10007, 10009)
"""Primes that represent the batch and K in the sizes of results; sizes of tensors have no such factors."""


def _line(words: str) -> str:
    return "".join(c if c.isprintable() else " " for c in words)[:400]


def _written_name(target: Any) -> str:
    return next((name for name, function in ARITHMETIC.items() if function is target), str(target))


def _demand_listed(program: fx.GraphModule) -> None:
    calls = [n for n in program.graph.nodes if n.op not in _KINDS]
    names = {_written_name(n.target) for n in calls} - set(ARITHMETIC)
    unknown = sorted(name for name in names if not may_hold(name))
    if not unknown:
        return
    own = [name for name in unknown if not name.startswith("aten.")]
    why = "registered outside PyTorch, but a file must run where they are not registered" if own else "not allowed in a file"
    raise FaultError(f"{', '.join(own or unknown)}: {why}")


def read_program(raw: Any, constants: Collection[str], device: torch.device) -> fx.Graph:
    """Builds a program's graph; its ``get_attr`` nodes name constants, :func:`runnable` gives it those.

    Args:
        raw: parsed JSON.
        constants: names of constants.
        device: the device to run on.

    Raises:
        FaultError: something in it is not on the list, or does not hang together.
    """
    return _Reader(constants, device).build(sequence(raw, MOST_NODES))


def runnable(graph: fx.Graph, constants: Mapping[str, Tensor], device: torch.device) -> fx.GraphModule:
    """Returns a copy of a graph that runs on a device, with example values as the compiler's passes take them."""
    root, examples, copied = nn.Module(), _Examples(device), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new = copies[node] = copied.node_copy(node, lambda n: copies[n])
        new.args, new.kwargs = _on(new.args, device), _on(new.kwargs, device)
        new.meta["val"] = examples(node.meta.get("value"))
        if node.op == "get_attr":
            new.target = str(node.meta["attribute"])
            root.register_buffer(new.target, constants[str(node.target)])
    return fx.GraphModule(root, copied, class_name="Program")


def _on(value: Any, device: torch.device) -> Any:
    return fx.node.map_aggregate(value, lambda v: device if isinstance(v, torch.device) else v)


class _Examples:
    """Example values: fake tensors, with symbols for the batch and for K."""

    def __init__(self, device: torch.device) -> None:
        shapes = shape_env()
        self.mode, self.device = FakeTensorMode(shape_env=shapes), device
        self.symbols = tuple(shapes.create_unbacked_symint() for _ in SYMBOLS)
        self.known: dict[Any, Tensor] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(self(v) for v in value)
        if value is None:
            return None
        dtype, sizes = value
        key = (dtype, tuple(sizes))
        if key not in self.known:
            with self.mode:
                self.known[key] = torch.empty([self.size(n) for n in sizes], dtype=dtype, device=self.device)
        return self.known[key]

    def size(self, number: int) -> Any:
        """A size with symbols instead of the primes that represent them."""
        found: Any = 1
        for prime, symbol in zip(SYMBOLS, self.symbols, strict=True):
            while number and number % prime == 0:
                number, found = number // prime, found * symbol
        return found * number if number != 1 else found


class _Reader:
    def __init__(self, constants: Collection[str], device: torch.device) -> None:
        self.constants, self.device = constants, device
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.names: set[str] = set()

    def build(self, raw: Any) -> fx.Graph:
        for position, part in enumerate(raw):
            try:
                self._add(part, last=position == len(raw) - 1)
            except FaultError as fault:
                raise FaultError(f"{fault} (node {position})") from None
        if not self.nodes or self.nodes[-1].op != "output":
            raise FaultError("a program without an output")
        return self.graph

    def _add(self, raw: Any, last: bool) -> None:
        parts = record(raw, ("op", "name"), ("args", "kwargs", "constant", "phase", "place", "rule", "value"))
        op, name = parts["op"], self._name(parts["name"])
        if op == "input":
            node = self._input(name)
        elif op == "constant":
            node = self._constant(parts.get("constant"), name)
        elif op == "output":
            node = self._output(parts, last)
        else:
            node = self._call(op, parts, name)
        node.meta.update({key: text(parts[key], 400) for key in ("phase", "place", "rule") if key in parts})
        if "value" in parts:
            node.meta["value"] = _read_example(parts["value"])
        self.nodes.append(node)

    def _name(self, raw: Any) -> str:
        if not isinstance(raw, str) or not _NAME.fullmatch(raw) or raw.startswith("__") or raw in self.names:
            raise FaultError(f"the name {show(raw)}")
        if raw in _TAKEN and raw != "output":
            raise FaultError(f"the name {show(raw)}, which Python or torch.fx uses")
        self.names.add(raw)
        return raw

    def _input(self, name: str) -> fx.Node:
        if any(n.op not in ("placeholder",) for n in self.nodes):
            raise FaultError("an input after other nodes")
        return self.graph.create_node("placeholder", name, name=name)

    def _constant(self, constant: Any, name: str) -> fx.Node:
        if not isinstance(constant, str) or constant not in self.constants:
            raise FaultError(f"the constant {show(constant)}, which the file does not have")
        node = self.graph.create_node("get_attr", constant, name=name)
        attribute = name
        while hasattr(fx.GraphModule, attribute):
            attribute += "_"
        node.meta["attribute"] = attribute
        return node

    def _output(self, parts: Mapping[str, Any], last: bool) -> fx.Node:
        args = self._values(parts.get("args"))
        results = args[0] if len(args) == 1 and isinstance(args[0], list) else []
        if not last or len(results) < 2 or not all(isinstance(r, fx.Node) for r in results):
            raise FaultError("an output that is not a list of results, or not the last node")
        return self.graph.output(tuple(results))

    def _call(self, op: Any, parts: Mapping[str, Any], name: str) -> fx.Node:
        if not isinstance(op, str) or (op not in ARITHMETIC and not may_hold(op)):
            raise FaultError(f"the operator {show(op)}, which is not allowed in a file")
        function = operator_named(op)
        args = self._values(parts.get("args"))
        given = record(parts.get("kwargs", {}), (), _keywords(function))
        kwargs = {k: read_value(v, self._node, self.device) for k, v in given.items()}
        self._check_arguments(op, function, args)
        return self.graph.create_node("call_function", function, tuple(args), kwargs, name=name)

    def _check_arguments(self, op: str, function: Any, args: list[Any]) -> None:
        if function is operator.getitem:
            if len(args) != 2 or not isinstance(args[0], fx.Node) or type(args[1]) is not int:
                raise FaultError("operator.getitem whose arguments are not a result and a position")
        elif isinstance(function, OpOverload):
            if len(args) > len(schema_of(function).arguments):
                raise FaultError(f"{op} with {len(args)} arguments")
            if op == "aten.convolution.default":
                _check_convolution(args)
        elif len(args) != 2:
            raise FaultError(f"{op} with {len(args)} arguments")

    def _values(self, raw: Any) -> list[Any]:
        return [read_value(r, self._node, self.device) for r in sequence(raw)]

    def _node(self, kind: str, place: Any) -> fx.Node:
        if kind != "node" or type(place) is not int or not 0 <= place < len(self.nodes):
            raise FaultError(f"a reference to {kind} {show(place)}, which does not exist above it")
        return self.nodes[place]


def _keywords(function: Any) -> list[str]:
    return [a.name for a in schema_of(function).arguments] if isinstance(function, OpOverload) else []


def _check_convolution(args: list[Any]) -> None:
    """Raises an error for geometry that convolution libraries do not support."""
    stride, padding, dilation, transposed, output_padding, groups = args[3:] if len(args) == 9 else [None] * 6
    for numbers, least in ((stride, 1), (padding, 0), (dilation, 1), (output_padding, 0)):
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= 3:
            raise FaultError(f"a convolution with {show(numbers)}")
        for number in numbers:
            integer(number, least, 2**20)
    if not isinstance(transposed, bool):
        raise FaultError(f"a convolution with {show(transposed)}")
    integer(groups, 1, 2**31)


def _read_example(raw: Any, depth: int = 0) -> Any:
    """Reads type and sizes of a result, or of several."""
    if raw is None:
        return None
    if isinstance(raw, list) and depth == 0:
        return [_read_example(r, 1) for r in sequence(raw, 1000)]
    parts = record(raw, ("dtype", "sizes"))
    if not isinstance(parts["dtype"], str) or parts["dtype"] not in DTYPES:
        raise FaultError(f"a result of type {show(parts['dtype'])}")
    sizes = [integer(n, 0) for n in sequence(parts["sizes"], 64)]
    if math.prod(n or 1 for n in sizes) > 2**56:
        raise FaultError(f"a result of sizes {show(sizes)}")
    return DTYPES[parts["dtype"]], sizes
