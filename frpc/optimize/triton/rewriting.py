"""One program while its patterns become kernels: each method replaces one kind and says where it did not and why."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from frpc.core.editor import Editor
from frpc.core.graph import fetch, replace
from frpc.core.refusal import Refusal
from frpc.core.sizes import same_sizes
from frpc.optimize.triton.norms import centred_pulls, layer_scales, pulls, rms_norms, written_out
from frpc.optimize.triton.patterns import (
    alike,
    belongs,
    gate_readers,
    is_convolution,
    is_sample_of,
    made_by,
    normal_cdfs,
    operands,
    pool_arguments,
    readers_of,
    reshape_sizes,
    scatters,
    sigmoids,
    split_sum,
)
from frpc.rules.table import traits_of

__all__ = ["Rewriting"]

aten = torch.ops.aten
_POOL_BACK = aten.max_pool2d_with_indices_backward.default


class Rewriting:
    """One program while its patterns are replaced.

    Attributes:
        refused: what was not done.
    """

    def __init__(self, program: fx.GraphModule, parts: dict[str, Any], precision: str) -> None:
        self.program, self.parts, self.precision = program, parts, precision
        self.ops: Any = torch.ops.frpc_kernels
        self.refused: list[Refusal] = []
        self.known: dict[str, fx.Node] = {}  # symbolic size -> who gives it

    def put(self, before: fx.Node, op: Any, *args: Any) -> fx.Node:
        """Adds a call before a node, with that node's place in the printed program."""
        new = Editor(self.program, before).call(op, *args)
        new.meta |= {key: before.meta[key] for key in ("phase", "of") if key in before.meta}
        return new

    def put_items(self, before: fx.Node, op: Any, *args: Any) -> tuple[fx.Node, fx.Node]:
        """Adds a call with two results."""
        both = self.put(before, op, *args)
        return self.put(before, operator.getitem, both, 0), self.put(before, operator.getitem, both, 1)

    def refuse(self, kernel: str, node: fx.Node, why: str) -> None:
        self.refused.append(Refusal(f"the kernel {kernel}", node.name, why))

    def all(self, *targets: Any) -> Iterator[fx.Node]:
        yield from [node for node in self.program.graph.nodes if node.target in targets]

    def first(self, *nodes: fx.Node) -> fx.Node:
        return min(nodes, key=[*self.program.graph.nodes].index)

    def fuse(self, reader: fx.Node, views: list[fx.Node], op: Any, *args: Any) -> None:
        """Puts a kernel in place of ``reader``, and behind it the views that lay between ``reader`` and what it swallows."""
        new = self.put(reader, op, *args)
        for view in views:
            new = self.put(reader, aten.reshape.default, new, reshape_sizes(view))
        replace(reader, new)

    def sizes(self) -> None:
        """The same symbolic size is asked for once, of an input if one has it: who reads a value's size is no reader of it."""
        for node in self.all(aten.sym_size.int):
            known = self.known.setdefault(str(node.meta["val"]), node)
            if known is not node:
                replace(node, known)
        *_, last = self.program.graph.find_nodes(op="placeholder") or [None]
        for node in self.known.values():
            if last is not None and operands(node)[0].op == "placeholder":
                last.append(node)

    def columns_of(self, v: fx.Node, before: fx.Node) -> fx.Node:
        """How many columns a value has."""
        known = self.known.get(str(v.meta["val"].shape[0]))
        if known is not None and operands(known)[0].op == "placeholder":
            return known
        return self.put(before, aten.sym_size.int, v, 0)

    # ---- max pooling

    def poolings(self) -> None:
        """``max_pool -> select``, ``max_pool_backward, scatter_add -> scatter``: winners in 32 bits, sums in fixed order."""
        for pool in self.all(aten.max_pool2d_with_indices.default):
            x, *geometry = pool_arguments(pool)
            items = {operands(user)[1]: user for user in pool.users}
            readers = list(readers_of(items[1])) if 1 in items else []
            strange = next((r for r in readers if not self.carries_back(r, pool) and not scatters(r, pool)), None)
            reason = self.ask("pool_select", x)
            if not readers:
                reason = "nothing asks for its winners"
            elif strange is not None:
                reason = f"its winners are read by {strange.name}, {strange.target}"
            if reason:
                self.refuse("pool_select", pool, reason)
                continue
            y, winner = self.put_items(pool, self.ops.pool_select.default, x, *geometry)
            size = [int(n) for n in x.meta["val"].shape[2:]]
            for back in readers:
                g = operands(back)[0] if back.target is _POOL_BACK else operands(back)[3].args[0]
                flat = self.flat(back, g, 4)
                out = self.put(back, self.ops.pool_scatter.default, flat, winner, None, size, *geometry[:-1])
                replace(back, self.unflat(back, out, g, [int(n) for n in back.meta["val"].shape[g.meta["val"].dim() - 3 :]]))
            if 0 in items:
                replace(items[0], y)
            self.program.graph.eliminate_dead_code()

    def carries_back(self, reader: fx.Node, pool: fx.Node) -> bool:
        """Whether a call is the transpose of a pool, into an image of the size that was pooled."""
        if reader.target is not _POOL_BACK or len(operands(reader)) != 8:
            return False
        _, image, *_, winners = operands(reader)
        return alike(image, operands(pool)[0]) and winners.target is operator.getitem and operands(winners) == (pool, 1)

    def flat(self, before: fx.Node, v: fx.Node, rank: int) -> fx.Node:
        """``[K, B, ...] -> [K B, ...]``, where there are columns."""
        value = v.meta["val"]
        if value.dim() == rank:
            return v
        inner: fx.Node | None = operands(v)[0] if traits_of(v.target).reshapes else None
        if inner is not None and same_sizes(inner.meta["val"].shape[1:], value.shape[2:]):
            return inner
        return self.put(before, aten.reshape.default, v, [-1, *(int(n) for n in value.shape[2:])])

    def unflat(self, before: fx.Node, out: fx.Node, columns: fx.Node, sizes: list[int]) -> fx.Node:
        """``[K B, ...] -> [K, B, *sizes]`` where ``columns`` has columns, else ``[B, *sizes]``."""
        value = out.meta["val"]
        if columns.meta["val"].dim() == value.dim():
            same = [int(n) for n in value.shape[1:]] == sizes
            return out if same else self.put(before, aten.reshape.default, out, [-1, *sizes])
        return self.put(before, aten.reshape.default, out, [self.columns_of(columns, before), -1, *sizes])

    # ---- gates of ReLUs

    def gates(self) -> None:
        """``r = relu(z)`` read by ``threshold_backward(v, r, 0)`` or ``v * (r > 0)``: bits, and what reads them."""
        for relu in self.all(aten.relu.default, aten.relu_.default):
            if next(gate_readers(relu), None) is None:
                continue
            z = operands(relu)[0]
            if reason := self.ask("gate", z):
                self.refuse("gate", relu, reason)
                continue
            a, bits = self.put_items(relu, self.ops.relu_gate.default, z)
            replace(relu, a)
            while (found := next(gate_readers(a), None)) is not None:  # one after another: a gate may close what another gave
                self.close(*found, bits, a.meta["val"])
            self.program.graph.eliminate_dead_code()

    def close(self, reader: fx.Node, v: fx.Node, bits: fx.Node, gate: Any) -> None:
        """Puts bits into the kernel that made v, where nothing else reads it, or multiplies."""
        base, views = made_by(v)
        if self.transpose(reader, v, bits, None, gate):
            return
        if base is not None and base.target is self.ops.pool_scatter.default and belongs(base.meta["val"], gate):
            g, winner, _, *geometry = operands(base)
            self.fuse(reader, views, base.target, g, winner, bits, *geometry)
            return
        if is_convolution(base, transposed=False):
            self.refuse("conv_relevance", base, "it multiplies by a coefficient; a ReLU's bits are read in a separate launch")
        out = self.put(reader, self.ops.gated.default, self.flat(reader, v, gate.dim()), bits)
        replace(reader, self.unflat(reader, out, v, [int(n) for n in gate.shape[1:]]))

    # ---- convolutions

    def transpose(self, reader: fx.Node, v: fx.Node, bits: fx.Node | None, factor: fx.Node | None, gate: Any = None) -> bool:
        """``(conv_transposed(g, K) + d) * [bit] * f`` in one pass, where v is that sum or the convolution alone; else False.

        Args:
            gate: the value that bits are of.
        """
        whole, views = made_by(v)
        for one, other in [(v, None), *split_sum(whole)]:
            base, inner = made_by(one)
            if not is_convolution(base, transposed=True):
                continue
            same = factor is None or is_sample_of(base, factor)
            same = same and (gate is None or belongs(base.meta["val"], gate))
            if not same or not (other is None or belongs(other.meta["val"], base.meta["val"])):
                continue  # a view between them has other channels
            g, weight, bias, stride, padding, dilation, _, output_padding, groups = operands(base)
            addend = None if other is None else self.flat(reader, other, 4)
            reason = self.ask("conv_transposed_gate", g, weight, addend, factor, more=(groups,))
            reason = "it adds a bias" if bias is not None else reason
            if reason:
                self.refuse("conv_transposed_gate", base, reason)
                continue
            geometry = (stride, padding, output_padding, dilation, groups, self.precision)
            op, weight = self.ops.conv_transposed_gate.default, self.weight(base)
            self.fuse(reader, [*inner, *views] if other is not None else views, op, g, weight, addend, bits, factor, *geometry)
            return True
        return False

    def products(self) -> None:
        """``conv_transposed(v, K) * f`` and ``conv(v, K) * c`` in one pass."""
        for product in self.all(aten.mul.Tensor, aten.mul_.Tensor):
            for v, factor in (operands(product), operands(product)[::-1]):
                base, views = made_by(v)
                if not isinstance(factor, fx.Node) or base is None or factor is v or not alike(v, product):
                    continue
                if self.transpose(product, v, None, factor):
                    break
                if not is_convolution(base, transposed=False) or not is_sample_of(base, factor):
                    continue
                if reason := self.cannot_convolve(base, factor):
                    self.refuse("conv_relevance", base, reason)
                    continue
                self.fuse(product, views, self.ops.conv_relevance.default, *self.convolved(base, factor))
                break
        self.program.graph.eliminate_dead_code()

    def cannot_convolve(self, base: fx.Node, factor: fx.Node) -> str | None:
        v, weight, bias, *_, groups = operands(base)
        return self.ask("conv_relevance", v, weight, bias, factor, more=(groups,))

    def ask(self, kernel: str, *nodes: fx.Node | None, more: tuple[Any, ...] = ()) -> str | None:
        """Why a kernel declines these operands."""
        values = [None if node is None else node.meta["val"] for node in nodes]
        reason = self.parts[kernel].supports(*values, *more)
        return None if reason is None else str(reason)

    def convolved(self, base: fx.Node, factor: fx.Node) -> tuple[Any, ...]:
        x, _, bias, stride, padding, dilation, _, _, groups = operands(base)
        return x, self.weight(base), bias, factor, stride, padding, dilation, groups, 1.0, self.precision

    def weight(self, base: fx.Node) -> fx.Node:
        """The weights of a convolution, constant ones put into channels-last order: kernels read them along channels."""
        weight: fx.Node = operands(base)[1]
        if weight.op == "get_attr":
            value = fetch(self.program, str(weight.target))
            self.program.register_buffer(str(weight.target), value.contiguous(memory_format=torch.channels_last))
        return weight

    def left_over(self) -> None:
        """Says of every other transposed convolution and norm why it stays."""
        known = {refusal.where for refusal in self.refused}
        for node in self.all(aten.convolution.default):
            if is_convolution(node, transposed=True) and node.name not in known:
                users = ", ".join(str(user.target) for user in node.users)
                self.refuse("conv_transposed_gate", node, f"no gate or product reads it alone, but {users}; cuDNN has its own")
        for root, reason in written_out(self.program.graph):
            if root.name not in known:
                self.refuse("norm_gate", root, reason)

    # ---- smooth activations and norms

    def activations(self) -> None:
        """``gelu(z), (1 + erf(z / sqrt 2)) / 2`` and ``silu(z), sigmoid(z)``: value and coefficient in one pass."""
        for value in self.all(aten.gelu.default, aten.silu.default):
            kind = "gelu" if value.target is aten.gelu.default else "silu"
            z = operands(value)[0]
            coefficients = [*sigmoids(z)] if kind == "silu" else [*normal_cdfs(z)]
            if not coefficients or value.kwargs.get("approximate", "none") != "none":
                self.refuse("gate", value, "its coefficient is not computed, or by another formula")
                continue
            if reason := self.ask("gate", z):
                self.refuse("gate", value, reason)
                continue
            first = self.first(value, *coefficients)
            a, c = self.put_items(first, self.ops.smooth_gate.default, z, kind)
            replace(value, a)
            for coefficient in coefficients:
                replace(coefficient, c)
            self.program.graph.eliminate_dead_code()

    def norms(self) -> None:
        """``layer_norm(x), 1 / sqrt(var(x) + eps)`` and ``v s gamma - mean(v s gamma)``."""
        for norm in self.all(aten.native_layer_norm.default):
            x, shape, gamma, beta, eps = operands(norm)
            scales = [*layer_scales(x, eps)]
            items = {operands(user)[1]: user for user in norm.users}
            reason = self.ask("norm_gate", x, gamma, beta)
            if len(shape) != 1:
                reason = f"it normalizes {len(shape)} dimensions"
            elif set(items) != {0} or not scales:
                reason = "its coefficient is not computed, or by another formula"
            if reason:
                self.refuse("norm_gate", norm, reason)
                continue
            y, s = self.put_items(norm, self.ops.norm_gate.default, x, gamma, beta, eps, True)
            replace(items[0], y)
            for scale in scales:
                replace(scale, s)
            while (found := next(centred_pulls(s, gamma), None)) is not None:
                centred, v = found
                replace(centred, self.put(centred, self.ops.norm_pull.default, v, gamma, s, True))
            self.program.graph.eliminate_dead_code()

    def square_norms(self) -> None:
        """``x s gamma`` with ``s = 1 / sqrt(mean(x^2) + eps)``, and ``v s gamma``."""
        seen = set[fx.Node]()
        while (norm := next((n for n in rms_norms(self.program.graph) if not seen & {*n.scales}), None)) is not None:
            seen.update(norm.scales)  # one after another: a norm may be of what another gave
            x, gamma = norm.x, norm.gamma
            reason = self.ask("norm_gate", x, gamma, None)
            if not norm.values:
                reason = "only its coefficient is computed"
            if reason:
                self.refuse("norm_gate", norm.scales[0], reason)
                continue
            first = self.first(*norm.values, *norm.scales)
            if gamma is not None and self.first(gamma, first) is first:
                first.prepend(gamma)  # a constant may stand anywhere
            y, s = self.put_items(first, self.ops.norm_gate.default, x, gamma, None, norm.eps, False)
            for value in norm.values:
                replace(value, y)
            for scale in norm.scales:
                replace(scale, s)
            while gamma is not None and (found := next(pulls(s, gamma), None)) is not None:  # without gamma it is one product
                product, v = found
                replace(product, self.put(product, self.ops.norm_pull.default, v, gamma, s, False))
            self.program.graph.eliminate_dead_code()
