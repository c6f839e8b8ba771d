"""Operators that programs call and that have no rule: they carry nothing, or are rewritten before rules are asked for.

Derivatives of other operators, comparisons, tensors made of nothing, sizes. What is said of them here is mostly that a program
file may hold them; see :class:`frpc.core.traits.Traits`.
"""

from __future__ import annotations

from typing import Any

import torch

from frpc.rules.table import declare

aten = torch.ops.aten

_POINTWISE = """
addcdiv.default addcmul.default angle.default bitwise_and.Scalar bitwise_and.Tensor bitwise_left_shift.Tensor
bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor bitwise_right_shift.Tensor bitwise_xor.Scalar bitwise_xor.Tensor
clamp.Tensor clamp_max.Tensor clamp_min.Tensor clip.Tensor clip.default
div.Scalar div.Scalar_mode elu_backward.default eq.Scalar eq.Tensor float_power.Scalar
float_power.Tensor_Scalar float_power.Tensor_Tensor floor_divide.default frexp.Tensor gcd.default ge.Scalar
ge.Tensor gelu_backward.default gt.Scalar gt.Tensor hardshrink_backward.default hardsigmoid_backward.default
hardswish_backward.default hardtanh_backward.default
isfinite.default isinf.default isnan.default isneginf.default isposinf.default lcm.default ldexp.Tensor le.Scalar le.Tensor
leaky_relu_backward.default lerp.Tensor log_sigmoid_backward.default
logical_and.default logical_not.default logical_or.default logical_xor.default logit_backward.default lt.Scalar lt.Tensor
max.other min.other mish_backward.default mul.Scalar ne.Scalar ne.Tensor nextafter.default
positive.default remainder.Scalar_Tensor sigmoid_backward.default signbit.default silu_backward.default
softplus_backward.default softshrink_backward.default special_airy_ai.default special_bessel_j0.default
special_bessel_j1.default special_bessel_y0.default special_bessel_y1.default
special_modified_bessel_i0.default
special_modified_bessel_i1.default special_modified_bessel_k0.default special_modified_bessel_k1.default
special_spherical_bessel_j0.default
special_zeta.default special_zeta.other_scalar special_zeta.self_scalar sub.Scalar tanh_backward.default
threshold_backward.default true_divide.Tensor
"""

_PRODUCTS_AND_REDUCTIONS = """
addbmm.default addmv.default dot.default outer.default _log_softmax_backward_data.default _softmax_backward_data.default
all.default all.dim aminmax.default any.default any.dim argmax.default argmin.default argsort.default bucketize.Tensor
logcumsumexp.default max.default mean.default median.default min.default norm.ScalarOpt_dim prod.default
searchsorted.Tensor std_mean.correction sum.default var_mean.correction
"""

_PLACES = """
diag.default diagonal_backward.default index_reduce.default narrow.default reflection_pad1d_backward.default
reflection_pad2d_backward.default reflection_pad3d_backward.default replication_pad1d_backward.default
replication_pad2d_backward.default replication_pad3d_backward.default select_backward.default select_scatter.default
slice_backward.default split.Tensor split_with_sizes.default stack.default unbind.int unfold_backward.default view.dtype
"""

_LAYERS = """
_adaptive_avg_pool2d_backward.default _adaptive_avg_pool3d_backward.default _native_batch_norm_legit.no_stats
_upsample_bicubic2d_aa.default _upsample_bicubic2d_aa_backward.default _upsample_bilinear2d_aa.default
_upsample_bilinear2d_aa_backward.default _upsample_nearest_exact1d.default _upsample_nearest_exact1d_backward.default
_upsample_nearest_exact2d.default _upsample_nearest_exact2d_backward.default _upsample_nearest_exact3d.default
_upsample_nearest_exact3d_backward.default adaptive_max_pool2d_backward.default adaptive_max_pool3d_backward.default
avg_pool2d_backward.default avg_pool3d_backward.default embedding.default glu.default glu_backward.default
grid_sampler_2d_backward.default grid_sampler_3d_backward.default max_pool2d_with_indices_backward.default
max_pool3d_with_indices_backward.default max_unpool2d.default max_unpool3d.default native_group_norm_backward.default
native_layer_norm_backward.default upsample_bicubic2d.default upsample_bicubic2d_backward.default upsample_bilinear2d.default
upsample_bilinear2d_backward.default upsample_linear1d.default upsample_linear1d_backward.default upsample_nearest1d.default
upsample_nearest1d_backward.default upsample_nearest2d.default upsample_nearest2d_backward.default upsample_nearest3d.default
upsample_nearest3d_backward.default upsample_trilinear3d.default upsample_trilinear3d_backward.default
"""

_FRESH = """
arange.default arange.start arange.start_step eye.default eye.m full.default linspace.default ones.default
scalar_tensor.default zeros.default
"""

_LIKE = """
full_like.default new_full.default new_ones.default new_zeros.default ones_like.default zeros_like.default
"""


def _declare(names: str, **traits: Any) -> None:
    for name in names.split():
        packet, overload = name.split(".")
        declare(getattr(getattr(aten, packet), overload), **traits)


_declare(_POINTWISE, pointwise=True, in_file="constants")
_declare("fill.Scalar fill.Tensor", pointwise=True, ignores=("self",), in_file="constants")
_declare(_PRODUCTS_AND_REDUCTIONS, in_file="constants")
_declare(_PLACES, in_file="constants")
_declare(_LAYERS, in_file="programs")
_declare(_FRESH, in_file="programs")
_declare(_LIKE, ignores=("self",), in_file="programs")
_declare("sym_numel.default sym_size.int sym_storage_offset.default sym_stride.int", ignores=("self",), in_file="programs")
_declare("empty_like.default new_empty.default", ignores=("self",))
