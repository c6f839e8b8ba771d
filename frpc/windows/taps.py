"""Windows through sliding kernels: convolution, pooling, and cuts and frames in space."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from frpc.maps import Conv, LinearPool, Select, Window
from frpc.windows.rows import Rows, Span, blank_row

__all__ = ["ConvRows", "CutRows", "MeanRows", "TapRows", "WinnerRows"]

_CHUNK = 1 << 19  # elements of a partial product: 2 MB of float32 stay in the second-level cache

Line = tuple[int, int, int, int]


class TapRows(Rows):
    """Base of sliding kernels.

    Args:
        geometry: ``(kernel, stride, padding, dilation)`` along rows and along columns.
    """

    def __init__(self, operand: Rows, geometry: Window, size: tuple[int, int, int]) -> None:
        rows, columns = geometry
        grids = (operand.grids[0].taps(*rows), operand.grids[1].taps(*columns))
        self.geometry = (rows, columns)
        super().__init__((operand,), grids, size)

    def needs_rows(self, i: int) -> Span:
        k, t, p, d = self.geometry[0]
        return i * t - p, i * t - p + (k - 1) * d + 1

    def needs_columns(self, span: Span) -> Span:
        k, t, p, d = self.geometry[1]
        return span[0] * t - p, (span[1] - 1) * t - p + (k - 1) * d + 1

    def row_taps(self, i: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yields ``(tap, window shift, operand row)`` of the taps inside the border."""
        k, t, p, d = self.geometry[0]
        for a in range(k):
            y = i * t - p + a * d
            if 0 <= y < self.operands[0].size[1]:
                yield a, a * d * self.operands[0].grids[0].jump, self.operands[0].row(y)

    def column_taps(self, low: int, high: int) -> Iterator[tuple[int, int, slice, slice]]:
        """Yields ``(tap, window shift, operand columns, own columns)`` for own columns ``[low, high)``, counted in the rows."""
        k, t, p, d = self.geometry[1]
        operand = self.operands[0]
        for b in range(k):
            first = max(low, -((operand.span[0] + p - b * d) // -t))
            last = min(high, (operand.span[1] - 1 + p - b * d) // t + 1)
            if first < last:
                x = first * t - p + b * d - operand.span[0]
                theirs = slice(x, x + (last - first - 1) * t + 1, t)
                yield b, b * d * operand.grids[1].jump, theirs, slice(first - self.span[0], last - self.span[0])

    def empty_row(self, like: Tensor) -> Tensor:
        """Returns a row of zeros for the columns asked for."""
        return blank_row(like, self.size[0], self.span[1] - self.span[0], self.grids)


class ConvRows(TapRows):
    """``U'[c', i', j'] += K[c', c, a, b] U[c, i' t + a d - p, j' t + b d - p]``, shifted by ``(a, b) d s`` in the window."""

    def __init__(self, operand: Rows, conv: Conv, size: tuple[int, int, int]) -> None:
        weight = conv.weight if conv.weight.dim() == 4 else conv.weight.unsqueeze(2)
        lines = list(zip(weight.shape[2:], conv.stride, conv.padding, conv.dilation, strict=False))
        if conv.weight.dim() == 3:
            lines = [(1, 1, 0, 1), (int(weight.shape[3]), conv.stride[0], conv.padding[0], conv.dilation[0])]
        super().__init__(operand, [tuple(int(v) for v in line) for line in lines], size)  # type: ignore[misc]
        g = conv.groups
        # [kh, kw, G, C'/G, C/G]: one small matrix for each tap and group
        self.weight = weight.reshape(g, -1, *weight.shape[1:]).permute(3, 4, 0, 1, 2).contiguous()
        self.groups, self.kernel = g, weight

    def compute(self, i: int) -> Tensor:
        taps = list(self.row_taps(i))
        like = taps[0][2] if taps else self.operands[0].row(0)
        out = self.empty_row(like)
        rh, rw = (g.side for g in self.operands[0].grids)
        step = max(1, _CHUNK // (max(self.size[0], self.operands[0].size[0]) * rh * rw))
        scratch = like.new_empty([0])
        for low in range(self.span[0], self.span[1], step):
            for a, down, source in taps:
                for b, right, theirs, ours in self.column_taps(low, min(low + step, self.span[1])):
                    scratch = self._add(
                        out[:, :, ours, :, right : right + rw], source[:, :, theirs], self.weight[a, b], down, scratch
                    )
        return out

    def taps_each(self) -> float:
        """Multiplications for one result: taps times channels of a group."""
        return float(self.weight.shape[0] * self.weight.shape[1] * self.weight.shape[4])

    def _add(self, out: Tensor, source: Tensor, matrix: Tensor, down: int, scratch: Tensor) -> Tensor:
        """Adds ``matrix @ source`` to ``out``, ``down`` rows into its windows; returns the scratch memory for the next call.

        Shapes: out ``[B, C', n, Rh, rw]``, source ``[B, C, n, rh, rw]``, matrix ``[G, C'/G, C/G]``.
        """
        batch, channels, n, rh, rw = source.shape
        if matrix.shape[1] == matrix.shape[2] == 1:  # depthwise: a coefficient for each channel
            out[:, :, :, down : down + rh].addcmul_(source, matrix.reshape(1, -1, 1, 1, 1))
            return scratch
        step = rh if n > 1 else max(1, min(rh, _CHUNK // (max(channels, out.shape[1]) * rw)))
        for top in range(0, rh, step):
            part = source[:, :, :, top : top + step].permute(0, 2, 3, 4, 1)  # [B, n, height, rw, C]
            flat = part.reshape(-1, self.groups, channels // self.groups).transpose(0, 1)  # [G, L, C/G]
            size = flat.shape[1] * out.shape[1]
            if scratch.numel() < size:
                scratch = source.new_empty([size])
            product = scratch[:size].view(flat.shape[1], self.groups, -1)  # [L, G, C'/G]
            if self.groups == 1:
                torch.mm(flat[0], matrix[0].t(), out=product[:, 0])
            else:
                torch.bmm(flat, matrix.transpose(1, 2), out=product.transpose(0, 1))
            height = part.shape[2]
            spread = product.view(batch, n, height, rw, -1).permute(0, 4, 1, 2, 3)
            out[:, :, :, down + top : down + top + height].add_(spread)
        return scratch

    def moved(self) -> float:
        taps = self.weight.shape[0] * self.weight.shape[1]
        return taps * (3.0 * self.row_elements() + self.operands[0].row_elements()) * self.size[1] * self._share()

    def calls(self) -> float:
        taps = self.weight.shape[0] * self.weight.shape[1]
        chunk = self.row_elements() * self._share() / _CHUNK
        return 4.0 * taps * self.size[1] * max(1.0, chunk)

    def _share(self) -> float:
        """How much of its own window one tap touches."""
        mine, theirs = self.grids, self.operands[0].grids
        return (theirs[0].side * theirs[1].side) / (mine[0].side * mine[1].side)

    def flops(self) -> float:
        source = self.operands[0]
        kh, kw, groups, o, c = self.weight.shape
        window = source.grids[0].side * source.grids[1].side
        return 2.0 * kh * kw * groups * o * c * self.size[1] * self.size[2] * window


class MeanRows(TapRows):
    """Average pooling: the windows of all taps added, over the divisor of the position."""

    def __init__(self, operand: Rows, pool: LinearPool, size: tuple[int, int, int]) -> None:
        super().__init__(operand, pool.geometry_2d(), size)
        self.inverse = pool.inverse_divisor()  # [H, W]

    def compute(self, i: int) -> Tensor:
        rh, rw = (g.side for g in self.operands[0].grids)
        out: Tensor | None = None
        for _, down, source in self.row_taps(i):
            out = self.empty_row(source) if out is None else out
            for _, right, theirs, ours in self.column_taps(*self.span):
                out[:, :, ours, down : down + rh, right : right + rw].add_(source[:, :, theirs])
        assert out is not None, "a pooling window holds at least one cell"
        return out.mul_(self.inverse[i, self.span[0] : self.span[1], None, None].to(out))


class WinnerRows(TapRows):
    """Max pooling: the winner's window, moved to the place of the winning tap."""

    def __init__(self, operand: Rows, select: Select, geometry: Window, size: tuple[int, int, int]) -> None:
        super().__init__(operand, geometry, size)
        self.indices = select.indices if select.indices.dim() == 4 else select.indices.unsqueeze(2)

    def won(self, row: int, column: int, height: int, width: int, a: int, b: int) -> Tensor:
        """Says where tap (a, b) won, ``[B, C, height, width]`` from position (row, column) on."""
        (_, t, p, d), (_, tw, pw, dw) = self.geometry
        here = self.indices[:, :, row : row + height, column : column + width]
        tap_row = torch.arange(row, row + height)[:, None] * t - p + a * d
        tap_column = torch.arange(column, column + width) * tw - pw + b * dw
        inside = (tap_column >= 0) & (tap_column < self.operands[0].size[2])
        return (here == tap_row * self.operands[0].size[2] + tap_column) & inside

    def compute(self, i: int) -> Tensor:
        rh, rw = (g.side for g in self.operands[0].grids)
        low, high = self.span
        out: Tensor | None = None
        for a, down, source in self.row_taps(i):
            out = self.empty_row(source) if out is None else out
            for b, right, theirs, ours in self.column_taps(*self.span):
                mask = self.won(i, low, 1, high - low, a, b)[:, :, 0, ours, None, None].to(source.dtype)
                out[:, :, ours, down : down + rh, right : right + rw].addcmul_(source[:, :, theirs], mask)
        assert out is not None, "a pooling window holds at least one cell"
        return out


class CutRows(TapRows):
    """A slice or a frame of zeros in space: position ``i`` is position ``i t - p`` of the operand, or nothing."""

    def compute(self, i: int) -> Tensor:
        out: Tensor | None = None
        for _, _, source in self.row_taps(i):
            out = self.empty_row(source)
            for _, _, theirs, ours in self.column_taps(*self.span):
                out[:, :, ours].copy_(source[:, :, theirs])
        return self.empty_row(self.operands[0].row(0)) if out is None else out
