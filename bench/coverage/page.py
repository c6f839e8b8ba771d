"""Makes docs/coverage.md from the records: totals, a row for each model, every miss with its reason, and other libraries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.coverage.driver import Record, read_records
from bench.coverage.suites import SUITES

__all__ = ["PAGE", "current", "render", "write"]

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "coverage.md", ROOT / "bench" / "results"
PLAIN = 1e-6  # what maps may differ between batches in float32, where rounding does not move PyTorch's own as much
REASON = 160  # characters of a reason that the page keeps

HEAD = """\
# Coverage

<!-- made by `python -m bench coverage --write` from bench/results/coverage_*.jsonl; edit neither, run the command again -->

This page lists the models that frpc was tested on. Each was built with random weights, compiled with `frpc.compile(model, inputs,
bias="uniform")`, and checked for conservation. Parameters are drawn so that nothing is an identity, a zero or a constant:
convolutions `N(0, 2/fan_in)`, linear layers `N(0, 1/fan_in)`, their biases `N(0, 0.1²)`, batch means `N(0, 0.1²)` and variances
`U(0.5, 1.5)`; gains `U(0.5, 1.5)`, layer scales `U(0.05, 0.15)`, other zeros `N(0, 0.1²)`. If a change of the input by a
millionth then changes the output by more than a thousandth, batch statistics are computed from the inputs instead (marked \\*).
Inputs are the smallest that the model accepts, drawn from a unit normal distribution, or random tokens. A full run takes hours;
`python -m bench coverage --suite torchvision --only resnet18` tests one model.

- **nodes**, **ops**: the number of operators that carry relevance, and the number of different kinds among them.
- **compile**: seconds of `frpc.compile` in float32, on one thread, while other models were tested in parallel.
- **error**: the largest `|sum V - y| / sum|V|` for three random targets of two samples. A model is covered if this is at most
  1e-5 in float32 and 1e-11 in float64, and outputs differ from the model's by at most 1e-4 and 1e-10 of the largest. There are
  two exceptions for outputs: 1e-4 is allowed in float64 too if the model itself casts to float32, which frpc does not do in
  float64; and in float32 frpc's outputs may be up to twice as far from the model's float64 outputs as the model's own float32
  outputs are.
- **constants**: `|β| / (|β| + sum|V - β/N|)`, where β is the part of the output that comes from biases and other constants.
- **batch**: the relative L1 distance, in float32 and float64, between the map of a sample alone and its map in a batch of three.
  A model is covered up to 1e-6 and 1e-10; `fixed` means that the model itself fixes the batch size. For another batch size
  PyTorch's kernels add in another order. In some models this rounding, or a ReLU that it moves from one side of 0 to the other,
  changes a map by more than 1e-6. Then the number in parentheses says how exactly float32 determines input x gradient computed by
  PyTorch's autograd, without frpc. It is the largest distance of a float32 map from the float64 map, over the map of the sample
  alone, the map in the batch, and eight maps at inputs changed by a millionth. In float32, a distance of up to twice that number
  counts as covered; the bound for float64 is not relaxed. """

PEERS_HEAD = """\
## Other libraries

The same models with methods of other libraries that promise some form of conservation. Every bias, batch mean and batch shift is
set to 0, so that no relevance goes to constants. **ran**: the promised sum is met within 1 % of `sum|R|`; **off**: it is not met,
and no exception was raised; **raised**: an exception.

- **Captum LRP** promises that relevances sum to the explained output, **Captum DeepLift** that they sum to `f(x) - f(0)`; both
  report the difference as their convergence delta.
