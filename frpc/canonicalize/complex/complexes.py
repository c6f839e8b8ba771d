"""Complex operators, each as operators of the real and the imaginary part: what reaches rules is real.

``z = re + i im`` is a pair of real numbers, and every operator is written as what it does to pairs: here, and in the other files
of this folder. A Fourier transform stays one: ``view_as_real(fft(complex(re, im)))``.

An operator that is not listed stays complex, and has no rule: an error, and never a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from frpc.canonicalize.complex.arithmetic import ARITHMETIC
from frpc.canonicalize.complex.pairs import Lowering, Pair, Pairs, real_type
from frpc.canonicalize.complex.parts import PARTS
from frpc.canonicalize.complex.products import PRODUCTS
from frpc.canonicalize.complex.spectrograms import inverse_spectrogram, spectrogram
from frpc.capture.decompose import inline_composite
from frpc.core.graph import bind, first_result, is_complex, replace
from frpc.core.torch_compat import schema_of
from frpc.errors import InputError

__all__ = ["split_complex"]

aten = torch.ops.aten

# Both parts alike -----------------------------------------------------------------------------------------------------------

_ALIKE = {  # operators that do the same to the real and to the imaginary part
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default, aten.repeat.default, aten.roll.default,
    aten.flip.default, aten.rot90.default, aten.slice.Tensor, aten.select.int, aten.unfold.default, aten.diagonal.default,
    aten.tril.default, aten.triu.default, aten.diag_embed.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default, aten.dropout.default,
    aten.cat.default, aten.stack.default, aten.constant_pad_nd.default,
    aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.index_put.default, aten.index_add.default,
    aten.index_copy.default, aten.scatter.src, aten.scatter_add.default, aten.slice_scatter.default,
    aten.select_scatter.default, aten.copy.default, aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.sum.dim_IntList, aten.mean.dim, aten.cumsum.default, aten.neg.default,
    aten.resolve_conj.default, aten.resolve_neg.default, aten.zeros_like.default,
}  # fmt: skip
_VALUES = {"self", "other", "tensors", "src", "source", "value", "values", "tensor"}  # arguments that hold values
_NUMBERS = {"value"}  # and where they do as plain numbers; elsewhere numbers are sizes and dimensions


def _alike(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | None:
    """``f(z) -> (f(re), f(im))``."""
    halves: list[dict[str, Any]] = [{}, {}]
    choice = node.target in (aten.where.ScalarOther, aten.where.ScalarSelf)
    for name, value in given.items():
        holds = name in _VALUES and (isinstance(value, fx.Node | list | tuple | complex) or choice or name in _NUMBERS)
        for part, half in enumerate(halves):
            if name == "dtype" and value is not None:
                half[name] = real_type(value)
            elif not holds:
                half[name] = value
            elif isinstance(value, list | tuple):
                half[name] = [c.nodes(c.of(v))[part] for v in value]
            else:
                found = c.of(value)
                half[name] = c.nodes(found)[part] if isinstance(value, fx.Node) else found.parts[part]
    if node.target is aten.index.Tensor:  # its indices are a list, and no values
        for half in halves:
            half["indices"] = given["indices"]
    new = [_called(c, node, half) for half in halves]
    if "stops" in node.meta:
        for called in new:
            called.meta["stops"] = node.meta["stops"]
    return Pair(*new)


def _called(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    """Calls a node's operator with other arguments by name."""
    schema = schema_of(node.target).arguments
    positional = [given[a.name] for a in schema if not a.kwarg_only]
    named = {a.name: given[a.name] for a in schema if a.kwarg_only and given[a.name] != a.default_value}
    return c.call(node.target, *positional, **named)  # type: ignore[arg-type]


# Fourier transforms ---------------------------------------------------------------------------------------------------------


