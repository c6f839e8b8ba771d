"""Conditions on the values of tensors: in plain code, inside torch.compile, and under torch.func's transforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frpc.core.torch_compat import assert_async, in_dispatch_mode, is_fake, is_wrapped, unwrapped

__all__ = ["all_hold", "is_plain", "is_traced", "is_transformed", "whole"]


def all_hold(conditions: Tensor, message: str) -> bool:
    """Says whether all conditions hold.

    Under ``torch.func.vmap`` those of all samples count. Inside ``torch.compile`` no value is known yet: the condition then
    becomes an assertion in the compiled program, which raises ``RuntimeError`` with ``message`` when it runs.

    Args:
        conditions: a boolean tensor.
        message: what is wrong if a condition is false.
    """
    if is_traced():
        assert_async(conditions.all(), message)
        return True
    return bool(whole(conditions).all())


def is_traced() -> bool:
    """Says whether torch.compile or torch.export is tracing the calling code.

    ``torch.compiler.is_compiling()`` says so to every thread while one of them exports: what this thread does is then no more
    traced than before, and the values it has are real. Exporting works through a mode of its own thread.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and in_dispatch_mode()


def is_transformed(tensor: Tensor) -> bool:
    """Says whether a transform of ``torch.func`` shows one of several samples through this tensor."""
    return is_wrapped(tensor)


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Says whether tensors have values now: nothing traces, transforms or records operations on them."""
    if is_traced() or in_dispatch_mode() or any(is_transformed(t) or is_fake(t) for t in tensors):
        return False
    return not (any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing())


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all samples that a transform shows one of; any other tensor as it is."""
    while is_wrapped(tensor):
        tensor = unwrapped(tensor)
    return tensor
