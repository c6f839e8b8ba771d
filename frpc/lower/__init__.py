"""Lowering: the optimized program is put into the form that runs fastest on the device its parameters live on.

Every pass keeps the function; a pass that leaves a place as it was says so in a :class:`Refusal`.
"""

from frpc.lower.convolutions import channels_last, flip_transposed, paint_blocks
from frpc.lower.gates import byte_gates
from frpc.lower.memory import early_coefficients, free_views, reuse_memory
from frpc.lower.onednn import OPERATORS, fuse_into_convolutions, prepack
from frpc.lower.refusal import Pass, Refusal

__all__ = ["OPERATORS", "PASSES", "Pass", "Refusal"]

PASSES: tuple[Pass, ...] = (
    byte_gates,
    early_coefficients,
    paint_blocks,
    prepack,
    flip_transposed,
    channels_last,
    fuse_into_convolutions,
    free_views,
    reuse_memory,
)
"""In this order: what oneDNN takes is its own, the rest is flipped and reordered."""
