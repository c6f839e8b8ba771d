"""What every Triton kernel must give, at odd sizes, strides and memory orders: used in the interpreter and on a GPU.

``TRITON_INTERPRET=1 python tests/kernel_cases.py [KERNEL ...] [--all] [--device=cuda]`` runs them in this process and prints
one JSON line for each comparison: what was compared, the error against float64, and the bound, twice the error of plain PyTorch
in the same type and 1e-6.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import opcheck

aten = torch.ops.aten
FLOOR = 1e-6


@dataclass(frozen=True)
class Setting:
    """Where, and how thoroughly: whether every case and tiling is tried, and whether the operators are checked."""

    dtype: torch.dtype
    device: str = "cpu"
    thorough: bool = False
    opcheck: bool = False

    def some(self, cases: list[Any], count: int) -> list[Any]:
        """All cases, or so many; one for the second type, which runs the same code."""
        return cases if self.thorough else cases[: count if self.dtype == torch.float32 else 1]

    def orders(self, first: bool) -> tuple[str, ...]:
        """Memory orders to try: all of them, or one where they have been tried on another case."""
        every = self.thorough or (first and self.dtype == torch.float32)
        return ("contiguous", "channels-last", "strided") if every else ("channels-last",)

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        chance = torch.Generator().manual_seed(seed + sum(shape))
        return torch.randn(shape, generator=chance).to(self.device, self.dtype)


@dataclass(frozen=True)
class Finding:
    what: str
    error: float
    bound: float


def relative(got: Tensor, expected: Tensor) -> float:
    """``sum|a - ref| / sum|ref|``; infinite where one is finite and the other is not."""
    got, expected = got.double(), expected.double()
    if not torch.equal(got.isfinite(), expected.isfinite()):
        return float("inf")
    keep = expected.isfinite()
    return float((got - expected)[keep].abs().sum() / expected[keep].abs().sum().clamp_min(1e-300))


def same(what: str, got: Tensor, expected: Tensor) -> Finding:
    """No rounding is allowed: NaN equals NaN."""
    equal = got.shape == expected.shape and torch.equal(got.isnan(), expected.isnan())
    equal = equal and torch.equal(got.nan_to_num(), expected.nan_to_num().to(got.dtype))
    return Finding(what, 0.0 if equal else float("inf"), 0.0)


def close(what: str, got: Tensor, reference: Tensor, plain: Tensor) -> Finding:
    return Finding(what, relative(got, reference), 2 * relative(plain, reference) + FLOOR)


def tilings(launch: Callable[[], tuple[object, Tensor]], setting: Setting) -> Iterator[tuple[str, Tensor]]:
    """Runs a launch into memory full of NaN, with one tiling or all of them."""
    count = len(launch()[0].configs) if setting.thorough else 1
    for k in range(count):
        planned, out = launch()
        out.fill_(float("nan"))
        planned.run(planned.configs[k])
        yield f"tiling {k}", out


def reordered(x: Tensor, order: str) -> Tensor:
    """The same values in another memory order: channels innermost, or every other element of a larger tensor."""
    if order == "channels-last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if order == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x


def gate(s: Setting) -> Iterator[Finding]:
    from frpc_kernels import gate as file

    shapes = [(2, 63, 7, 5), (3, 100), (1, 7, 63), (1, 33, 1, 1)]
    for shape in shapes:
        for order in s.orders(shape == shapes[0]):
            z = reordered(s.randn(*shape), order)
            z[0, 0] = torch.tensor(-0.0)
            z[0, 1].flatten()[:1] = float("nan")
            a, bits = file.relu_gate(z)
            expected = file.relu_gate_reference(z)
            yield same(f"relu {shape} {order}", a, torch.relu(z))
            yield same(f"bits {shape} {order}", bits, expected[1])
            v = s.randn(2 * shape[0], *shape[1:], seed=1)
            v[0] = float("nan")
            gated = torch.cat([aten.threshold_backward(part, z, 0) for part in v.chunk(2)])
            yield same(f"gated {shape} {order}", file.gated(v, bits), gated)
            out = torch.empty_like(v)
            for tiling, found in tilings(lambda v=v, bits=bits, out=out: (file.plan_gated(v, bits, out), out), s):
                yield same(f"gated {shape} {order} {tiling}", found, gated)
    z = s.randn(3, 63, 7)
    for kind, plain in (("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu)):
        for order in ("contiguous", "strided"):
            a, c = file.smooth_gate(reordered(z, order), kind)
            ra, rc = file.smooth_gate_reference(z, kind)
            yield close(f"{kind} {order}", a, ra, plain(z))
            yield close(f"coefficient of {kind} {order}", c, rc, rc.to(z.dtype))
    if s.opcheck:
        v = torch.randn_like(z)
        opcheck(file.relu_gate, (z,))
        opcheck(file.gated, (v, file.relu_gate(z)[1]))
        opcheck(file.smooth_gate, (z, "gelu"))


CONVS = [  # B, K, C, O, H, W, kernel, stride, padding, dilation, groups
    (2, 2, 3, 7, 7, 5, (3, 2), 2, 1, 1, 1),
    (1, 1, 63, 100, 7, 5, (3, 3), 1, 1, 1, 1),
    (1, 1, 16, 24, 9, 9, (5, 5), 4, 2, 1, 1),
    (1, 1, 16, 32, 11, 7, (3, 3), 2, 2, 2, 2),
    (1, 1, 7, 1, 8, 8, (1, 1), 2, 0, 1, 1),
    (1, 3, 8, 16, 12, 13, (3, 3), 3, 1, 2, 1),
]


def conv_relevance(s: Setting) -> Iterator[Finding]:
    from frpc_kernels import conv_relevance as file

    for case in s.some(CONVS, 4 if s.opcheck else 1):
        b, k, c, o, h, w, kernel, t, p, d, g = case
        for order in s.orders(case is CONVS[0]):
            v = reordered(s.randn(b * k, c, h, w), order)
            weight = reordered(s.randn(o, c // g, *kernel, seed=1) / (c * kernel[0]), order)
            bias = s.randn(o, seed=2)
            bare = torch.nn.functional.conv2d(v, weight, None, t, p, d, g)
            coefficient = reordered(s.randn(b, *bare.shape[1:], seed=3), order)
            geometry = ([t, t], [p, p], [d, d], g)
            for extra in s.some([(bias, coefficient), (None, None)], 2 if case is CONVS[0] else 1):
                reference = file.conv_relevance_reference(v, weight, *extra, *geometry, 0.25)
                plain = bare
                if extra[0] is not None:
                    plain = (bare + bias.view(-1, 1, 1) * 0.25) * coefficient.repeat(k, 1, 1, 1)
                result = file.conv_relevance(v, weight, *extra, *geometry, 0.25, "tf32x3")
                yield close(f"{case} {order} {'with' if extra[0] is not None else 'without'} epilogue", result, reference, plain)

                def launch(v=v, weight=weight, extra=extra, geometry=geometry, result=result):
                    out = torch.empty_like(result)
                    return file.plan_conv_relevance(v, weight, *extra, out, *geometry, 0.25, "tf32x3"), out

                for tiling, found in tilings(launch, s) if case is CONVS[0] or s.thorough else ():
                    yield close(f"{case} {order} {tiling}", found, reference, plain)
    if s.opcheck:
        opcheck(file.conv_relevance, (v, weight, bias, coefficient, *geometry, 1.0, "tf32x3"))


def conv_transposed_gate(s: Setting) -> Iterator[Finding]:
    from frpc_kernels import conv_transposed_gate as file
    from frpc_kernels.gate import relu_gate

    for case in s.some(CONVS, 4 if s.opcheck else 1):
        b, k, c, o, h, w, kernel, t, p, d, g = case
        for order in s.orders(case is CONVS[0]):
            sizes = [(n + 2 * p - d * (m - 1) - 1) // t + 1 for n, m in zip((h, w), kernel, strict=True)]
            rest = [n - ((m - 1) * t - 2 * p + d * (q - 1) + 1) for n, m, q in zip((h, w), sizes, kernel, strict=True)]
            v = reordered(s.randn(b * k, o, *sizes), order)
            weight = reordered(s.randn(o, c // g, *kernel, seed=1) / (o * kernel[0]), order)
            x = reordered(s.randn(b, c, h, w, seed=2), order)
            bits, skip = relu_gate(x)[1], reordered(s.randn(b * k, c, h, w, seed=3), order)
            geometry = ([t, t], [p, p], rest, [d, d], g)
            bare = torch.ops.aten.convolution(v, weight, None, [t, t], [p, p], [d, d], True, rest, g)
            combinations = [(skip, bits, x), (skip, bits, None), (None, bits, None), (None, None, x), (None, None, None)]
            for extra in s.some(combinations, 5 if case is CONVS[0] else 1):
                reference = file.conv_transposed_gate_reference(v, weight, *extra, *geometry)
                plain = bare if extra[0] is None else bare + skip
                plain = plain if extra[1] is None else plain * (x > 0).repeat(k, 1, 1, 1)
                plain = plain if extra[2] is None else plain * x.repeat(k, 1, 1, 1)
                result = file.conv_transposed_gate(v, weight, *extra, *geometry, "tf32x3")
                yield close(f"{case} {order} {[e is not None for e in extra]}", result, reference, plain)

            def launch(v=v, weight=weight, skip=skip, bits=bits, x=x, result=result, geometry=geometry):
                out = torch.empty_like(result)
                steps = (geometry[0], geometry[1], geometry[3], geometry[4])
                return file.plan_conv_transposed_gate(v, weight, skip, bits, x, out, *steps, "tf32x3"), out

            reference = file.conv_transposed_gate_reference(v, weight, skip, bits, x, *geometry)
            plain = (bare + skip) * (x.relu()).repeat(k, 1, 1, 1)
            for tiling, found in tilings(launch, s) if case is CONVS[0] or s.thorough else ():
                yield close(f"{case} {order} {tiling}", found, reference, plain)
    if s.opcheck:
        opcheck(file.conv_transposed_gate, (v, weight, skip, bits, None, *geometry, "tf32x3"))
        opcheck(file.conv_transposed_gate, (v, weight, None, None, x, *geometry, "tf32x3"))


def window_conv(s: Setting) -> Iterator[Finding]:
    from frpc_kernels import window_conv as file

    cases = [  # B, C, O, h, w, Rh, Rw, kernel, stride, padding, dilation, jump, groups
        (2, 3, 7, 7, 5, 1, 1, 3, 1, 1, 1, 1, 1),
        (1, 63, 33, 3, 3, 2, 1, 3, 2, 1, 1, 2, 1),
        (1, 7, 7, 5, 5, 3, 3, 2, 1, 0, 2, 2, 1),
        (1, 3, 2, 3, 3, 3, 3, 3, 1, 1, 1, 0, 1),
        (1, 16, 16, 3, 3, 1, 1, 3, 1, 1, 1, 2, 2),
    ]
    for case in s.some(cases, 5 if s.opcheck else 1):
        b, c, o, h, w, rh, rw, k, t, p, d, jump, g = case
        for order in s.orders(case is cases[0]):
            u = reordered(s.randn(b, c, h, w, rh, rw), order)
            weight = s.randn(o, c // g, k, k, seed=1) / (c * k)
            size = [(n + 2 * p - d * (k - 1) - 1) // t + 1 for n in (h, w)]
            geometry = (size, [jump, jump], [t, t], [p, p], [d, d], g)
            reference = file.window_conv_reference(u, weight, *geometry)
            result = file.window_conv(u, weight, *geometry, "tf32x3")
            yield close(f"{case} {order}", result, reference, reference.to(u.dtype))

            def launch(u=u, weight=weight, result=result, geometry=geometry):
                out = torch.empty_like(result)
                return file.plan_window_conv(u, weight, out, *geometry[1:], "tf32x3"), out

            for tiling, found in tilings(launch, s) if case is cases[0] or s.thorough else ():
                yield close(f"{case} {order} {tiling}", found, reference, reference.to(u.dtype))
    # Two rows and three columns of the positions alone, from the part of the operand that they need.
    u, weight = s.randn(1, 5, 9, 8, 2, 2), s.randn(4, 5, 3, 3, seed=1)
    whole = file.window_conv_reference(u, weight, [9, 8], [1, 1], [1, 1], [1, 1], [1, 1], 1)
    part = file.window_conv(u[:, :, 3:7, 1:6], weight, [2, 3], [1, 1], [1, 1], [0, 0], [1, 1], 1, "tf32x3")
    expected = whole[:, :, 4:6, 2:5]
    yield close("a part of the positions", part, expected, expected.to(u.dtype))
    if s.opcheck:
        opcheck(file.window_conv, (u, weight, [9, 8], [1, 1], [1, 1], [1, 1], [1, 1], 1, "tf32x3"))


POOLS = [  # B, C, H, W, kernel, stride, padding, dilation, ceil mode
    (2, 7, 7, 5, 3, 2, 1, 1, False),
    (1, 3, 10, 7, 2, 2, 0, 1, True),
    (1, 63, 7, 1, 3, 2, 1, 1, True),
    (1, 4, 7, 5, 3, 1, 1, 2, False),
]


def pool_select(s: Setting) -> Iterator[Finding]:
    from frpc_kernels import pool_select as file
    from frpc_kernels.gate import relu_gate

    for case in s.some(POOLS, 4 if s.opcheck else 1):
        b, c, h, w, k, t, p, d, ceil = case
        for order in s.orders(case is POOLS[0]):
            x = reordered((s.randn(b, c, h, w) * 3).round() / 4, order)  # many ties
            x[0, 0, 3, 0], x[0, 1, :3, :3] = float("nan"), -float("inf")
            geometry = ([k, k], [t, t], [p, p], [d, d])
            y, winner = file.pool_select(x, *geometry, ceil)
            expected, places = aten.max_pool2d_with_indices(x, *geometry, ceil)
            yield same(f"value {case} {order}", y, expected)
            yield same(f"winner {case} {order}", winner, places)
            yield same(f"reference {case}", file.pool_select_reference(x, *geometry, ceil)[1], places)
            v = reordered(s.randn(3 * b, *y.shape[1:], seed=1), order)
            bits = relu_gate(x)[1]
            for gates, given in s.some([(bits, winner), (None, winner), (bits, places)], 3 if case is POOLS[0] else 1):
                reference = file.pool_scatter_reference(v, given, gates, [h, w])
                result = file.pool_scatter(v, given, gates, [h, w], *geometry)
                yield close(f"scatter {case} {order} {gates is not None}", result, reference, reference.to(v.dtype))

            def launch(v=v, winner=winner, bits=bits, result=result, geometry=geometry):
                out = torch.empty_like(result)
                return file.plan_pool_scatter(v, winner, bits, out, *geometry), out

            reference = file.pool_scatter_reference(v, winner, bits, [h, w])
            for tiling, found in tilings(launch, s) if order == "strided" else ():
                yield close(f"scatter {case} {order} {tiling}", found, reference, reference.to(v.dtype))
            if order != "strided":
                continue
            result = file.pool_scatter(v, winner, bits, [h, w], *geometry)
            again = file.pool_scatter(v, winner, bits, [h, w], *geometry)
            yield same(f"the same bits each time {case} {order}", again, result)
    if s.opcheck:
        x = s.randn(2, 3, 7, 5)
        y, winner = file.pool_select(x, *geometry, False)
        opcheck(file.pool_select, (x, *geometry, False))
        opcheck(file.pool_scatter, (y, winner, None, [7, 5], *geometry))


def pool_windows(s: Setting) -> Iterator[Finding]:
    from frpc_kernels import pool_windows as file

    for case in s.some(POOLS, 4 if s.opcheck else 1):
        b, c, h, w, k, t, p, d, ceil = case
        x = s.randn(b, c, h, w)
        winner = aten.max_pool2d_with_indices(x, [k, k], [t, t], [p, p], [d, d], ceil)[1]
        u = s.randn(b, c, h, w, 3, 2, seed=1)
        side, jump = [3 + (k - 1) * d * 2, 2 + (k - 1) * d], [2, 1]
        for order in s.orders(False):
            arguments = (reordered(u, order), winner, w, side, jump, [t, t], [p, p], [0, 0])
            reference = file.pool_windows_reference(*arguments)
            yield same(f"{case} {order}", file.pool_windows(*arguments), reference)

            def launch(arguments=arguments, reference=reference):
                out = torch.empty_like(reference)
                u, winner, columns, _, *geometry = arguments
                return file.plan_pool_windows(u, winner, out, columns, *geometry), out

            for tiling, found in tilings(launch, s) if case is POOLS[0] or s.thorough else ():
                yield same(f"{case} {order} {tiling}", found, reference)
    if s.opcheck:
        opcheck(file.pool_windows, arguments)


def norm_gate(s: Setting) -> Iterator[Finding]:
    from frpc_kernels import norm_gate as file

    for shape in ((2, 7, 63), (5, 100), (1, 3, 2, 7)):
        for centred in (True, False):
            for order in s.some(["strided", "contiguous"], 1):
                width = shape[-1]
                x, g = reordered(s.randn(*shape), order), s.randn(2 * shape[0], *shape[1:], seed=1)
                gamma, beta = s.randn(width, seed=2), s.randn(width, seed=3)
                for affine in ((gamma, beta), (None, None)):
                    y, scale = file.norm_gate(x, *affine, 1e-5, centred)
                    ry, rs = file.norm_gate_reference(x, *affine, 1e-5, centred)
                    where = f"{shape} {'layer' if centred else 'RMS'} norm {order} {affine[0] is not None}"
                    yield close(f"value {where}", y, ry, ry.to(x.dtype))
                    yield close(f"scale {where}", scale, rs, rs.to(x.dtype))
                    pulled = file.norm_pull_reference(g, affine[0], scale, centred)
                    found = file.norm_pull(g, affine[0], scale, centred)
                    yield close(f"pull {where}", found, pulled, pulled.to(x.dtype))

                    def launch(x=x, affine=affine, y=y, scale=scale, centred=centred):
                        out = torch.empty_like(y)
                        return file.plan_norm_gate(x.contiguous(), *affine, out, torch.empty_like(scale), 1e-5, centred), out

                    for tiling, value in tilings(launch, s):
                        yield close(f"value {where} {tiling}", value, ry, ry.to(x.dtype))
    if s.opcheck:
        opcheck(file.norm_gate, (x, gamma, beta, 1e-5, True))
        opcheck(file.norm_pull, (g, gamma, scale, True))


def pattern(x: Tensor) -> Tensor:
    """Where values are NaN, infinite and of which sign, 0, or other numbers."""
    return torch.where(x.isnan(), 9.0, torch.where(x.isinf(), 2 * x.sign(), (x != 0).to(x.dtype)))


def not_finite(s: Setting) -> Iterator[Finding]:
    """Infinities and NaN go where ATen lets them go: nothing passes a shut gate, as through ``threshold_backward``."""
    with np.errstate(invalid="ignore", over="ignore"):  # the interpreter computes in NumPy
        yield from gates_not_finite(s)
        yield from smooth_not_finite(s)


def gates_not_finite(s: Setting) -> Iterator[Finding]:
    from frpc_kernels import conv_transposed_gate, gate, pool_select

    x, v = s.randn(2, 33, 6, 4), s.randn(4, 33, 6, 4, seed=1)
    v[0, :, 2], v[1, ::2, :, 1], v[3, 5:, 0] = float("inf"), float("nan"), -float("inf")
    bits, (_, places) = gate.relu_gate(x)[1], aten.max_pool2d_with_indices(x, [2, 2])

    def shut(u: Tensor) -> Tensor:
        return torch.cat([aten.threshold_backward(part, x, 0) for part in u.chunk(2)])

    yield same("gated", gate.gated(v, bits), shut(v))
    pooled = v[:, :, :3, :2].contiguous()
    pairs = ([2, 2], [2, 2], [0, 0], [1, 1])
    back = [aten.max_pool2d_with_indices_backward(u, x, *pairs, False, places) for u in pooled.chunk(2)]
    yield same("pooled", pool_select.pool_scatter(pooled, places.int(), bits, [6, 4], *pairs), shut(torch.cat(back)))
    weight, g = s.randn(5, 33, 3, 3, seed=2), s.randn(4, 5, 6, 4, seed=3)
    g[0, 0, 2, 2], g[1, 1, 0, 0], g[3, 2, 5, 3] = float("inf"), float("nan"), -float("inf")
    steps = ([1, 1], [1, 1], [0, 0], [1, 1])
    bare = aten.convolution(g, weight, None, *steps[:2], steps[3], True, steps[2], 1)
    for addend in (None, v):
        found = conv_transposed_gate.conv_transposed_gate(g, weight, addend, bits, None, *steps, 1, "tf32x3")
        expected = shut(bare if addend is None else bare + v)
        yield same(f"convolution {addend is not None}", pattern(found), pattern(expected))
        yield same("all kinds occur", torch.tensor([len(pattern(expected).unique())]), torch.tensor([5]))


def smooth_not_finite(s: Setting) -> Iterator[Finding]:
    from frpc_kernels import conv_relevance, gate, norm_gate

    z = s.randn(2, 7, 5, 4)
    z[0, 0, :3, 0] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    for kind, plain in (("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu)):
        a, c = gate.smooth_gate(z, kind)
        yield same(kind, pattern(a), pattern(plain(z.double())))  # ATen's own GELU of infinity is NaN in float32 on CPUs
        yield same(f"coefficient of {kind}", pattern(c), pattern(gate.smooth_gate_reference(z, kind)[1].to(z.dtype)))
    v, weight = torch.cat([z, s.randn(2, 7, 5, 4, seed=1)]), s.randn(3, 7, 1, 1, seed=2)
    c = s.randn(2, 3, 5, 4, seed=3).relu()
    found = conv_relevance.conv_relevance(v, weight, None, c, [1, 1], [0, 0], [1, 1], 1, 1.0, "tf32x3")
    yield same("product", pattern(found), pattern(torch.nn.functional.conv2d(v, weight) * c.repeat(2, 1, 1, 1)))
    g, gamma, scale = s.randn(4, 7, 5, seed=4), s.randn(5, seed=5), s.randn(2, 7, 1, seed=6).abs()
    g[0, 0, 0], g[1, 1, 1:3] = float("inf"), torch.tensor([float("nan"), -float("inf")])
    for centred in (True, False):
        u = g * (scale * gamma).repeat(2, 1, 1)
        expected = u - u.mean(-1, keepdim=True) if centred else u
        yield same(f"norm {centred}", pattern(norm_gate.norm_pull(g, gamma, scale, centred)), pattern(expected))


CASES: dict[str, Callable[[Setting], Iterator[Finding]]] = {
    case.__name__: case
    for case in (gate, conv_relevance, conv_transposed_gate, window_conv, pool_select, pool_windows, norm_gate, not_finite)
}


def main(arguments: list[str]) -> None:
    thorough = "--all" in arguments
    device = "cuda" if "--device=cuda" in arguments else "cpu"
    for name in [a for a in arguments if not a.startswith("--")] or list(CASES):
        for dtype in (torch.float32, torch.float16):
            setting = Setting(dtype, device, thorough, opcheck=dtype == torch.float32)
            for finding in CASES[name](setting):
                line = {"kernel": name, "dtype": str(dtype), **asdict(finding)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
