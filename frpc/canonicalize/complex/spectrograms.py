"""Short-time Fourier transforms and back: frames, a window, a Fourier transform of each frame; frames added up again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from frpc.canonicalize.complex.pairs import Pair, Pairs, Part
from frpc.core.graph import is_complex

__all__ = ["inverse_spectrogram", "spectrogram"]

aten = torch.ops.aten
_AS_IT_IS, _BY_ROOT, _BY_SIZE = 0, 1, 2  # how PyTorch numbers the norms of Fourier transforms


def spectrogram(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | fx.Node | None:
    """``stft(x) -> transpose(rfft(unfold(x) * window))``, ``[B, L] -> [B, F, T]``; ``center`` has padded x already."""
    x, size = given["self"], given["n_fft"]
    if is_complex(x) or given.get("align_to_window") or x.meta["val"].dim() != 2:
        return None
    hop = size // 4 if given["hop_length"] is None else given["hop_length"]
    window, onesided = _window(c, given), given["onesided"] is not False
    if window is not None and is_complex(window):
        return None
    frames: Part = c.call(aten.unfold.default, x, -1, size, hop)  # [B, T, size]
    if window is not None:
        frames = c.mul(frames, window)
    norm = _BY_ROOT if given["normalized"] else _AS_IT_IS
    both = c.call(aten.view_as_real.default, c.call(aten._fft_r2c.default, frames, [2], norm, onesided))
    both = c.call(aten.transpose.int, both, 1, 2)  # [B, F, T, 2]
    if not given["return_complex"]:
        return both
    return Pair(*(c.call(aten.select.int, both, -1, part) for part in (0, 1)))


def inverse_spectrogram(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node | None:
    """``istft(z) -> sum of windowed irfft(z) at their places / sum of squared windows``, ``[B, F, T] -> [B, L]``."""
    z, size = given["self"], given["n_fft"]
    value = z.meta["val"]
    if given["return_complex"] or given["onesided"] is False or value.dim() != 3:
        return None
    if given["onesided"] is None and value.shape[1] != size // 2 + 1:
        return None
    hop = size // 4 if given["hop_length"] is None else given["hop_length"]
    turned = [c.call(aten.transpose.int, part, 1, 2) for part in c.nodes(c.of(z))]  # [B, T, F]
    norm = _BY_ROOT if given["normalized"] else _BY_SIZE
    frames: Any = c.call(aten._fft_c2r.default, c.call(aten.complex.default, *turned), [2], norm, size)
    window = _window(c, given)
    if window is None:
        window = c.call(aten.full.default, [size], 1.0, dtype=frames.meta["val"].dtype, device=value.device)
    count = int(value.shape[2])
    length = size + hop * (count - 1)
    signal = _added_up(c, c.mul(frames, window), length, size, hop)
    square = c.call(aten.expand.default, c.call(aten.mul.Tensor, window, window), [1, count, size])
    weight = _added_up(c, square, length, size, hop)
    start = size // 2 if given["center"] else 0
    stop = start + given["length"] if given["length"] is not None else length - start
    signal, weight = (c.call(aten.slice.Tensor, a, 1, start, min(stop, length)) for a in (signal, weight))
    found = c.call(aten.div.Tensor, signal, weight)
    return found if stop <= length else c.call(aten.constant_pad_nd.default, found, [0, stop - length])


def _window(c: Pairs, given: dict[str, Any]) -> Any:
    """The window in the middle of a frame; None where it is 1 throughout."""
    window, size = given["window"], given["n_fft"]
    width = size if given["win_length"] is None else given["win_length"]
    if width == size:
        return window
    before = (size - width) // 2
    if window is None:
        example = given["self"].meta["val"]
        dtype = example.real.dtype if example.is_complex() else example.dtype
        window = c.call(aten.full.default, [width], 1.0, dtype=dtype, device=example.device)
    return c.call(aten.constant_pad_nd.default, window, [before, size - width - before])


def _added_up(c: Pairs, frames: Any, length: int, size: int, hop: int) -> fx.Node:
    """``[B, T, size] -> [B, length]``: frames added up at their places."""
    columns = c.call(aten.transpose.int, frames, 1, 2)
    image = c.call(aten.col2im.default, columns, [1, length], [1, size], [1, 1], [0, 0], [1, hop])  # [B, 1, 1, length]
    return c.call(aten.squeeze.dims, image, [1, 2])
