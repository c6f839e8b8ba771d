"""docs/benchmarks.md is what the records in bench/results make it, and shows all of them, missed goals too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from places import ROOT

sys.path.append(str(ROOT))  # bench is run from a checkout and not installed

from bench import page, plots, sections


def spread(median: float) -> dict[str, float]:
    return dict.fromkeys(("median", "low_quartile", "high_quartile", "least", "most"), median)


def record(benchmark: str, *results: dict[str, Any], **settings: Any) -> dict[str, Any]:
    where = {
        "cpu": "ABC", "cores": 4, "threads": 2, "load_before": 0.5, "date": "2026-01-02", "commit": "abcdef0123456789",
        "uncommitted_changes": True, "versions": {"torch": "9.9"}, "gpu": None,
    }  # fmt: skip
    return {"benchmark": benchmark, "command": f"{benchmark} --rounds 5", **settings, "machine": where, "results": list(results)}


def asked(net: str, targets: int, batch: int = 1, **ways: list[float]) -> dict[str, Any]:
    rounds = {"forward": [1.0] * 3, **{name.replace("_", " "): found for name, found in ways.items()}}
    measured = {
        name: {"seconds": spread(found[1]), "ratio": spread(found[1]), "peak_bytes": 1, "rounds": found}
        for name, found in rounds.items()
    }
    return {"net": net, "input": [batch, 3, 8, 8], "targets": targets, "ways": measured}


def test_page_is_up_to_date() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.current(), "run python -m bench page"


def test_figures_of_the_page_are_there() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    for name in plots.PLOTS:
        assert f"figures/{name}.png" not in text or (page.FIGURES / f"{name}.png").is_file(), "run python -m bench page"


def test_every_record_is_shown() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert not [name for name in page.read() if f"`{name}.json`" not in text]


def test_nothing_is_shown_that_was_not_measured() -> None:
    text = page.render({})
    assert text.count("Not measured yet") == len(page.SECTIONS)
    assert "| " not in text and "![" not in text
    assert "nothing in them is estimated" in " ".join(text.split())


def test_missed_goals_are_said_twice() -> None:
    found = record(
        "attribution",
        asked("vgg16", 1, frpc=[1.9] * 3, frpc_forward=[0.95] * 3),
        asked("resnet50", 10, frpc=[7.9] * 3),
        asked("vit_b_16", 1, frpc=[4.0] * 3),
    )
    text = page.render({"attribution-cpu": [found]})
    assert "- vgg16, 1 target: explaining takes 1.90 x forward, the goal is 1.8" in text
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert "| 1.90 |" in rows["vgg16"] and "| 2.00 |" in rows["vgg16"] and sections.MISSED in rows["vgg16"]
    assert rows["resnet50"].rstrip(" |").endswith("met") and sections.MISSED not in rows["vit_b_16"]
    assert "on 2026-01-02 by `python -m bench attribution --rounds 5`" in " ".join(text.split())
    assert "commit abcdef0123 with changes" in " ".join(text.split())


def test_a_gpu_fills_its_own_column() -> None:
    here, there = (record("attribution", asked("resnet50", 1, frpc=[seconds] * 3)) for seconds in (1.7, 1.25))
    text = page.render({"attribution-cpu": [here], "attribution-cuda": [there]})
    (row,) = [line for line in text.splitlines() if line.startswith("| `resnet50`")]
    assert row.rstrip(" |").endswith("1.25")
    assert "No GPU was available" not in text


def test_several_files_of_a_suite_are_one_table() -> None:
    one, two = (record("attribution", asked(net, 1, frpc=[2.0] * 3)) for net in ("alexnet", "vit_b_16"))
    text = page.render({"attribution-cpu": [one], "attribution-nets-cpu": [two]})
    assert text.count("| net | input | K |") == 1
    assert all(f"`{name}.json`" in text for name in ("attribution-cpu", "attribution-nets-cpu"))


@pytest.mark.parametrize("count", [2, 3])
def test_a_figure_of_targets_needs_three_points(count: int, tmp_path: Path) -> None:
    found = record("attribution", *(asked("resnet50", k, frpc=[2.0 + k] * 3) for k in (1, 5, 10)[:count]))
    text = page.render({"attribution-cpu": [found]})
    assert ("figures/cost_targets.png" in text) == (count == 3)
    if count == 3:
        assert plots.by_targets([found]) == {"frpc": [(1, 3.0), (5, 7.0), (10, 12.0)]}
        assert plots.draw("cost_targets", [found], tmp_path).stat().st_size > 1000
