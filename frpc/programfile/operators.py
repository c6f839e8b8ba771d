"""The closed list of what a program file may hold: operators, words, element types, memory formats.

A file names them; nothing else in it reaches Python. Compiled programs hold no other operators: a test compares.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from frpc.torch_compat import OpOverload

__all__ = [
    "ARITHMETIC",
    "COMPUTING",
    "DTYPES",
    "LAYOUTS",
    "MEMORY_FORMATS",
    "MOVEMENT",
    "OPERATORS",
    "WORDS",
    "aten_operator",
    "operator_named",
]

_ONE_TENSOR = """
abs.default acos.default acosh.default angle.default asin.default asinh.default atan.default atanh.default bitwise_not.default
ceil.default celu.default clamp.Tensor clamp.default clamp_max.Tensor clamp_max.default clamp_min.Tensor clamp_min.default
clip.Tensor clip.default cos.default cosh.default deg2rad.default digamma.default elu.default elu_backward.default erf.default
erfc.default erfinv.default exp.default exp2.default expm1.default fill.Scalar fill.Tensor float_power.Tensor_Scalar
floor.default frac.default frexp.Tensor gelu.default gelu_backward.default hardshrink.default hardshrink_backward.default
hardsigmoid.default hardsigmoid_backward.default hardswish.default hardswish_backward.default hardtanh.default
hardtanh_backward.default i0.default isfinite.default isinf.default isnan.default isneginf.default isposinf.default
leaky_relu.default leaky_relu_backward.default lgamma.default log.default log10.default log1p.default log2.default
log_sigmoid_backward.default log_sigmoid_forward.default logical_not.default logit.default logit_backward.default mish.default
mish_backward.default mvlgamma.default nan_to_num.default neg.default polygamma.default positive.default rad2deg.default
reciprocal.default relu.default relu6.default round.decimals round.default rsqrt.default selu.default sgn.default
sigmoid.default sigmoid_backward.default sign.default signbit.default silu.default silu_backward.default sin.default
sinc.default sinh.default softplus.default softplus_backward.default softshrink.default softshrink_backward.default
special_airy_ai.default special_bessel_j0.default special_bessel_j1.default special_bessel_y0.default
special_bessel_y1.default special_entr.default special_erfcx.default special_i0e.default special_i1.default
special_i1e.default special_log_ndtr.default special_modified_bessel_i0.default special_modified_bessel_i1.default
special_modified_bessel_k0.default special_modified_bessel_k1.default special_ndtri.default
special_spherical_bessel_j0.default sqrt.default square.default tan.default tanh.default tanh_backward.default
threshold.default threshold_backward.default trunc.default
"""

_SEVERAL_TENSORS = """
_prelu_kernel.default add.Scalar add.Tensor addcdiv.default addcmul.default atan2.default bitwise_and.Scalar
bitwise_and.Tensor bitwise_left_shift.Tensor bitwise_or.Scalar bitwise_or.Tensor bitwise_right_shift.Tensor bitwise_xor.Scalar
bitwise_xor.Tensor copysign.Scalar copysign.Tensor div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode eq.Scalar eq.Tensor
float_power.Scalar float_power.Tensor_Tensor floor_divide.default fmax.default fmin.default fmod.Scalar fmod.Tensor
gcd.default ge.Scalar ge.Tensor gt.Scalar gt.Tensor heaviside.default hypot.default igamma.default igammac.default lcm.default
ldexp.Tensor le.Scalar le.Tensor lerp.Scalar lerp.Tensor logaddexp.default logaddexp2.default logical_and.default
logical_or.default logical_xor.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor masked_scatter.default
max.other maximum.default min.other minimum.default mul.Scalar mul.Tensor ne.Scalar ne.Tensor nextafter.default pow.Scalar
pow.Tensor_Scalar pow.Tensor_Tensor remainder.Scalar remainder.Scalar_Tensor remainder.Tensor rsub.Scalar rsub.Tensor
special_xlog1py.default special_xlog1py.other_scalar special_xlog1py.self_scalar special_zeta.default
special_zeta.other_scalar special_zeta.self_scalar sub.Scalar sub.Tensor true_divide.Tensor where.ScalarOther where.ScalarSelf
where.self xlogy.Scalar_Other xlogy.Scalar_Self xlogy.Tensor
"""

_PRODUCTS = """
addbmm.default addmm.default addmv.default baddbmm.default bmm.default convolution.default dot.default linear.default
matmul.default mm.default mv.default outer.default
"""

_REDUCTIONS = """
_log_softmax.default _log_softmax_backward_data.default _safe_softmax.default _softmax.default _softmax_backward_data.default
all.default all.dim amax.default amin.default aminmax.default any.default any.dim argmax.default argmin.default
argsort.default bucketize.Tensor cummax.default cummin.default cumprod.default cumsum.default kthvalue.default
linalg_vector_norm.default logcumsumexp.default logsumexp.default max.default max.dim mean.default mean.dim median.default
median.dim min.default min.dim mode.default nanmedian.dim norm.ScalarOpt_dim prod.default prod.dim_int searchsorted.Tensor
sort.default sort.stable std.correction std_mean.correction sum.default sum.dim_IntList topk.default var.correction
var_mean.correction
"""

_LAYERS = """
_adaptive_avg_pool2d.default _adaptive_avg_pool2d_backward.default _adaptive_avg_pool3d.default
_adaptive_avg_pool3d_backward.default _native_batch_norm_legit.no_stats _native_batch_norm_legit_no_training.default
_upsample_bicubic2d_aa.default _upsample_bicubic2d_aa_backward.default _upsample_bilinear2d_aa.default
_upsample_bilinear2d_aa_backward.default _upsample_nearest_exact1d.default _upsample_nearest_exact1d_backward.default
_upsample_nearest_exact2d.default _upsample_nearest_exact2d_backward.default _upsample_nearest_exact3d.default
_upsample_nearest_exact3d_backward.default adaptive_max_pool2d.default adaptive_max_pool2d_backward.default
adaptive_max_pool3d.default adaptive_max_pool3d_backward.default avg_pool2d.default avg_pool2d_backward.default
avg_pool3d.default avg_pool3d_backward.default embedding.default glu.default glu_backward.default grid_sampler_2d.default
grid_sampler_2d_backward.default grid_sampler_3d.default grid_sampler_3d_backward.default max_pool2d_with_indices.default
max_pool2d_with_indices_backward.default max_pool3d_with_indices.default max_pool3d_with_indices_backward.default
max_unpool2d.default max_unpool3d.default native_group_norm.default native_group_norm_backward.default
native_layer_norm.default native_layer_norm_backward.default upsample_bicubic2d.default upsample_bicubic2d_backward.default
upsample_bilinear2d.default upsample_bilinear2d_backward.default upsample_linear1d.default upsample_linear1d_backward.default
upsample_nearest1d.default upsample_nearest1d_backward.default upsample_nearest2d.default upsample_nearest2d_backward.default
upsample_nearest3d.default upsample_nearest3d_backward.default upsample_trilinear3d.default
upsample_trilinear3d_backward.default
"""

_MOVEMENT = """
clone.default expand.default flip.default permute.default reshape.default select.int slice.Tensor squeeze.dim squeeze.dims
t.default transpose.int unsqueeze.default view.default
"""

_PLACES = """
_to_copy.default _unsafe_index.Tensor _unsafe_index_put.default _unsafe_view.default alias.default as_strided.default
cat.default channel_shuffle.default col2im.default constant_pad_nd.default copy.default detach.default diag.default
diag_embed.default diagonal.default diagonal_backward.default diagonal_scatter.default gather.default im2col.default
index.Tensor index_add.default index_copy.default index_fill.int_Scalar index_fill.int_Tensor index_put.default
index_reduce.default index_select.default narrow.default pixel_shuffle.default pixel_unshuffle.default
reflection_pad1d.default reflection_pad1d_backward.default reflection_pad2d.default reflection_pad2d_backward.default
reflection_pad3d.default reflection_pad3d_backward.default repeat.default replication_pad1d.default
replication_pad1d_backward.default replication_pad2d.default replication_pad2d_backward.default replication_pad3d.default
replication_pad3d_backward.default roll.default rot90.default scatter.src scatter.value scatter_add.default scatter_reduce.two
select_backward.default select_scatter.default slice_backward.default slice_scatter.default split.Tensor
split_with_sizes.default squeeze.default stack.default tril.default triu.default unbind.int unfold.default
unfold_backward.default view.dtype
"""

_MAKING = """
arange.default arange.start arange.start_step eye.default eye.m full.default full_like.default linspace.default new_full.default
new_ones.default new_zeros.default ones.default ones_like.default scalar_tensor.default zeros.default zeros_like.default
"""

_SIZES = "sym_numel.default sym_size.int sym_storage_offset.default sym_stride.int"

_GROUPS = (
    _ONE_TENSOR,
    _SEVERAL_TENSORS,
    _PRODUCTS,
    _REDUCTIONS,
    _LAYERS,
    _MOVEMENT,
    _PLACES,
    _MAKING,
    _SIZES,
)

MOVEMENT: frozenset[str] = frozenset(f"aten.{name}" for name in _MOVEMENT.split())
"""Operators that only move elements of one tensor: the ones by which a file's own tensors are laid out for a program."""

