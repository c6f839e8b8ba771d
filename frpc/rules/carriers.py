"""Which operands carry relevance: from the sources forward, from the output back, and products that take one factor as a gate.

A call carries if one of its *carrying operands* does. Of a product of two carried values one factor may be a *gate*: a number in
(0, 1), a norm or what those are made of. It says how much of the other passes, so relevance goes to the other alone (method §2,
products).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import fx

from frpc.core.graph import bind, first_result, origin_of
from frpc.core.patterns import inside
from frpc.core.stopped import stopped_by
from frpc.core.torch_compat import OpOverload
from frpc.errors import LayerNameError, OptionError, nearest
from frpc.rules.table import TABLE, Operand, traits_of

__all__ = [
    "EMBEDDING_BAGS",
    "PRODUCTS",
    "Product",
    "carrying_operands",
    "find_sources",
    "is_first_result",
    "may_carry",
    "operands_of",
]

aten = torch.ops.aten

Product = Literal["auto", "half", "gate", "all"]
"""How a product of two carried values is shared: see :class:`frpc.rules.FRP`; ``all``: nothing is taken off, divisors neither."""

PRODUCTS: tuple[Product, ...] = ("auto", "half", "gate")


EMBEDDING_BAGS = {aten._embedding_bag.default, aten._embedding_bag_forward_only.default}


def operands_of(node: fx.Node) -> dict[Operand, fx.Node]:
    """Names every node argument of a call: by schema name, or name and position inside a list."""
    assert isinstance(node.target, OpOverload)
    found: dict[Operand, fx.Node] = {}
    for name, value in bind(node.target, node.args, node.kwargs).items():
        if isinstance(value, fx.Node):
            found[name] = value
        elif isinstance(value, list | tuple):
            found.update({(name, i): v for i, v in enumerate(value) if isinstance(v, fx.Node)})
    return found


def read_by(node: fx.Node) -> list[fx.Node]:
    """Returns the nodes whose values a call reads, and not their shapes and types alone."""
    if not isinstance(node.target, OpOverload):
        return node.all_input_nodes
    ignored = traits_of(node.target).ignores
    return [n for name, n in operands_of(node).items() if name not in ignored]


def may_carry(node: fx.Node, carried: Collection[fx.Node], constant: Sequence[str]) -> bool:
    """Says whether a call's result depends on carried values by more than their shapes."""
    first = first_result(node.meta.get("val"))
    if not isinstance(first, torch.Tensor):
        return False
    if not (first.is_floating_point() or first.is_complex()):  # complex values carry: what has no rule for them is an error
        return False
    if stopped_by(node) == "":
        return False
    modules = origin_of(node).modules or ("",)
    if any(inside(path, pattern) for pattern in constant for path in modules):
        return False
    return any(argument in carried for argument in read_by(node))


def carrying_operands(node: fx.Node, carried: Collection[fx.Node], product: Product) -> dict[Operand, fx.Node]:
    """Returns the operands relevance goes to: the carried ones, less gates and denominators.

    Args:
        node: a call of an ATen operator.
        carried: nodes that carry relevance.
        product: how products of two carried values are shared.
    """
    traits = traits_of(node.target)
    operands = {name: n for name, n in operands_of(node).items() if n in carried and name not in traits.ignores}
    if product == "all":
        return operands
    if node.target is aten.div.Tensor and {"self", "other"} <= operands.keys():
        del operands["other"]
    first, second = traits.factors or ("", "")
    if first in operands and second in operands and product != "half":
        gates = [name for name in (second, first) if _is_gate(operands[name], carried)]
        if len(gates) == 1:
            del operands[gates[0]]
        elif product == "gate" and operands[first] is not operands[second]:
            del operands[second]
    return operands


def _is_gate(node: fx.Node, carried: Collection[fx.Node]) -> bool:
    """Says whether a value is a sigmoid, a softmax, a norm or the like, up to views and constants."""
    while traits_of(node.target).passes_gates:
        feeds = [n for n in node.all_input_nodes if n in carried]
        if len(feeds) != 1:
            return False
        node = feeds[0]
    return traits_of(node.target).gate


def find_sources(graph: fx.Graph, asked: Sequence[str] | None) -> tuple[fx.Node, ...]:
    """Returns the nodes that get relevance, in graph order.

    Args:
        graph: a canonical graph.
        asked: ``"input"`` or module paths; None means the floating-point inputs, and for integer inputs the embeddings they
            index.

    Raises:
        LayerNameError: if a path names no layer.
        OptionError: if nothing can be a source.
    """
    placeholders = graph.find_nodes(op="placeholder")
    floating = [n for n in placeholders if n.meta["val"].is_floating_point()]
    if asked is None:
        tokens = _token_embeddings(graph, [n for n in placeholders if n not in floating])
        if not (floating or tokens):
            raise OptionError(
                "No input is floating-point and none indexes an embedding, so there is nothing to assign relevance to. Give the "
                "module whose output should get the relevance: source='path.of.module'."
            )
        return tuple(floating + tokens)
    found = [n for name in asked for n in (floating if name == "input" else [_layer(graph, name)])]
    if not found:
        raise OptionError(
            'source="input": no input is floating-point; give the module that converts it to floating-point numbers.'
        )
    return tuple(n for n in graph.nodes if n in found)


def _layer(graph: fx.Graph, name: str) -> fx.Node:
    known = {layer: node for node in graph.nodes for layer in node.meta.get("layers", ())}
    if name not in known:
        raise LayerNameError(f"source={name!r}: the model has no such layer; {nearest(name, list(known))}.")
    if not first_result(known[name].meta["val"]).is_floating_point():
        raise OptionError(
            f"source={name!r}: its output is {known[name].meta['val'].dtype}, but relevance is defined only for real numbers."
        )
    return known[name]


def _token_embeddings(graph: fx.Graph, integers: Sequence[fx.Node]) -> list[fx.Node]:
    """Finds the embeddings that integer inputs index, moved about but not computed with."""
    tokens = set(integers)
    found = []
    for node in graph.nodes:
        if node.target is aten.embedding.default and node.args[1] in tokens:
            found.append(node)
        elif node.target in EMBEDDING_BAGS and node.args[1] in tokens:
            place = origin_of(node)
            raise OptionError(
                f"EmbeddingBag gets one list of tokens and offsets here, so there is no batch of samples to explain:\n"
                f"    {place.module or '(top level)'}   {place.where}   {place.source}\n"
                "  Pass a batch of bags instead, [B, L], with the shorter ones padded with its padding_idx: then every token "
                "has relevance, [B, L, D]."
            )
        elif traits_of(node.target).keeps_tokens and not first_result(node.meta["val"]).is_floating_point():
            tokens.update([node] if any(n in tokens for n in _moved(node)) else [])
    return found


def _moved(node: fx.Node) -> list[fx.Node]:
    """The operands whose elements a call moves; those that say where to, such as indices and masks, are not among them."""
    rule = TABLE.get(node.target)
    names = () if rule is None else rule.carries
    return [n for name, n in operands_of(node).items() if (name if isinstance(name, str) else name[0]) in names]


def is_first_result(node: fx.Node) -> bool:
    """Says whether a node reads the first result of an operator with several."""
    return node.target is operator.getitem and bool(node.args[1] == 0)
