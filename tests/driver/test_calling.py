"""Calls with dicts, numbers and other values: refused, with a module that makes them of tensors; the module is the right one."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frpc
from frpc.errors import InputError


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Tensor


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, dtype=torch.float64)

    def forward(self, feats: Any, scale: float = 1.0, mask: Any = None, way: str = "plain") -> Tensor:
        if isinstance(feats, Pair):
            feats = {"a": feats.left, "b": feats.right}
        if isinstance(feats, tuple | list):
            feats = {"a": feats[0], "b": feats[1]}
        z = self.layer(torch.stack([feats["a"], feats["b"]], -1)) * scale
        assert way in ("plain", "other")
        return z if mask is None else z * mask[:, None]


A, B = torch.tensor([1.0, -2.0, 3.0]).double(), torch.tensor([0.5, 4.0, -1.0]).double()
CALLS: dict[str, Any] = {
    "dict": ({"a": A, "b": B},),
    "dict and number by name": {"feats": {"a": A, "b": B}, "scale": 2.5},
    "list": ([A, B], 2.0),
    "tuple, None and text": ((A, B), 1.5, None, "other"),
    "dataclass": (Pair(A, B),),
    "keys that are no names": {"feats": {"a": A, "b": B, 3: A}, "scale": -1.0},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_module_that_the_error_shows_is_the_call(name: str) -> None:
    torch.manual_seed(0)
    model, given = Features(), CALLS[name]
    with pytest.raises(InputError, match="The explainer takes tensors, batch first; got ") as error:
        frpc.compile(model, given)
    code = textwrap.dedent(str(error.value).partition("make the call:\n")[2])
    *lines, last = code.splitlines()
    scope: dict[str, Any] = {"nn": nn, "Pair": Pair, "frpc": frpc}
    exec("\n".join(lines), scope)
    taken = last.partition("(Call(model), (")[2].rstrip("),").split(", ")
    tensors = tuple({"b": B, "right": B, "feats_1": B}.get(one, B if one == "x1" else A) for one in taken)
    explainer = frpc.compile(scope["Call"](model), tensors, bias="separate")
    found = explainer(*tensors)
    wanted = model(**given) if isinstance(given, dict) else model(*given)
    assert torch.allclose(found.output, wanted, atol=1e-12)
    scale = given.get("scale", 1.0) if isinstance(given, dict) else (*given, 1.0)[1]
    assert torch.allclose(found.relevance[0], scale * A * model.layer.weight[0, 0], atol=1e-12)
    assert torch.allclose(found.relevance[1], scale * B * model.layer.weight[0, 1], atol=1e-12)
