"""The quicker captures of the tests are PyTorch's own: the same graphs, and operators as they were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
import quick_export
from quick_export import exported_program, fake_impls


class Composed(nn.Module):
    """Operators that stay whole, one that is taken apart at capture, and one that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.instance_norm(self.layer(x)).add_(1)
        score = y.flatten(1).mean(1)
        return F.margin_ranking_loss(score, 2 * score, torch.ones_like(score), reduction="none") + F.gelu(score)


def test_every_name_is_known() -> None:
    assert quick_export.missing == []


def test_graphs_are_those_of_pytorch_itself(monkeypatch):
    torch.manual_seed(0)
    model, x = Composed(), torch.randn(2, 3, 6, 6)
    graphs = [frpc.compile(model, x).compiled(x).program.code for _ in range(3)]
    tables, made = quick_export.taken
    assert tables and made  # tables of the first capture are taken at later ones
    monkeypatch.setattr(exported_program, "_override_composite_implicit_decomp", quick_export._override)
    monkeypatch.setattr(exported_program, "_collect_all_valid_cia_ops", quick_export._collect)
    assert graphs == [frpc.compile(model, x).compiled(x).program.code] * 3
    assert quick_export.taken == [tables, made]  # PyTorch alone made the last


def test_operators_are_as_before_and_an_unknown_choice_goes_pytorchs_way():
    op, choice = torch.ops.aten.margin_ranking_loss.default, lambda *args: NotImplemented
    before = dict(op.py_kernels)
    inside = []
    for expected in ([0, 1], [1, 0]):
        count = list(quick_export.taken)
        with quick_export.overridden({op: choice}):
            inside.append(dict(op.py_kernels))
            assert inside[-1] != before and op in fake_impls.op_implementations_dict
        assert op.py_kernels == before and op not in fake_impls.op_implementations_dict
        assert [a - b for a, b in zip(quick_export.taken, count, strict=True)] == expected
    assert inside[0] == inside[1]
