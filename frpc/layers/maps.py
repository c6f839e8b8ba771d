"""Every neuron's relevance map of one layer: held, streamed, summed by channel, checked and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frpc.core.sizes import human_bytes
from frpc.emit.bias import BiasPolicy
from frpc.errors import MemoryLimitError, TargetError
from frpc.windows.producer import Grid

__all__ = ["Block", "LayerMaps"]

Grids = tuple[Grid, Grid]


@dataclass(frozen=True, eq=False)
class Block:
    """The maps of some neighbouring neurons of a layer.

    Attributes:
        rows, columns: the positions held, ``[first, last)``.
        local: the local parts, ``[B, C, h, w, Rh, Rw]``: windows of the input.
        values: the neurons' values, ``[B, C, h, w]``.
        bias: the constants' share of each, ``[B, C, h, w]``.
        window: where the windows lie, along rows and columns.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    local: Tensor
    values: Tensor
    bias: Tensor
    window: Grids

    def residual(self) -> Tensor:
        """Returns ``|sum V - z| / sum |V|`` of every neuron, ``[B, C, h, w]``; sums are taken in float64."""
        windows = self.local.flatten(-2)
        total = windows.sum(-1, dtype=torch.float64) + self.bias
        size = windows.abs().sum(-1, dtype=torch.float64) + self.bias.abs()
        error = (total - self.values).abs()
        return torch.where(size > 0, error / size.clamp(min=torch.finfo(torch.float64).tiny), error)