COMPUTING: frozenset[str] = frozenset(
    f"aten.{name}"
    for group in (_ONE_TENSOR, _SEVERAL_TENSORS, _PRODUCTS, _REDUCTIONS, _MOVEMENT, _PLACES)
    for name in group.split()
    if not name.startswith("convolution.")
)
"""Operators by which constants are computed from the weights of a model when a file is read."""

ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    f"operator.{function.__name__}": function
    for function in (operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv, operator.mod)
}
"""Arithmetic on sizes, and taking one of several results."""

OPERATORS: frozenset[str] = frozenset(f"aten.{name}" for group in _GROUPS for name in group.split())
"""ATen operators by name and overload."""

WORDS: frozenset[str] = frozenset({"none", "tanh", "floor", "trunc", "sum", "prod", "mean", "amax", "amin"})
"""Strings that operators take as arguments."""

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("complex64", "complex128"),
    )
}
"""Element types."""

MEMORY_FORMATS: Mapping[str, torch.memory_format] = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
"""Memory formats."""

LAYOUTS: Mapping[str, torch.layout] = {"strided": torch.strided}
"""Layouts."""


def operator_named(name: str) -> OpOverload | Callable[..., Any]:
    """Returns the operator of a name in :data:`OPERATORS` or :data:`ARITHMETIC`.

    Raises:
        KeyError: for any other name.
    """
    return ARITHMETIC[name] if name in ARITHMETIC else aten_operator(name)


def aten_operator(name: str) -> OpOverload:
    """Returns the operator of a name in :data:`OPERATORS`.

    Raises:
        KeyError: for any other name.
    """
    if name not in OPERATORS:
        raise KeyError(name)
    _, packet, overload = name.split(".")
    found: OpOverload = getattr(getattr(torch.ops.aten, packet), overload)
    return found
