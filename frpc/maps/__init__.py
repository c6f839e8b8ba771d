"""Linear maps: how relevance moves through one operand of one operator; see :mod:`frpc.maps.base`."""

from frpc.maps.base import Compose, Cost, Identity, LinearMap, LinearOp, Total, Transpose
from frpc.maps.contraction import BatchedMatMul, Conv, MatMul
from frpc.maps.movement import Pad, Place, Shuffle, Slice
from frpc.maps.pointwise import Broadcast, Cast, ReLUGate, Scale, scaled
from frpc.maps.pooling import Center, LinearPool, Pool, Select, Window
from frpc.maps.taps import Taps, WindowSum

__all__ = [
    "BatchedMatMul",
    "Broadcast",
    "Cast",
    "Center",
    "Compose",
    "Conv",
    "Cost",
    "Identity",
    "LinearMap",
    "LinearOp",
    "LinearPool",
    "MatMul",
    "Pad",
    "Place",
    "Pool",
    "ReLUGate",
    "Scale",
    "Select",
    "Shuffle",
    "Slice",
    "Taps",
    "Total",
    "Transpose",
    "Window",
    "WindowSum",
    "scaled",
]
