"""Lowering of pools, of columns and of constants: the form it makes, and the same function."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models import resnet

import frpc
from frpc.core.stages import copy_graph
from frpc.optimize.lower import convolutions, memory, onednn, pooling, shares
from graphs import calls, program, randn, with_examples
from lowerings import lowered, needs_onednn
from nets import BasicBlock

aten = torch.ops.aten


def answer(model: nn.Module, x: Tensor, columns: bool) -> tuple[fx.GraphModule, Tensor]:
    """The optimized program of FRP for one target or for K, with views freed, and a seed for it."""
    model = model.to(x.dtype).eval()
    model(x)  # gives lazy layers their sizes
    explainer = frpc.compile(model, (x,))
    target = torch.tensor([[1, 0, 2]]).expand(len(x), 3) if columns else 1
    explainer(x, target=target)
    found = copy_graph(list(explainer.programs.compiled.values())[-1].portable)
    memory.free_views(found)
    return found, explainer.seed_for(x, target=target)


def pooled(overlap: bool) -> nn.Module:
    """Winners of a ReLU; whole windows of zeros among them."""
    torch.manual_seed(0)
    pool = nn.MaxPool2d(3, 2, 1) if overlap else nn.MaxPool2d(2, ceil_mode=True)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 5, 2), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize("columns", [False, True], ids=["one target", "columns"])
@pytest.mark.parametrize("overlap", [False, True])
def test_max_pooling_on_the_way_back(overlap: bool, columns: bool) -> None:
    x = randn(2, 3, 11, 9)
    x[:, :, :6] = 0.0  # ties, and windows where nothing wins
    before, seed = answer(pooled(overlap), x, columns)
    gated, _ = lowered(pooling.gates_before_pools, before, x, seed)
    back = "scatter_add" if columns else "max_pool2d_with_indices_backward"
    gate = "gt.Scalar" if columns else "threshold_backward"
    assert calls(before).index(back) < calls(before).index(gate)
    assert calls(gated).index(gate) < calls(gated).index(back)
    spread, _ = lowered(pooling.scatter_columns, gated, x, seed)
    final, _ = lowered(pooling.pools_without_input, spread, x, seed)
    assert "scatter_add" not in calls(final)
    (node,) = final.graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices_backward.grad_input)
    assert node.args[1] is node.kwargs["grad_input"] and node.args[1].target is aten.empty.memory_format


def test_gates_of_other_values_stay_behind_pools() -> None:
    """What is pooled is no ReLU's result here: its winners may be below 0 where a window's are all."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, v = graph.placeholder("x"), graph.placeholder("v")
        r = graph.call_function(aten.relu.default, (x,))
        pool = graph.call_function(aten.max_pool2d_with_indices.default, (x, [2, 2]))
        indices = graph.call_function(operator.getitem, (pool, 1))
        window = ([2, 2], [2, 2], [0, 0], [1, 1], False)
        back = graph.call_function(aten.max_pool2d_with_indices_backward.default, (v, x, *window, indices))
        return graph.call_function(aten.threshold_backward.default, (back, r, 0))

    before = program(build)
    after, _ = lowered(pooling.gates_before_pools, before, randn(1, 1, 4, 4), randn(1, 1, 2, 2, seed=1))
    assert calls(after) == calls(before)


@needs_onednn
def test_columns_are_summed_as_samples() -> None:
    """So that sums of K targets go into convolutions as those of one do."""
    torch.manual_seed(0)
    block = BasicBlock(4, 4, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), block, nn.Flatten(), nn.LazyLinear(3))
    x = randn(2, 3, 7, 6).float()
    before, seed = answer(model, x, columns=True)
    after = copy_graph(before)
    for one_pass in (convolutions.flip_transposed, onednn.prepack, onednn.sum_samples, onednn.fuse_into_convolutions):
        one_pass(after)
        after.graph.lint()
    after.recompile()
    assert [n for n in calls(after) if "binary" in n][-1] == "mkldnn._convolution_pointwise_.binary"
    fused = [n for n in after.graph.nodes if n.target in onednn.OPERATORS[1:3]]
    assert len(fused) == 2  # a sum on the way there, one on the way back
    for got, expected in zip(after(x, seed), before(x, seed), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_shares_of_constants(kind: str) -> None:
    """Products summed over features are matrix-vector products; running sums and the map's last sum take them in."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)] if kind == "linear" else [*pooled(True)]
    x = randn(2, 6) if kind == "linear" else randn(2, 3, 11, 9)
    before, seed = answer(nn.Sequential(*layers), x, columns=False)
    dotted, _ = lowered(shares.dot_shares, before, x, seed)
    count = sum(isinstance(m, nn.Linear | nn.Conv2d) for m in layers)
    assert calls(dotted).count("mv") == count
    assert calls(dotted).count("mul.Tensor") == 1
    added, _ = lowered(shares.add_shares, dotted, x, seed)
    assert [calls(added).count(name) for name in ("mv", "addmv", "addcmul")] == [1, count - 1, 1]


@pytest.mark.parametrize("columns", [False, True])
def test_shares_of_many_layers_are_one_product(columns: bool) -> None:
    """Sums that two layers share, as a shortcut and the convolution beside it, are made once."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, 2), nn.BatchNorm2d(6))
    blocks = [resnet.BasicBlock(4, 6, 2, shortcut), resnet.BasicBlock(6, 6)]
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *blocks, nn.Flatten(), nn.LazyLinear(3)), randn(2, 3, 11, 9)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    before, seed = answer(model, x, columns=columns)
    dotted, _ = lowered(shares.dot_shares, before, x, seed)
    added, _ = lowered(shares.add_shares, dotted, x, seed)
    held, _ = lowered(memory.hold_views, added, x, seed)
    joined, _ = lowered(shares.join_shares, held, x, seed)
    if not columns:
        assert calls(joined).count("addmv") == calls(joined).count("cat") == 1
        assert calls(joined).count("sum.dim_IntList") == 5  # six convolutions, of which two see the same


def test_views_of_constants_are_held() -> None:
    def build(graph: fx.Graph, constant: Any) -> Any:
        x, w = graph.placeholder("x"), constant("w", randn(5, 4))
        turned = graph.call_function(aten.t.default, (w,))
        copied = graph.call_function(aten.reshape.default, (turned, [20]))  # a view of no view
        return graph.call_function(aten.mm.default, (x, turned)), graph.call_function(aten.neg.default, (copied,))

    before = with_examples(program(build), randn(3, 4))
    after, _ = lowered(memory.hold_views, before, randn(3, 4))
    assert calls(after) == ["reshape", "mm", "neg"]
    (product,) = after.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert getattr(after, product.args[1].target).data_ptr() == before.w.data_ptr()
    assert list(after.state_dict()) == ["w"]
