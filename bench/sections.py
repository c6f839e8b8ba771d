"""What docs/benchmarks.md shows of each benchmark's records: one table, and the goals that are missed.

A record is what :func:`bench.machine.write_record` wrote; one benchmark may have several files. Every section takes its records
and returns Markdown.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench import attribution as attributing
from bench import memory as remembering
from bench import methods as explaining
from bench import neurons as mapping
from bench import planner as planning
from bench.case import CAPTUM, COMPILED, EXPLAIN, FORWARD, GRADIENT, GRADIENTS, OWN
from bench.compiling import FIRST, PEER, TOTAL
from bench.coverage.page import table

__all__ = [
    "attribution",
    "compilation",
    "export",
    "files",
    "growth",
    "judged",
    "kernels",
    "memory",
    "methods",
    "missed",
    "neurons",
    "planner",
    "serving",
    "streams",
]

Record = Mapping[str, Any]
MISSED = "**missed**"


def results(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [result for record in records for result in record["results"]]


def judged(result: Mapping[str, Any]) -> dict[str, Any]:
    """An attribution result with today's goals, and the ratios they are held against, from its rounds."""
    ways, targets = result["ways"], result.get("targets", 1)
    rounds = {name: way["rounds"] for name, way in ways.items()}
    over = {
        name: {"median": statistics.median(a / b for a, b in zip(rounds[EXPLAIN], other, strict=True))}
        for name, other in rounds.items()
    }
    goals = attributing.goals(result["net"], result["input"][0], targets)
    return {**result, "targets": targets, "goals": goals, "explaining_over": over}


# ---- one program, one call --------------------------------------------------------------------------------------


def attribution(records: Sequence[Record], on_gpu: Sequence[Record]) -> str:
    """Explaining in forward passes, one row for each net, input and K."""
    there = {_asked(r): r["ways"][EXPLAIN]["ratio"] for r in results(on_gpu)}
    peers = (GRADIENT, GRADIENTS, COMPILED, CAPTUM)
    heads = ("net", "input", "K", "forward, ms", "frpc, ms", "frpc", "quartiles", "over its own forward", *peers)
    rows = []
    for result in map(judged, results(records)):
        ways = result["ways"]
        own, ratio = result["explaining_over"].get(OWN), ways[EXPLAIN]["ratio"]
        rows.append(
            [
                f"`{result['net']}`",
                _size(result["input"]),
                str(result["targets"]),
                _ms(ways[FORWARD]["seconds"]),
                _ms(ways[EXPLAIN]["seconds"]),
                f"{ratio['median']:.2f}",
                _quartiles(ratio),
                "" if own is None else f"{own['median']:.2f}",
                *(f"{ways[name]['ratio']['median']:.2f}" if name in ways else "" for name in peers),
                _verdict(result["goals"], attributing.missed_goals(result)),
                _median(there.get(_asked(result))),
            ]
        )
    return table((*heads, "goals", "frpc on a GPU"), rows, 3)


def memory(records: Sequence[Record], on_gpu: Sequence[Record]) -> str:
    """Peak memory, one row for each net, input and K."""
    there = {_asked(r): r["ways"][EXPLAIN]["peak_bytes"] for r in results(on_gpu)}
    heads = ("net", "input", "K", *(f"{name}, MB" for name in remembering.NAMES), "of autograd's", "predicted", "goals")
    rows = []
    for result in results(records):
        peaks = {name: way["peak_bytes"] for name, way in result["ways"].items()}
        guess, gpu = result["predicted_bytes"], there.get(_asked(result))
        held = {"any": 0.0} if result["goal"] is not None or guess is not None else {}
        rows.append(
            [
                f"`{result['net']}`",
                _size(result["input"]),
                str(result["targets"]),
                *(f"{peaks[name] / 1e6:.3g}" if name in peaks else "" for name in remembering.NAMES),
                f"{peaks[EXPLAIN] / peaks[GRADIENT]:.2f}",
                "" if guess is None else f"{guess / peaks[EXPLAIN]:.2f} x",
                _verdict(held, remembering.missed_goals(result)),
                "" if gpu is None else f"{gpu / 1e6:.3g}",
            ]
        )
    return table((*heads, "frpc on a GPU, MB"), rows, 3)


def methods(records: Sequence[Record]) -> str:
    """Methods by nets, in forward passes."""
    found = {result["net"]: result["ways"] for result in results(records)}
    names = dict.fromkeys(name for ways in found.values() for name in ways if name != FORWARD)
    rows = []
    for name in names:
        goal, cells = explaining.GOALS.get(name), []
        for ways in found.values():
            ratio = ways[name]["ratio"] if name in ways else None
            text = "" if ratio is None else f"{ratio['median']:.2f} ({_quartiles(ratio)})"
            late = ratio is not None and goal is not None and ratio["median"] > goal
            cells.append(f"{text} {MISSED}" if late else text)
        rows.append([name, *cells, "" if goal is None else f"{goal}"])
    return table(("method", *(f"`{net}`" for net in found), "goal"), rows)


