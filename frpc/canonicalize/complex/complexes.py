"""Complex operators, each as operators of the real and the imaginary part: what reaches rules is real.

``z = re + i im`` is a pair of real numbers, and every operator below is written as what it does to pairs. Products of matrices
stay one product each for the real and the imaginary part, ``re = [ar ai] [br; -bi]`` and ``im = [ar ai] [bi; br]``, so that
rules which look at all that a neuron adds up still do. A Fourier transform stays one: ``view_as_real(fft(complex(re, im)))``.

An operator that is not listed stays complex, and has no rule: an error, and never a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from frpc.canonicalize.complex.pairs import Pair, Pairs, Part, is_complex, real_type
from frpc.canonicalize.complex.spectrograms import inverse_spectrogram, spectrogram
from frpc.capture.decompose import inline_composite
from frpc.core.graph import bind, first_result, replace
from frpc.core.torch_compat import schema_of
from frpc.errors import InputError

__all__ = ["split_complex"]

aten = torch.ops.aten
Lowering = Callable[[Pairs, fx.Node, dict[str, Any]], Pair | fx.Node | None]

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


# Arithmetic -----------------------------------------------------------------------------------------------------------------


def _sum(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    first, second = ("other", "self") if "rsub" in str(node.target) else ("self", "other")
    a, b, alpha = c.of(given[first]), c.of(given[second]), given.get("alpha", 1)
    combine = c.add if "add" in str(node.target) else c.sub
    return Pair(*(combine(x, y, alpha) for x, y in zip(a.parts, b.parts, strict=True)))


def _times(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return c.product(c.of(given["self"]), c.of(given["other"]))


def _over(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return c.quotient(c.of(given["self"]), c.of(given["other"]))


def _power(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | None:
    """A small whole power as a product, another as ``|z|^p`` at p times the angle."""
    z, p = c.of(given["self"]), given.get("exponent", 2)
    if isinstance(p, complex):
        return None
    if p in (1, 2, 3, 4):
        found = z
        for _ in range(int(p) - 1):
            found = c.product(found, z)
        return found
    size = c.call(aten.pow.Tensor_Scalar, c.length(z), p)
    return c.polar(size, c.mul(c.angle(z), p))


def _root(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    z = c.of(given["self"])
    return c.polar(c.call(aten.sqrt.default, c.length(z)), c.mul(c.angle(z), 0.5))


def _exponential(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    z = c.of(given["self"])
    size: Part = c.call(aten.exp.default, z.re) if isinstance(z.re, fx.Node) else float(torch.tensor(z.re).exp())
    return Pair(size, 0) if z.im == 0 else c.polar(size, z.im)


def _logarithm(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    z = c.of(given["self"])
    return Pair(c.call(aten.log.default, c.length(z)), c.angle(z))


def _direction(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    """``z / |z|``, and 0 at 0."""
    z = c.of(given["self"])
    size = c.length(z)
    divisor = c.call(aten.where.ScalarSelf, c.call(aten.eq.Scalar, size, 0), 1.0, size)
    return Pair(c.div(z.re, divisor), c.div(z.im, divisor))


def _crossed(first: tuple[Any, Any], second: tuple[Any, Any], sign: float) -> Lowering:
    """Functions of the sum of a real and an imaginary argument: ``(f(a) g(b), sign h(a) k(b))``."""

    def lower(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
        a, b = c.nodes(c.of(given["self"]))
        re, im = (c.mul(c.call(f, a), c.call(g, b)) for f, g in (first, second))
        return Pair(re, c.mul(im, sign))

    return lower


# Parts ----------------------------------------------------------------------------------------------------------------------


def _conjugate(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    z = c.of(given["self"])
    return Pair(z.re, c.neg(z.im))


def _joined(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return Pair(given["real"], given["imag"])


def _seen_as_complex(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return Pair(*(c.call(aten.select.int, given["self"], -1, part) for part in (0, 1)))


def _seen_as_real(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    """A part that is read alone is that part; what reads both gets them side by side."""
    pair, last = c.of(given["self"]), node.meta["val"].dim() - 1
    for user in list(node.users):
        if user.target is aten.select.int and user.args[1] in (-1, last):
            c.at(user)
            replace(user, c.nodes(pair)[int(user.args[2])])  # type: ignore[arg-type]
    c.at(node)
    return c.stacked(pair)


def _length(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    z = c.of(given["self"])
    return c.node(c.length(z), z.re if isinstance(z.re, fx.Node) else z.im)


def _angle(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    found = c.angle(c.of(given["self"]))
    assert isinstance(found, fx.Node)
    return found


def _polar(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return c.polar(given["abs"], given["angle"])


def _cast(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | fx.Node | None:
    """To another complex type, from a real one, or to a real one, which drops the imaginary part."""
    dtype = given["dtype"]
    if dtype is None:
        return None
    z = c.of(given["self"])
    parts = [_typed(c, p, real_type(dtype)) for p in z.parts]
    return Pair(*parts) if dtype.is_complex else c.node(parts[0], parts[1])


def _typed(c: Pairs, part: Part, dtype: torch.dtype) -> Part:
    same = not isinstance(part, fx.Node) or part.meta["val"].dtype is dtype
    return part if same else c.call(aten._to_copy.default, part, dtype=dtype)


def _reread(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | fx.Node | None:
    """``z.view(float)``: parts side by side, and back."""
    before, after = given["self"].meta["val"].dtype, given["dtype"]
    if before.is_complex and after is real_type(before):
        return c.call(aten.flatten.using_ints, c.stacked(c.of(given["self"])), -2, -1)
    if after.is_complex and before is real_type(after):
        both = c.call(aten.unflatten.int, given["self"], -1, [node.meta["val"].shape[-1], 2])
        return _seen_as_complex(c, node, {"self": both})
    return None


def _filled(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    """``full``, ``zeros``, ``ones`` and the like of a complex type."""
    halves = []
    for part in (0, 1):
        named = {**node.kwargs, "dtype": real_type(node.meta["val"].dtype)}
        args: list[Any] = [c.of(a).parts[part] if isinstance(a, complex) else a for a in node.args]
        args = [c.nodes(c.of(a))[0] if isinstance(a, fx.Node) and is_complex(a) else a for a in args]
        halves.append(c.call(node.target, *args, **named))  # type: ignore[arg-type]
    complex_fill = any(isinstance(a, complex) for a in node.args)
    return Pair(halves[0], halves[1] if complex_fill else 0)


def _equal(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    a, b, differ = c.of(given["self"]), c.of(given["other"]), "ne." in str(node.target)
    both = [_compared(c, x, y, differ) for x, y in zip((c.nodes(a)), b.parts, strict=True)]
    return c.call(aten.bitwise_or.Tensor if differ else aten.bitwise_and.Tensor, *both)


def _compared(c: Pairs, x: fx.Node, y: Part, differ: bool) -> fx.Node:
    if isinstance(y, fx.Node):
        return c.call(aten.ne.Tensor if differ else aten.eq.Tensor, x, y)
    return c.call(aten.ne.Scalar if differ else aten.eq.Scalar, x, y)


def _vector_norm(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    z = c.of(given["self"])
    size = c.node(c.length(z), z.re)
    order = given["ord"] if "ord" in given else 2 if given["p"] is None else given["p"]
    return c.call(aten.linalg_vector_norm.default, size, order, given["dim"], given["keepdim"])


# Products of matrices and convolutions --------------------------------------------------------------------------------------


def _combined(c: Pairs, a: Pair, b: Pair, along: tuple[int, int], multiply: Callable[[fx.Node, fx.Node, int], fx.Node]) -> Pair:
    """A bilinear operator of pairs; where both are complex, ``[ar ai]`` by ``[br; -bi]`` and by ``[bi; br]``.

    Args:
        along: the dimension of each operand that the operator sums over.
        multiply: calls it, for part 0 (real) or 1 (imaginary) of the result.
    """
    if a.im == 0 and b.im == 0:
        return Pair(multiply(*_both(a.re, b.re), 0), 0)
    if a.im == 0:
        return Pair(*(multiply(*_both(a.re, p), i) for i, p in enumerate(c.nodes(b))))
    if b.im == 0:
        return Pair(*(multiply(*_both(p, b.re), i) for i, p in enumerate(c.nodes(a))))
    left = c.call(aten.cat.default, list(c.nodes(a)), along[0])
    re, im = c.nodes(b)
    columns = ([re, c.call(aten.neg.default, im)], [im, re])
    return Pair(*(multiply(left, c.call(aten.cat.default, part, along[1]), i) for i, part in enumerate(columns)))


def _both(a: Part, b: Part) -> tuple[fx.Node, fx.Node]:
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return a, b


def _matrix_product(first: str, second: str, added: str = "") -> Lowering:
    def lower(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | None:
        op: Any = node.target
        if any(isinstance(given.get(k), complex) for k in ("alpha", "beta")):
            return None
        a, b, extra = c.of(given[first]), c.of(given[second]), {k: given[k] for k in ("beta", "alpha") if k in given}
        rank = given[second].meta["val"].dim()
        more = c.nodes(c.of(given[added])) if added else ()
        along = (-1, -1 if rank == 1 else -2)
        return _combined(c, a, b, along, lambda x, y, i: c.call(op, *([more[i]] if added else []), x, y, **extra))

    return lower


def _linear(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    bias = (None, None) if given["bias"] is None else c.nodes(c.of(given["bias"]))
    a, weight = c.of(given["input"]), c.of(given["weight"])
    return _combined(c, a, weight, (-1, -1), lambda x, y, i: c.call(aten.linear.default, x, y, bias[i]))


def _convolution(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | None:
    if given["groups"] != 1:
        return None
    bias = (None, None) if given["bias"] is None else c.nodes(c.of(given["bias"]))
    rest = [given[k] for k in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
    a, weight, along = c.of(given["input"]), c.of(given["weight"]), (1, 0 if given["transposed"] else 1)
    return _combined(c, a, weight, along, lambda x, y, i: c.call(aten.convolution.default, x, y, bias[i], *rest))


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
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor), _sum),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _times),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _over),
    aten.reciprocal.default: lambda c, node, given: c.quotient(Pair(1.0, 0), c.of(given["self"])),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.square.default), _power),
    aten.sqrt.default: _root,
    aten.exp.default: _exponential,
    aten.log.default: _logarithm,
    aten.sgn.default: _direction,
    aten.sin.default: _crossed((aten.sin.default, aten.cosh.default), (aten.cos.default, aten.sinh.default), 1),
    aten.cos.default: _crossed((aten.cos.default, aten.cosh.default), (aten.sin.default, aten.sinh.default), -1),
    aten.sinh.default: _crossed((aten.sinh.default, aten.cos.default), (aten.cosh.default, aten.sin.default), 1),
    aten.cosh.default: _crossed((aten.cosh.default, aten.cos.default), (aten.sinh.default, aten.sin.default), 1),
    **dict.fromkeys((aten._conj.default, aten.conj_physical.default, aten._conj_physical.default), _conjugate),
    aten.complex.default: _joined,
    aten.polar.default: _polar,
    aten.view_as_complex.default: _seen_as_complex,
    aten.view_as_real.default: _seen_as_real,
    aten.real.default: lambda c, node, given: c.nodes(c.of(given["self"]))[0],
    aten.imag.default: lambda c, node, given: c.nodes(c.of(given["self"]))[1],
    aten.abs.default: _length,
    aten.angle.default: _angle,
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype), _cast),
    aten.view.dtype: _reread,
    **dict.fromkeys(
        (aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.full_like.default), _filled
    ),
    **dict.fromkeys((aten.ones_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), _filled),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar), _equal),
    **dict.fromkeys((aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim), _vector_norm),
    **dict.fromkeys((aten.mm.default, aten.bmm.default), _matrix_product("self", "mat2")),
    aten.matmul.default: _matrix_product("self", "other"),
    aten.mv.default: _matrix_product("self", "vec"),
    aten.addmm.default: _matrix_product("mat1", "mat2", "self"),
    aten.baddbmm.default: _matrix_product("batch1", "batch2", "self"),
    aten.linear.default: _linear,
    aten.convolution.default: _convolution,
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
