"""The thesis's algorithm 1 as it is written: N columns, one for each pixel, go through the net as one batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frpc.errors import OptionError

__all__ = ["algorithm_one"]


def algorithm_one(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Maps of all neurons of a layer, ``V_i = (sum_j w_ij V_j + b_i / N) |sgn(out_i)|``, ``[N, C, H, W]`` for N pixels.

    Args:
        model: a net whose layers up to ``layer`` follow one another: convolutions, ReLU, max pools.
        layer: module path.
        x: one picture, ``[1, C, H, W]``.

    Raises:
        OptionError: for any other layer on the way.

    Source: thesis eqs. 3.5, 3.7, 3.8, 4.10, 4.11, algorithm 1.
    """
    cells = x[0, 0].numel()
    columns = x * torch.eye(cells, dtype=x.dtype).view(cells, 1, *x.shape[2:])  # each keeps one pixel
    with torch.inference_mode():
        for name, part in model.named_modules():
            if len(list(part.children())) > 0:
                continue
            if isinstance(part, nn.Conv2d):
                share = 0 if part.bias is None else (part.bias / cells)[:, None, None]
                columns = F.conv2d(columns, part.weight, None, part.stride, part.padding, part.dilation, part.groups) + share
                x = part(x)
            elif isinstance(part, nn.ReLU):
                x = part(x)
                columns = columns * x.sign().abs()
            elif isinstance(part, nn.MaxPool2d):
                x, winners = F.max_pool2d(x, part.kernel_size, part.stride, part.padding, return_indices=True)
                places = winners.flatten(2).expand(cells, -1, -1)
                columns = columns.flatten(2).gather(2, places).view(cells, *x.shape[1:])
            else:
                raise OptionError(
                    f"{name}: the algorithm is written for convolutions, ReLU and max pools, not {type(part).__name__}."
                )
            if name == layer:
                return columns
    raise OptionError(f"{layer} is no layer of {type(model).__name__}.")
