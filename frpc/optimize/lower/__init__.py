"""Lowering: the optimized program is put into the form that runs fastest on the device its parameters live on.

Every pass keeps the function; a pass that does not change a place reports it as a :class:`Refusal`.
"""

from frpc.core.refusal import Pass, Refusal
from frpc.optimize.lower.convolutions import channels_last, flip_transposed, transposed_to_pixel_shuffle
from frpc.optimize.lower.gates import byte_gates, byte_gates_of_middle_size, byte_masks
from frpc.optimize.lower.memory import early_coefficients, free_views, hold_views, reuse_memory
from frpc.optimize.lower.onednn import OPERATORS, fuse_into_convolutions, prepack, sum_samples
from frpc.optimize.lower.pooling import gates_before_pools, pools_without_input, scatter_columns
from frpc.optimize.lower.shares import add_shares, dot_shares, join_shares

__all__ = ["OPERATORS", "PASSES", "QUICK", "Pass", "Refusal"]

PASSES: tuple[Pass, ...] = (
    free_views,
    gates_before_pools,
    byte_gates,
    byte_masks,
    scatter_columns,
    pools_without_input,
    dot_shares,
    add_shares,
    hold_views,
    join_shares,
    early_coefficients,
    transposed_to_pixel_shuffle,
    flip_transposed,
    prepack,
    channels_last,
    sum_samples,
    fuse_into_convolutions,
    reuse_memory,
)
"""In this order: transposed convolutions become plain ones, oneDNN takes what it can, and what is left is put in order."""

QUICK: tuple[Pass, ...] = tuple(byte_gates_of_middle_size if p is byte_gates else p for p in PASSES)
"""The same for short calls: the largest gates read the ReLU itself, which costs memory instead of time."""