- **zennit EpsilonPlus**, with zennit's own canonizers for the model's family, starts from 1 at the target: relevances sum to 1.
- **lxt AttnLRP** (lxt's efficient form) promises that relevances sum to the explained output. Like the other methods it runs with
  the library versions named above.
"""


def render(suites: Mapping[str, Mapping[str, Record]], peers: Mapping[str, Mapping[str, Record]]) -> str:
    """Returns the page.

    Args:
        suites: records of each suite, by model.
        peers: records of the peers, for each suite.
    """
    tried = {suite: records for suite, records in suites.items() if records}
    parts = [HEAD, _provenance(tried), _totals(tried), _rounded(tried)]
    parts += [_suite(suite, records) for suite, records in tried.items()]
    compared = {suite: records for suite, records in peers.items() if records}
    if compared:
        parts += [PEERS_HEAD, *(_peers(suite, records) for suite, records in compared.items())]
    return "\n".join(parts)


def current() -> str:
    """Returns the page as the records in bench/results make it."""
    files = {suite: RESULTS / f"coverage_{suite}.jsonl" for suite in SUITES}
    peers = {suite: file.with_name(f"{file.stem}_peers.jsonl") for suite, file in files.items()}
    known, compared = ({suite: read_records(file) for suite, file in found.items()} for found in (files, peers))
    return render(known, compared)


def write() -> None:
    """Writes docs/coverage.md."""
    PAGE.write_text(current(), encoding="utf-8")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Returns a table in Markdown, of which the first ``words`` columns are words and the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    cells = [heads, rule, *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _provenance(suites: Mapping[str, Mapping[str, Record]]) -> str:
    """Says when, where and with what the records were made."""
    records = [record for found in suites.values() for record in found.values()]
    dates = sorted(r["date"] for r in records if "date" in r)
    versions = sorted({f"{name} {version}" for r in records for name, version in r.get("versions", {}).items()})
    commits = sorted({str(r["commit"])[:10] for r in records if r.get("commit")})
    machines = sorted({r["cpu"] for r in records if "cpu" in r})
    if not dates:
        return "No model was tested yet.\n"
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"Run {when} on {'; '.join(machines)}; {', '.join(versions)}; commits {', '.join(commits)}.\n"


def _rounded(suites: Mapping[str, Mapping[str, Record]]) -> str:
    """Says how many models count as covered although float32 moves their maps, and how far float64 moves any."""
    records = [record for found in suites.values() for record in found.values() if record["status"] == "ok"]
    single = [record["variance_float32"] for record in records if record.get("variance_float32") is not None]
    double = [record["variance_float64"] for record in records if record.get("variance_float64") is not None]
    if not single or not double:
        return ""
    beyond = sum(v > PLAIN for v in single)
    return (
        f"Of {len(single)} covered models with a free batch size, {beyond} exceed {PLAIN:.0e} between batches in float32;\n"
        f"in float64 none exceeds {max(double):.0e}. The table combines records of several commits: models tested before\n"
        "batch statistics could be computed from the inputs were not tested again for this.\n"
    )


def _totals(suites: Mapping[str, Mapping[str, Record]]) -> str:
    rows = []
    for suite, records in suites.items():
        statuses = Counter(r["status"] for r in records.values())
        others = ", ".join(f"{count} {status}" for status, count in statuses.most_common() if status != "ok")
        share = f"{statuses['ok'] / len(records):.0%}"
        rows.append((f"[{suite}](#{suite})", others or "none", str(statuses["ok"]), str(len(records)), share))
    return table(("suite", "not covered", "covered", "tested", "share"), rows, 2)


def _suite(suite: str, records: Mapping[str, Record]) -> str:
    ran = {name: r for name, r in records.items() if "error_float32" in r}
    heads = ("model", "input", "nodes", "ops", "compile s", "error f32", "error f64", "constants", "batch f32", "batch f64")
    parts = [f"## {suite}\n", table(heads, (_row(name, r) for name, r in ran.items()), 2)]
    missed = {name: r for name, r in records.items() if r["status"] != "ok"}
    if missed:
        parts.append(table(("not covered", "how", "why"), (_miss(name, r) for name, r in missed.items()), 3))
    return "\n".join(parts)


def _row(name: str, r: Record) -> tuple[str, ...]:
    sizes = ", ".join("×".join(map(str, shape)) for shape in r["input"])
    errors = (_small(r["error_float32"]), _small(r["error_float64"]))
    share = "not finite" if r["constants"] is None else f"{r['constants']:.1%}"
    batch = (_batch(r, "float32"), _batch(r, "float64"))
    marked = f"`{name}`" + ("\\*" if r.get("settled") else "")
    return (marked, sizes, str(r["nodes"]), str(len(r["ops"])), f"{r['compile_seconds']:.1f}", *errors, share, *batch)


def _batch(r: Record, dtype: str) -> str:
    """Shows the batch variance, in float32 with what rounding does to plain PyTorch where that was needed."""
    own, plain = r[f"variance_{dtype}"], r.get("plain_rounding") if dtype == "float32" else None
    shown = "fixed" if own is None else _small(own)
    return shown if plain is None else f"{own:.1e} ({plain:.1e})"


def _small(value: float | None) -> str:
    return "not finite" if value is None else "0" if value == 0 else f"{value:.0e}"


def _miss(name: str, r: Record) -> tuple[str, str, str]:
    if r["status"] == "missing":
        return f"`{name}`", "missing", "; ".join(f"`{cause.split(' — ')[0]}` ({cause.split(' — ')[1]})" for cause in r["missing"])
    why = " ".join(f"{r.get('error', '')} {r.get('reason', '')}".split())
    return f"`{name}`", r["status"], why if len(why) <= REASON else f"{why[:REASON]}…"


def _peers(suite: str, records: Mapping[str, Record]) -> str:
    methods = sorted({method for r in records.values() for method in r.get("peers", {})})
    counts = [(m, *(str(_count(records, m, status)) for status in ("ran", "off", "raised"))) for m in methods]
    rows = [(f"`{name}`", *(_outcome(r, m) for m in methods)) for name, r in records.items()]
    totals, details = table(("method", "ran", "off", "raised"), counts), table(("model", *methods), rows, 1 + len(methods))
    return f"### {suite}\n\n{totals}\n{details}"


def _count(records: Mapping[str, Record], method: str, status: str) -> int:
    return sum(r.get("peers", {}).get(method, {}).get("status") == status for r in records.values())


def _outcome(r: Record, method: str) -> str:
    if method not in r.get("peers", {}):
        return str(r.get("status", ""))
    found = r["peers"][method]
    if found["status"] == "raised":
        return f"raised: {found['reason'][: REASON // 2]}"
    return f"{found['status']}, {_small(found['error'])}"
