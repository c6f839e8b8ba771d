"""Canonicalization: the captured graph is rewritten into the operators that rules are written for.

Each pass is a function ``pass(graph_module) -> bool`` that states its algebra and when it is exact, looks whether it is, returns
whether it changed anything, and keeps the computed function. They run in the order of :data:`PASSES`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from frpc.canonicalize.attention import expand_attention
from frpc.canonicalize.bags import expand_embedding_bags
from frpc.canonicalize.complex.complexes import split_complex
from frpc.canonicalize.fused import (
    expand_bounds,
    expand_distances,
    expand_gated_linear_units,
    expand_moments,
    expand_products_added,
    expand_similarities,
    unify_norms,
)
from frpc.canonicalize.moving import (
    drop_blank_operands,
    select_to_slice_scatter,
    split_to_slices,
    stack_to_cat,
    unroll_circular_pads,
)
from frpc.canonicalize.precision import keep_float64, norms_in_one_type, promote_explicitly
from frpc.canonicalize.recovered import recover_shrinks, unify_shuffles
from frpc.canonicalize.recurrent import unroll_recurrent_layers
from frpc.canonicalize.sliding import expose_winners, unify_convolutions
from frpc.canonicalize.trimming import fold_constants, refuse_random, remove_assertions, remove_copies
from frpc.capture.decompose import expand_composites

__all__ = ["PASSES", "Pass"]

Pass = Callable[[fx.GraphModule], bool]

PASSES: tuple[Pass, ...] = (
    refuse_random,
    remove_assertions,
    keep_float64,
    norms_in_one_type,
    promote_explicitly,
    remove_copies,
    unify_convolutions,
    unroll_recurrent_layers,
    split_to_slices,
    expose_winners,
    unify_shuffles,
    recover_shrinks,
    unroll_circular_pads,
    select_to_slice_scatter,
    stack_to_cat,
    drop_blank_operands,
    expand_gated_linear_units,
    expand_attention,
    expand_products_added,
    expand_moments,
    expand_bounds,
    expand_distances,
    expand_similarities,
    split_complex,
    keep_float64,
    expand_composites,
    expand_embedding_bags,
    unify_norms,
    fold_constants,
)
"""In this order; :func:`frpc.canonicalize.batch_norm.fold_batch_norm` follows, knowing which layers must stay."""