def compilation(records: Sequence[Record]) -> str:
    """Seconds of each stage."""
    found = results(records)
    names = dict.fromkeys(name for result in found for name in result["ways"])
    stages = [*(n for n in names if n not in (TOTAL, FIRST, PEER)), *(n for n in (TOTAL, FIRST, PEER) if n in names)]
    rows = []
    for result in found:
        medians = {name: way["seconds"]["median"] for name, way in result["ways"].items()}
        cells = [f"{medians[name]:.2g}" if name in medians else "" for name in stages]
        rows.append([f"`{result['net']}`", str(result["nodes"]), str(result["calls"]), *cells])
    return table(("net", "nodes", "calls", *stages), rows)


def kernels(records: Sequence[Record]) -> str:
    """Kernels as a fraction of the GPU's ceilings."""
    heads = ("kernel", "layer", "products", "ms", "ATen, ms", "faster", "TFLOP/s", "of peak", "GB/s", "of peak")
    rows = [
        [
            f"`{r['kernel']}`",
            r["where"],
            r["precision"],
            _ms(r["seconds"]["kernel"]),
            _ms(r["seconds"]["aten"]),
            f"{r['faster']['median']:.2f} x",
            f"{r['flops_per_second'] / 1e12:.1f}" if r["flops_per_second"] else "",
            f"{r['of_peak_flops']:.0%}" if r["flops_per_second"] else "",
            f"{r['bytes_per_second'] / 1e9:.0f}",
            f"{r['of_peak_bandwidth']:.0%}",
        ]
        for r in results(records)
    ]
    tops = [record["ceilings"] for record in records]
    above = "; ".join(f"{top['flops'] / 1e12:.1f} TFLOP/s in TF32, {top['bytes'] / 1e9:.0f} GB/s" for top in tops)
    return f"Ceilings: {above}.\n\n{table(heads, rows, 3)}"


# ---- every neuron of a layer ------------------------------------------------------------------------------------


def neurons(records: Sequence[Record]) -> str:
    """All maps of a layer beside other ways."""
    found = results(records)
    peers = list(
        dict.fromkeys(n for r in found for n, way in r["ways"].items() if n not in (FORWARD, EXPLAIN) and "ratio" in way)
    )
    heads = ("net", "layer", "input", "neurons", "window", "frpc, ms", "forwards", *(f"faster than {peer}" for peer in peers))
    rows = []
    for result in found:
        ways = result["ways"]
        rows.append(
            [
                f"`{result['net']}`",
                f"`{result['layer']}`",
                _size(result["input"]),
                f"{result['neurons']:,}",
                "×".join(map(str, result["window"])),
                _ms(ways[EXPLAIN]["seconds"]),
                f"{ways[EXPLAIN]['ratio']['median']:.2f} ({_quartiles(ways[EXPLAIN]['ratio'])})",
                *(_times(ways[p]["frpc_is_faster"]["median"]) if "ratio" in ways.get(p, {}) else "" for p in peers),
            ]
        )
    return table(heads, rows, 3)


def growth(records: Sequence[Record]) -> str:
    """Cost of all maps as one thing grows."""
    heads = ("grows", "to", "neurons", "window", "GFLOP", "forward, ms", "maps, ms", "forwards", "dense, s", "faster")
    rows = []
    for r in results(records):
        seconds = {name: found["median"] for name, found in r["seconds"].items()}
        rows.append(
            [
                r["grows"],
                r["value"],
                f"{r['neurons']:,}",
                "×".join(map(str, r["window"])),
                f"{r['flops'] / 1e9:.3g}",
                f"{1e3 * seconds['forward']:.1f}",
                f"{1e3 * seconds['frpc']:.1f}",
                f"{r['ratio']['median']:.2f}",
                f"{seconds['dense']:.3g}",
                _times(seconds["dense"] / seconds["frpc"]),
            ]
        )
    return table(heads, rows, 2)


def planner(records: Sequence[Record]) -> str:
    """The planner's choice of each layer beside the best that was measured."""
    rows = []
    for r in results(records):
        late = r["ratio"] is not None and r["ratio"] > planning.GOAL
        seconds = [f"{name} {found:.3g} s" for name, found in r["seconds"].items()]
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}{' ' + MISSED if late else ''}"
        rows.append([f"`{r['net']}`", f"`{r['layer']}`", r["chosen"], r["best"], "; ".join(seconds), ratio])
    return table(("net and side", "layer", "chosen", "best", "measured", "chosen / best"), rows, 5)