def _transform(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | fx.Node:
    op: Any = node.target
    z = given["self"]
    if is_complex(z):
        z = c.call(aten.complex.default, *c.nodes(c.of(z)))
    found = c.call(op, z, *node.args[1:], **node.kwargs)
    if not is_complex(found):
        return found
    both = c.call(aten.view_as_real.default, found)
    return Pair(*(c.call(aten.select.int, both, -1, part) for part in (0, 1)))


_TRANSFORMS = {aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default}


def _is_canonical(node: fx.Node) -> bool:
    """Says whether a complex node is part of ``view_as_real(fft(complex(re, im)))``."""
    if node.target is aten.complex.default:
        return all(u.target in _TRANSFORMS and _is_canonical(u) for u in node.users)
    if node.target in _TRANSFORMS:
        feed: Any = node.args[0]
        given = not is_complex(feed) or feed.target is aten.complex.default
        return given and (not is_complex(node) or all(u.target is aten.view_as_real.default for u in node.users))
    source: Any = node.args[0] if node.target is aten.view_as_real.default else None
    return source is not None and source.target in _TRANSFORMS and _is_canonical(source)


_LOWERINGS: dict[Any, Lowering] = {
    **dict.fromkeys(_ALIKE, _alike),
    **dict.fromkeys(_TRANSFORMS, _transform),
    **ARITHMETIC,
    **PARTS,
    **PRODUCTS,
    aten.stft.default: spectrogram,
    aten.istft.default: inverse_spectrogram,
}

# The pass -------------------------------------------------------------------------------------------------------------------


def split_complex(graph_module: fx.GraphModule) -> bool:
    """``f(z) -> (f_re(re, im), f_im(re, im))`` for every operator with complex operands or results.

    Raises:
        InputError: if an input of the model is complex.
    """
    if not any(_touches(n) or n.target is aten._neg_view.default for n in graph_module.graph.nodes):
        return False
    while any([_inlined(graph_module.graph, node) for node in list(graph_module.graph.nodes)]):  # noqa: C419  # all of them
        pass
    pairs, changed = Pairs(graph_module), False
    for node in list(graph_module.graph.nodes):
        if node.op == "placeholder" and is_complex(node):
            raise InputError(
                f"Input {node.name!r} is complex. Relevance is a share of real numbers: let the model take "
                "torch.view_as_real(x), and begin with torch.view_as_complex."
            )
        changed = _lower(pairs, node) or changed
    graph_module.graph.eliminate_dead_code()
    return changed


def _touches(node: fx.Node) -> bool:
    """Says whether a call's operands or results are complex."""
    return node.op in ("call_function", "placeholder") and (is_complex(node) or any(is_complex(n) for n in node.all_input_nodes))


def _inlined(graph: fx.Graph, node: fx.Node) -> bool:
    """Spells out an operator that PyTorch composes of others, such as ``einsum``."""
    return node.op == "call_function" and _touches(node) and node.target not in _LOWERINGS and inline_composite(graph, node)


def _lower(pairs: Pairs, node: fx.Node) -> bool:
    if node.target is aten._neg_view.default:  # the imaginary part of a conjugate, before it is looked at
        pairs.at(node)
        replace(node, pairs.call(aten.neg.default, node.args[0]))
        return True
    if node.op != "call_function" or not _touches(node) or _is_canonical(node):
        return False
    pairs.at(node)
    lowering = _LOWERINGS.get(node.target)
    found = lowering(pairs, node, bind(node.target, node.args, node.kwargs)) if lowering else None  # type: ignore[arg-type]
    if found is None:  # it stays complex, and its operands with it; what only asks for sizes gets those of the real part
        sized = not isinstance(first_result(node.meta["val"]), Tensor)
        for operand in [n for n in node.all_input_nodes if n in pairs.found]:
            parts = pairs.nodes(pairs.found[operand])
            node.replace_input_with(operand, parts[0] if sized else pairs.call(aten.complex.default, *parts))
    elif isinstance(found, fx.Node):
        replace(node, found)
    else:
        value = node.meta["val"]
        assert isinstance(value, Tensor)
        pairs.found[node] = _named(pairs, node, pairs.fitted(found, value))
    return found is not None


def _named(pairs: Pairs, node: fx.Node, pair: Pair) -> Pair:
    """Lets a module's complex output be known by the module's name, as pairs along a last dimension."""
    if not node.meta.get("layers"):
        return pair
    both = pairs.stacked(pair)
    both.meta["layers"] = node.meta.pop("layers")
    return Pair(*(pairs.call(aten.select.int, both, -1, part) for part in (0, 1)))
