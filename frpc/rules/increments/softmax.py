"""Increments of softmax and of logarithms of sums: averages of softmax along the path."""

from __future__ import annotations

import torch
from torch import Tensor

from frpc.core.torch_compat import schema_of
from frpc.maps import LinearMap, LinearOp
from frpc.rules.forms.norms import weighed_sum
from frpc.rules.functions.arithmetic import from_end, refuse_batch
from frpc.rules.functions.quotients import expm1_over
from frpc.rules.increments.paths import Path, averaged
from frpc.rules.table import Affine, Call

__all__ = ["SoftmaxMap", "log_softmax", "logsumexp", "softmax"]


class SoftmaxMap(LinearMap):
    """``u -> k (u - <k, u> / sum k)`` along one dimension, its own transpose; with k a softmax, the Jacobian of that softmax."""

    def __init__(self, weights: Tensor, dim: int) -> None:
        self.operand = self.result = weights.shape
        self.weights, self.dim = weights, dim
        self.total = weights.sum(dim, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)  # 0 where all is masked

    def push(self, u: Tensor) -> Tensor:
        return self.weights * (u - (self.weights * u).sum(self.dim, keepdim=True) / self.total)

    def pull(self, v: Tensor) -> Tensor:
        return self.push(v)


def _weights(call: Call, path: Path, name: str, dims: list[int]) -> list[Tensor]:
    """The softmax at each point of a path; exactly, the logarithmic means ``k = (s - t) / (log s - log t)`` of its two ends.

    ``ds_i = k_i (da_i - dL)``, L the logarithm of the sum. As the s sum to 1, ``dL = sum k_j da_j / sum k_j``: complete, bounded,
    and s itself where both ends are one.
    """

    def normed(a: Tensor) -> Tensor:
        e = torch.exp(a - a.amax(dims, keepdim=True).clamp(min=torch.finfo(a.dtype).min))
        return e / e.sum(dims, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)

    if call.reference is None or path.steps is not None:
        return [normed(point) for point in path.points(call, name)]
    a, r = call.args[name], call.reference.args[name]
    change = (a - a.logsumexp(dims, keepdim=True)) - (r - r.logsumexp(dims, keepdim=True))
    size = torch.where(torch.isfinite(change), change.abs(), 0.0)  # what is left out has no softmax at either end
    return [torch.maximum(normed(a), normed(r)) * expm1_over(-size)]


def softmax(call: Call, path: Path) -> Affine:
    name, dim = str(schema_of(call.op).arguments[0].name), from_end(call.args["dim"], call.value.dim())
    refuse_batch(call.args[name], dim)
    weights = [call.value] if call.reference is None else _weights(call, path, name, dim)
    return Affine({name: averaged([SoftmaxMap(k, dim[0]) for k in weights])})


def log_softmax(call: Call, path: Path) -> Affine:
    a, dim = call.args["self"], from_end(call.args["dim"], call.value.dim())
    refuse_batch(a, dim)
    parts = [k / k.sum(dim, keepdim=True) for k in _weights(call, path, "self", dim)]
    weights = sum(parts[1:], parts[0]) / len(parts)
    return Affine({"self": LinearOp(lambda u: u - (weights * u).sum(dim, keepdim=True), a.shape, a.shape)})


def logsumexp(call: Call, path: Path) -> Affine:
    a, dims = call.args["self"], from_end(call.args["dim"], call.args["self"].dim())
    refuse_batch(a, dims)
    parts = [k / k.sum(dims, keepdim=True) for k in _weights(call, path, "self", dims)]
    return Affine({"self": weighed_sum(call, sum(parts[1:], parts[0]) / len(parts), dims, call.args["keepdim"])})