def streams(records: Sequence[Record]) -> str:
    """Layers whose maps do not fit in memory."""
    heads = ("net", "layer", "neurons", "maps, GB", "GFLOP", "seconds", "GFLOP/s", "peak memory, GB", "before, GB")
    rows = [
        [
            f"`{r['net']}`",
            f"`{r['layer']}`",
            f"{r['neurons']:,}" + ("" if r["neurons"] == r["neurons_of_layer"] else f" of {r['neurons_of_layer']:,}"),
            f"{r['map_bytes'] / 1e9:.1f}",
            f"{r['flops'] / 1e9:,.0f}",
            f"{r['seconds']:.1f}",
            f"{r['gflop_per_second']:.0f}",
            f"{r['peak_rss'] / 1e9:.2f}",
            f"{r['peak_rss_before'] / 1e9:.2f}",
        ]
        for r in results(records)
    ]
    return table(heads, rows, 2)


# ---- elsewhere --------------------------------------------------------------------------------------------------


def export(records: Sequence[Record]) -> str:
    """Explaining in ONNX Runtime."""
    rows = []
    for r in results(records):
        for one in r["asked"]:
            ratio = one["ratio"]
            times = (_ms(r["forward"]), _ms(one["seconds"]), f"{ratio['median']:.2f}", _quartiles(ratio))
            rows.append([f"`{r['net']}`", one["targets"], *times])
    return table(("net", "targets", "forward, ms", "explaining, ms", "forwards", "quartiles"), rows, 2)


def files(records: Sequence[Record]) -> str:
    """Program files."""
    rows = [
        [
            f"`{r['net']}`",
            f"{r['file_bytes'] / r['weights_bytes']:.4f}",
            f"{r['reference_bytes'] / 1e6:.2f}",
            f"{r['save_seconds']:.2f}",
            *(f"{r[name]['median']:.2f}" for name in ("load", "first", "later")),
        ]
        for r in results(records)
    ]
    heads = ("net", "file / weights", "by reference, MB", "saving, s", "loading, s", "first answer, s", "later, s")
    return table(heads, rows)


def gpu(records: Sequence[Record]) -> str:
    """The parts of the GPU's command, and what each found."""
    parts = results(records)
    rows = [[f"`{r['part']}`", r["what"], r["status"], r["reason"], f"{r['seconds']:.0f}"] for r in parts]
    found = [(r["part"], one["line"]) for r in parts for one in r["results"] if "line" in one]
    lines = "".join(f"- `{part}`: {line}\n" for part, line in found)
    return table(("part", "shows", "result", "reason", "seconds"), rows, 4) + (f"\n{lines}" if found else "")


def serving(records: Sequence[Record]) -> str:
    """The serving examples under load."""
    rows = [
        [r["service"], f"{r['rate']:g}", str(r["answered"]), str(r["refused"])]
        + [f"{r[name]:.0f}" for name in ("p50", "p95", "p99", "largest")]
        for r in results(records)
    ]
    return table(("service", "requests / s", "answered", "refused", "p50, ms", "p95, ms", "p99, ms", "largest, ms"), rows)


def missed(found: Mapping[str, Sequence[Record]]) -> list[str]:
    """Every goal that the records miss, by benchmark, in words."""
    lines = [line for r in results(found["attribution"]) for line in attributing.missed_goals(judged(r))]
    for result in results(found["methods"]):
        for name, way in result["ways"].items():
            goal, ratio = explaining.GOALS.get(name), way["ratio"]["median"]
            if goal is not None and ratio > goal:
                lines.append(f"{result['net']}, {name}: {ratio:.2f} forwards, the goal is {goal}")
    lines += [line for r in results(found["memory"]) for line in remembering.missed_goals(r)]
    lines += [f"{r['net']} {r['layer']}: {line}" for r in results(found["neurons"]) for line in mapping.missed_goals(r)]
    return lines


def _asked(result: Mapping[str, Any]) -> tuple[str, str, int]:
    return result["net"], _size(result["input"]), result.get("targets", 1)


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _ms(spread: Mapping[str, float]) -> str:
    return f"{1e3 * spread['median']:.3g}"


def _times(factor: float) -> str:
    return f"{factor:,.0f} x" if factor >= 100 else f"{factor:.3g} x"


def _median(spread: Mapping[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2f}"


def _quartiles(spread: Mapping[str, float]) -> str:
    return f"{spread['low_quartile']:.2f}–{spread['high_quartile']:.2f}"


def _verdict(goals: Mapping[str, float], short: Sequence[str]) -> str:
    return "" if not goals else MISSED if short else "met"
