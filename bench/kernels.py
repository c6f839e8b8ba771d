"""Every hand-written kernel beside the ATen operators it replaces, at layers of real nets, as a fraction of what the GPU can do.

Each way is recorded as a CUDA graph and replayed, so that no time of Python's is in a figure. FLOPs and bytes are the least that
the formula needs: products and sums once, every operand and result once through memory. The ceilings are measured in the same
run: a large product in TF32, and a large copy. ``tf32x3`` makes three products of each, so it ends at a third of that ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench.machine import Spread, interleave, machine, make_table, open_console, write_record

__all__ = ["CONVOLUTIONS", "NORMS", "POOLS", "WINDOWS", "Task", "run", "tasks"]

CONVOLUTIONS = (  # where, C, O, side of the operand, kernel, stride, padding
    ("resnet50 layer1.1.conv2", 64, 64, 56, 3, 1, 1),
    ("resnet50 layer1.1.conv3", 64, 256, 56, 1, 1, 0),
    ("resnet50 layer2.0.conv2", 128, 128, 56, 3, 2, 1),
    ("resnet50 layer3.1.conv2", 256, 256, 14, 3, 1, 1),
    ("resnet50 layer4.1.conv2", 512, 512, 7, 3, 1, 1),
    ("vgg16 conv1_2", 64, 64, 224, 3, 1, 1),
    ("vgg16 conv3_3", 256, 256, 56, 3, 1, 1),
    ("vgg16 conv5_3", 512, 512, 14, 3, 1, 1),
)
POOLS = (("resnet50 maxpool", 64, 112, 3, 2, 1), ("vgg16 pool2", 128, 112, 2, 2, 0))  # where, C, side, kernel, stride, padding
NORMS = (("vit_b_16 layer norm", 197, 768), ("convnext_tiny stage 3", 196, 384))  # where, rows a sample, features
WINDOWS = (  # where, C, O, rows and columns of positions wanted, side of the operand's windows, input cells between positions
    ("thesis_alexnet conv2", 96, 256, 16, 16, 4, 2),
    ("vgg16 conv3_3, 8 rows", 256, 256, 8, 56, 32, 4),
)
PRECISIONS = {"tf32x3": 1e-5, "tf32": 5e-3}  # relative L1 distance from ATen in the same precision that counts as right


@dataclass(frozen=True)
class Task:
    """One kernel at one layer.

    Attributes:
        kernel, where: its operator, and the layer whose sizes it has.
        ours, aten, reference: the same results by the kernel, by the ATen operators it replaces, and slowly in float64.
        flops: multiplications and additions, counted apart.
        bytes: of operands and results.
        precision: of its products; empty where there are none.
    """

    kernel: str
    where: str
    ours: Callable[[], Any]
    aten: Callable[[], Any]
    reference: Callable[[], Any]
    flops: float
    bytes: float
    precision: str = ""


def tasks(
    batch: int,
    device: str,
    convolutions: Sequence[tuple[Any, ...]] = CONVOLUTIONS,
    pools: Sequence[tuple[Any, ...]] = POOLS,
    norms: Sequence[tuple[Any, ...]] = NORMS,
    windows: Sequence[tuple[Any, ...]] = WINDOWS,
) -> Iterator[Task]:
    """Every kernel at every layer, one at a time: operands are let go before the next are made."""
    for layer in convolutions:
        yield from _gates(batch, device, *layer[:4])
        for precision in PRECISIONS:
            yield from _products(batch, device, *layer, precision=precision)
    for layer in pools:
        yield from _poolings(batch, device, *layer)
    for layer in norms:
        yield from _norms(batch, device, *layer)
    for layer in windows:
        for precision in PRECISIONS:
            yield _windows(device, *layer, precision=precision)
        yield _pooled_windows(device, *layer)


def _image(batch: int, channels: int, height: int, device: str) -> Tensor:
    return torch.randn(batch, channels, height, height, device=device).to(memory_format=torch.channels_last)


def _traffic(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


def _gates(batch: int, device: str, where: str, channels: int, _outputs: int, side: int) -> Iterator[Task]:
    from frpc_kernels import gate

    z, v = _image(batch, channels, side, device), _image(batch, channels, side, device)
    bits = gate.relu_gate_reference(z)[1]
    yield Task(
        "relu_gate", where, lambda: gate.relu_gate(z), lambda: (z.relu(), z > 0), lambda: gate.relu_gate_reference(z),
        0, 2 * z.nbytes + bits.nbytes,
    )  # fmt: skip
    yield Task(
        "gated", where, lambda: gate.gated(v, bits), lambda: torch.ops.aten.threshold_backward(v, z, 0),
        lambda: gate.gated_reference(v, bits), 0, 2 * v.nbytes + bits.nbytes,
    )  # fmt: skip
    yield Task(
        "smooth_gate", where, lambda: gate.smooth_gate(z, "gelu"), lambda: (F.gelu(z), 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))),
        lambda: gate.smooth_gate_reference(z, "gelu"), 0, 3 * z.nbytes,
    )  # fmt: skip


def _products(
    batch: int, device: str, where: str, channels: int, outputs: int, side: int, k: int, t: int, p: int, precision: str
) -> Iterator[Task]:
    from frpc_kernels import conv_relevance as forth
    from frpc_kernels import conv_transposed_gate as back
    from frpc_kernels import gate

    x = _image(batch, channels, side, device)
    weight = torch.randn(outputs, channels, k, k, device=device) / (channels * k)
    bias, y = torch.randn(outputs, device=device), F.conv2d(x, weight, None, t, p)
    coefficient, g, addend = torch.rand_like(y), torch.randn_like(y), torch.randn_like(x)
    bits, flops = gate.relu_gate_reference(x)[1], 2.0 * y.numel() * weight[0].numel()
    rest = side - ((y.shape[2] - 1) * t - 2 * p + k)
    steps = ([t, t], [p, p], [1, 1], 1)
    yield Task(
        "conv_relevance", where, lambda: forth.conv_relevance(x, weight, bias, coefficient, *steps, 0.5, precision),
        lambda: (F.conv2d(x, weight, None, t, p) + 0.5 * bias.view(-1, 1, 1)) * coefficient,
        lambda: forth.conv_relevance_reference(x, weight, bias, coefficient, *steps, 0.5),
        flops, _traffic(x, weight, bias, coefficient, y), precision,
    )  # fmt: skip
    steps_back = ([t, t], [p, p], [rest, rest], [1, 1], 1)
    yield Task(
        "conv_transposed_gate", where,
        lambda: back.conv_transposed_gate(g, weight, addend, bits, None, *steps_back, precision),
        lambda: (F.conv_transpose2d(g, weight, None, t, p, rest) + addend) * (x > 0),
        lambda: back.conv_transposed_gate_reference(g, weight, addend, bits, None, *steps_back),
        flops, _traffic(g, weight, addend, bits, x), precision,
    )  # fmt: skip


def _poolings(batch: int, device: str, where: str, channels: int, side: int, k: int, t: int, p: int) -> Iterator[Task]:
    from frpc_kernels import gate
    from frpc_kernels import pool_select as pool

    x, steps = _image(batch, channels, side, device), ([k, k], [t, t], [p, p], [1, 1])
    y, places = F.max_pool2d(x, k, t, p, return_indices=True)
    g, winner, bits = torch.randn_like(y), places.int(), gate.relu_gate_reference(x)[1]
    pull = torch.ops.aten.max_pool2d_with_indices_backward
    yield Task(
        "pool_select", where, lambda: pool.pool_select(x, *steps, False), lambda: F.max_pool2d(x, k, t, p, return_indices=True),
        lambda: pool.pool_select_reference(x, *steps, False), 0, _traffic(x, y, winner),
    )  # fmt: skip
    yield Task(
        "pool_scatter", where, lambda: pool.pool_scatter(g, winner, bits, [side, side], *steps),
        lambda: pull(g, x, *steps, False, places) * (x > 0), lambda: pool.pool_scatter_reference(g, winner, bits, [side, side]),
        0, _traffic(g, winner, bits, x),
    )  # fmt: skip


def _norms(batch: int, device: str, where: str, rows: int, width: int) -> Iterator[Task]:
    from frpc_kernels import norm_gate as norm

    x, g = torch.randn(batch, rows, width, device=device), torch.randn(batch, rows, width, device=device)
    gamma, beta = torch.rand(width, device=device), torch.randn(width, device=device)
    scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-6).rsqrt()

    def pulled() -> Tensor:
        back = g * scale * gamma
        return back - back.mean(-1, keepdim=True)

    yield Task(
        "norm_gate", where, lambda: norm.norm_gate(x, gamma, beta, 1e-6, True),
        lambda: torch.ops.aten.native_layer_norm(x, [width], gamma, beta, 1e-6)[::2],
        lambda: norm.norm_gate_reference(x, gamma, beta, 1e-6, True), 0, _traffic(x, x, scale, gamma, beta),
    )  # fmt: skip
    yield Task(
        "norm_pull", where, lambda: norm.norm_pull(g, gamma, scale, True), pulled,
        lambda: norm.norm_pull_reference(g, gamma, scale, True), 0, _traffic(g, g, scale, gamma),
    )  # fmt: skip


def _windows(
    device: str, where: str, channels: int, outputs: int, rows: int, columns: int, side: int, jump: int, precision: str
) -> Task:
    """A 3 x 3 convolution, of whose operand one row and column more lie at each end: nothing is padding."""
    from frpc_kernels import window_conv as file

    u = torch.randn(1, rows + 2, columns + 2, side, side, channels, device=device).permute(0, 5, 1, 2, 3, 4)
    weight, to = torch.randn(outputs, channels, 3, 3, device=device) / (3 * channels), side + 2 * jump
    steps = ([rows, columns], [jump, jump], [1, 1], [0, 0], [1, 1], 1)

    def aten() -> Tensor:
        out = u.new_zeros(1, rows, columns, to, to, outputs)
        for a in range(3):
            for b in range(3):
                part = u[:, :, a : a + rows, b : b + columns].movedim(1, -1) @ weight[:, :, a, b].t()
                out[:, :, :, a * jump : a * jump + side, b * jump : b * jump + side] += part
        return out.permute(0, 5, 1, 2, 3, 4)

    flops = 2.0 * rows * columns * side**2 * weight.numel()
    size = 4 * outputs * rows * columns * to**2
    return Task(
        "window_conv", where, lambda: file.window_conv(u, weight, *steps, precision), aten,
        lambda: file.window_conv_reference(u, weight, *steps), flops, _traffic(u, weight) + size, precision,
    )  # fmt: skip


def _pooled_windows(device: str, where: str, channels: int, _o: int, rows: int, columns: int, side: int, jump: int) -> Task:
    """The windows of a 2 x 2 pooling's operand, half as far apart and that much smaller than those after it."""
    from frpc_kernels import pool_windows as file

    near, small = max(1, jump // 2), side - max(1, jump // 2)
    u = torch.randn(1, 2 * rows, 2 * columns, small, small, channels, device=device).permute(0, 5, 1, 2, 3, 4)
    tap = torch.randint(4, (1, rows, columns, channels), device=device).permute(0, 3, 1, 2)
    top, left = torch.arange(rows, device=device)[:, None] * 2, torch.arange(columns, device=device) * 2
    winner = ((top + tap // 2) * 2 * columns + left + tap % 2).int()
    steps = (2 * columns, [side, side], [near, near], [2, 2], [0, 0], [0, 0])

    def aten() -> Tensor:
        out = u.new_zeros(1, rows, columns, side, side, channels).permute(0, 5, 1, 2, 3, 4)
        for one in range(4):
            a, b = divmod(one, 2)
            won = (tap == one)[..., None, None]
            out[..., a * near : a * near + small, b * near : b * near + small] += u[:, :, a::2, b::2] * won
        return out

    size = 4 * channels * rows * columns * (small**2 + side**2)  # a winner's window is read, the others are not
    return Task(
        "pool_windows", where, lambda: file.pool_windows(u, winner, *steps), aten,
        lambda: file.pool_windows_reference(u, winner, *steps), 0, winner.nbytes + size,
    )  # fmt: skip


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """ATen's products in TF32 or in float32 inside the block, as the kernel's are."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=precision == "tf32"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def distance(ours: Any, theirs: Any) -> float:
    """Relative L1 distance of the first result of each: the second are bits here and bytes there, or the like."""
    a, b = (first[0] if isinstance(first, tuple | list) else first for first in (ours, theirs))
    return float((a.double() - b.double()).abs().sum() / b.double().abs().sum())


def recorded(way: Callable[[], Any]) -> Callable[[], None]:
    """Records a way as a CUDA graph; replaying it takes one launch from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            way()  # tunes, and takes memory
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    return graph.replay


def ceilings(rounds: int) -> dict[str, float]:
    """What this GPU reaches: FLOP/s of a large product in TF32, bytes a second of a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    with products_in("tf32"):
        times = interleave({"product": partial(torch.mm, a, b), "copy": partial(target.copy_, source)}, rounds, "ceilings")
    medians = {name: Spread.of(found).median for name, found in times.items()}
    return {"flops": 2 * 8192.0**3 / medians["product"], "bytes": 2.0 * source.nbytes / medians["copy"]}


def measure(task: Task, rounds: int, top: dict[str, float]) -> dict[str, Any]:
    """Compares a kernel with ATen and times both.

    Raises:
        AssertionError: if they disagree by more than rounding.
    """
    with products_in(task.precision or "tf32x3"):
        off = distance(task.ours(), task.aten())
        if not off <= PRECISIONS[task.precision or "tf32x3"]:
            raise AssertionError(f"{task.kernel} at {task.where} is wrong, so it is not timed: {off:.1e}")
        times = interleave({"kernel": recorded(task.ours), "aten": recorded(task.aten)}, rounds, f"{task.kernel} {task.where}")
    seconds = Spread.of(times["kernel"]).median
    return {
        "kernel": task.kernel,
        "where": task.where,
        "precision": task.precision,
        "differs": off,
        "seconds": {name: asdict(Spread.of(found)) for name, found in times.items()},
        "faster": asdict(Spread.of([a / k for a, k in zip(times["aten"], times["kernel"], strict=True)])),
        "flops_per_second": task.flops / seconds,
        "bytes_per_second": task.bytes / seconds,
        "of_peak_flops": task.flops / seconds / top["flops"],
        "of_peak_bandwidth": task.bytes / seconds / top["bytes"],
    }


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Prints one row for each kernel and layer."""
    table = make_table(
        "kernel", "layer", "", "ms", "ATen ms", "faster", "TFLOP/s", "of peak", "GB/s", "of peak", "differs", left=3
    )
    for r in results:
        table.add_row(
            r["kernel"],
            r["where"],
            r["precision"],
            f"{1e3 * r['seconds']['kernel']['median']:.3g}",
            f"{1e3 * r['seconds']['aten']['median']:.3g}",
            f"{r['faster']['median']:.2f} x",
            f"{r['flops_per_second'] / 1e12:.1f}" if r["flops_per_second"] else "",
            f"{r['of_peak_flops']:.0%}" if r["flops_per_second"] else "",
            f"{r['bytes_per_second'] / 1e9:.0f}",
            f"{r['of_peak_bandwidth']:.0%}",
            f"{r['differs']:.1e}",
        )
    console.print(table)


def run(batch: int, rounds: int, only: Sequence[str], file: Path | None) -> int:
    """Measures every kernel; where there is no CUDA device it says so and writes nothing."""
    from frpc_kernels import why_missing

    console, where = open_console(), machine(torch.get_num_threads())
    missing = "there is no CUDA device here" if not torch.cuda.is_available() else why_missing()
    if missing is not None:
        console.print(f"Nothing was measured: {missing}.")
        return 0
    top = ceilings(rounds)
    console.print(f"ceilings: {top['flops'] / 1e12:.1f} TFLOP/s in TF32, {top['bytes'] / 1e9:.0f} GB/s")
    results = [measure(task, rounds, top) for task in tasks(batch, "cuda") if not only or task.kernel in only]
    show(console, results)
    write_record(console, file, "kernels", {"batch": batch, "rounds": rounds, "ceilings": top}, where, results)
    return 0
