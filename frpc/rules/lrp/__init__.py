"""Rules of layer-wise relevance propagation, and rules that change the backward pass itself."""

from frpc.rules.lrp import lrp, rectified

__all__ = ["lrp", "rectified"]