class LayerMaps:
    """The relevance maps of all neurons of a layer; made by ``explainer.layer(name, x)``.

    ``maps[c, i, j]`` is a neuron's pixel map ``[H0, W0]`` (``maps[b, c, i, j]`` with several samples, ``maps[c]`` for a linear
    layer); it sums to the neuron's value. What fits the memory limit is computed at first use and kept; what does not is
    streamed by :meth:`blocks`.

    Attributes:
        name: module path of the layer.
        values: the neurons' values, ``[B, C, H, W]`` or ``[B, C]``.
        bias: the constants' share of every neuron, like values.
        window: :class:`~frpc.windows.Grid` along rows and columns; jump 0 means the window is the whole input.
        cells: the input's spatial size ``(H0, W0)``.
        plan: which strategy answers, and what the others would cost; prints.

    Units: maps have the unit of the neuron's value.

    Source: thesis ch. 3 (eqs. 3.5-3.8, 3.22); in windows beyond it.
    """

    def __init__(
        self,
        name: str,
        values: Tensor,
        bias: Tensor,
        window: Grids,
        cells: tuple[int, int],
        policy: BiasPolicy,
        plan: Any,
        produce: Callable[[tuple[int, int], tuple[int, int]], Iterator[tuple[int, Tensor]]],
        channel_maps: Callable[[list[int] | None], Tensor],
        neuron: Callable[[int, tuple[int, ...]], Tensor],
        memory_limit: int,
    ) -> None:
        self.name, self.values, self.bias, self.window, self.cells = name, values, bias, window, cells
        self.policy, self.plan, self.memory_limit = policy, plan, memory_limit
        self._produce, self._channel_maps, self._neuron = produce, channel_maps, neuron
        self._held: Tensor | None = None

    # ---- size ---------------------------------------------------------------------------------------------------

    @property
    def positions(self) -> tuple[int, int]:
        """Rows and columns of neurons; a linear layer has one of each."""
        if self.values.dim() == 2:
            return 1, 1
        return (
            (1, int(self.values.shape[2])) if self.values.dim() == 3 else (int(self.values.shape[2]), int(self.values.shape[3]))
        )

    def nbytes(self) -> int:
        """Bytes of all windows."""
        return self.values.numel() * self.window[0].side * self.window[1].side * self.values.element_size()

    def __len__(self) -> int:
        return self.values.numel()

    def __repr__(self) -> str:
        return (
            f"LayerMaps({self.name}: {len(self)} neurons {list(self.values.shape)}, "
            f"windows {self.window[0].side}x{self.window[1].side} of {self.cells[0]}x{self.cells[1]} cells, "
            f"{human_bytes(self.nbytes())}, by {self.plan.strategy})"
        )

    # ---- maps ---------------------------------------------------------------------------------------------------

    @property
    def local(self) -> Tensor:
        """The local parts of all maps, ``[B, C, H, W, Rh, Rw]``.

        Raises:
            MemoryLimitError: if they do not fit the memory limit.
        """
        if self._held is None:
            self._demand(self.nbytes(), "all windows")
            rows, columns = self.positions
            bands = [band.permute(0, 2, 3, 4, 5, 1) for _, band in self._produce((0, rows), (0, columns))]
            whole = bands[0] if len(bands) == 1 else torch.cat(bands, 1)  # in the order they lie in memory
            self._held = whole.permute(0, 5, 1, 2, 3, 4)
        return self._held

    def _demand(self, size: int, what: str) -> None:
        if size > self.memory_limit:
            raise MemoryLimitError(
                f"{self.name}: {what} of {len(self)} neurons need {human_bytes(size)}, but the limit is "
                f"{human_bytes(self.memory_limit)}. Stream them: for block in maps.blocks(): ..., or raise memory_limit."
            )

    def __getitem__(self, index: int | tuple[int, ...]) -> Tensor:
        sample, neuron = self._split(index if isinstance(index, tuple) else (index,))
        if self._held is None and self.nbytes() > self.memory_limit:
            return self._neuron(sample, neuron)
        c, i, j = self._place(neuron)
        one = self.local.new_zeros(self.cells)
        self._lay(one, self.local[sample, c, i, j], i, j)
        return self._with_bias(one, self._at(self.bias, sample, neuron))

    def _split(self, index: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """Tells the sample from the neuron, and checks both."""
        batch, *sizes = self.values.shape
        if len(index) == len(sizes) and batch == 1:
            index = (0, *index)
        if len(index) != len(sizes) + 1:
            wanted = ", ".join(["b", "c", "i", "j"][: len(sizes) + 1] if batch > 1 else ["c", "i", "j"][: len(sizes)])
            raise TargetError(f"{self.name} has neurons {list(self.values.shape)}: index them as [{wanted}], not {list(index)}.")
        for number, size in zip(index, self.values.shape, strict=True):
            if not 0 <= number < size:
                raise TargetError(f"Neuron {list(index)} is out of range: {self.name} has neurons {list(self.values.shape)}.")
        return index[0], index[1:]

    def _place(self, neuron: tuple[int, ...]) -> tuple[int, int, int]:
        c, *position = neuron
        return (c, 0, 0) if not position else (c, 0, position[0]) if len(position) == 1 else (c, position[0], position[1])

    def _at(self, field: Tensor, sample: int, neuron: tuple[int, ...]) -> Tensor:
        return field[(sample, *neuron)]

    def _lay(self, canvas: Tensor, windows: Tensor, i: int, j: int) -> None:
        """Adds windows ``[..., Rh, Rw]`` of position (i, j) to ``canvas [..., H0, W0]``, clipped at the border."""
        cuts = []
        for grid, position, size in zip(self.window, (i, j), self.cells, strict=True):
            corner = position * grid.jump + grid.offset
            low, high = max(0, corner), max(0, min(size, corner + grid.side))
            cuts.append((slice(low - corner, max(low, high) - corner), slice(low, max(low, high))))
        (top, down), (left, right) = cuts
        canvas[..., down, right] += windows[..., top, left]

    def _with_bias(self, local: Tensor, bias: Tensor) -> Tensor:
        """Spreads constants over maps ``[..., H0, W0]`` whose biases are ``[...]``."""
        if self.policy == "separate":
            return local
        return local + (bias / (self.cells[0] * self.cells[1]))[..., None, None]

    def dense(self) -> Tensor:
        """Returns all maps over the whole input, ``[B, C, H, W, H0, W0]`` (``[B, C, H0, W0]`` for a linear layer).

        Raises:
            MemoryLimitError: if they do not fit the memory limit.
        """
        self._demand(self.values.numel() * self.cells[0] * self.cells[1] * self.values.element_size(), "dense maps")
        rows, columns = self.positions
        batch, channels = self.values.shape[:2]
        out = self.local.new_zeros([batch, channels, rows, columns, *self.cells])
        for i in range(rows):
            for j in range(columns):
                self._lay(out[:, :, i, j], self.local[:, :, i, j], i, j)
        return self._with_bias(out.reshape([*self.values.shape, *self.cells]), self.bias)

    # ---- sums over positions ------------------------------------------------------------------------------------

    def channel(self, c: int) -> Tensor:
        """Returns the map of one channel, the sum of its neurons' maps, ``[B, H0, W0]`` (thesis eq. 3.22)."""
        if not 0 <= c < self.values.shape[1]:
            raise TargetError(f"Channel {c} is out of range: {self.name} has channels 0 to {self.values.shape[1] - 1}.")
        return self._channels([c])[:, 0]

    def channels(self) -> Tensor:
        """Returns the maps of all channels, ``[B, C, H0, W0]`` (thesis eq. 3.22).

        A channel's map is one linear functional of the layer, so C transposed passes give all of them, whatever the number
        of neurons.
        """
        return self._channels(None)

    def _channels(self, chosen: list[int] | None) -> Tensor:
        if self._held is None:
            return self._channel_maps(chosen)
        local = self._held if chosen is None else self._held[:, chosen]
        bias = self.bias if chosen is None else self.bias[:, chosen]
        out = local.new_zeros([*local.shape[:2], *self.cells])
        for i in range(local.shape[2]):
            for j in range(local.shape[3]):
                self._lay(out, local[:, :, i, j], i, j)
        return self._with_bias(out, bias.flatten(2).sum(-1) if bias.dim() > 2 else bias)

    # ---- streaming ----------------------------------------------------------------------------------------------

    def blocks(self, memory_limit: int | None = None) -> Iterator[Block]:
        """Streams the layer: blocks of rows whose windows fit the limit together with what computing them needs.

        Every row of windows is computed once; only columns at the border of two blocks side by side are shared.

        Args:
            memory_limit: bytes; the maps' own limit by default.
        """
        limit = memory_limit or self.memory_limit
        rows, _ = self.positions
        for span in self.plan.column_spans(limit):
            for first, band in self._produce((0, rows), span):
                last = first + int(band.shape[2])
                values = self._spatial(self.values)[:, :, first:last, span[0] : span[1]]
                bias = self._spatial(self.bias)[:, :, first:last, span[0] : span[1]]
                block = [Block((first, last), span, band, values, bias, self.window)]
                del band  # only the caller holds it now, so its memory can be freed before the next one is computed
                yield block.pop()

    def _spatial(self, field: Tensor) -> Tensor:
        return field.reshape([*field.shape[:2], *self.positions])

    def residual(self) -> Tensor:
        """Returns the conservation error of every neuron, ``|sum V - z| / sum |V|``, like values; streams if necessary."""
        out = torch.zeros([*self.values.shape[:2], *self.positions], dtype=torch.float64)
        if self._held is not None or self.nbytes() <= self.memory_limit:
            rows, columns = self.positions
            whole = Block((0, rows), (0, columns), self.local, self._spatial(self.values), self._spatial(self.bias), self.window)
            return whole.residual().reshape(self.values.shape)
        for block in self.blocks():
            out[:, :, slice(*block.rows), slice(*block.columns)] = block.residual()
        return out.reshape(self.values.shape)

    # ---- keeping ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes values, biases and windows to a safetensors file; the window's geometry is in its metadata."""
        from safetensors.torch import save_file

        rows, columns = self.window
        geometry = {f"{axis}_{k}": str(v) for axis, g in (("rows", rows), ("columns", columns)) for k, v in vars(g).items()}
        tensors = {"values": self.values, "bias": self.bias, "local": self.local}
        metadata = {"layer": self.name, "bias_policy": self.policy, "cells": f"{self.cells[0]}x{self.cells[1]}", **geometry}
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), metadata)
