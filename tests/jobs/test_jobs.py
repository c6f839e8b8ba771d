"""Jobs: every sample exactly once and the same bits, wherever the process was killed, whichever engine ran."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import frpc
from frpc import jobs
from frpc.errors import DataError, OptionError, OutputFolderError, TargetError
from frpc.integrations.images import prepare
from frpc.jobs import store, work
from job_runs import (
    RECIPE,
    Deadly,
    child,
    contents,
    killed_until_done,
    load,
    make_folder,
    picture,
    processes,
    seconds_of,
    task_of,
)
from places import TESTS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures"), 10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A job that nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    jobs.run(task_of(data, out), {"name": "tiny"})
    return out


@pytest.fixture
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compilation for all jobs of a test; what it gives is the same each time."""
    kept: dict[tuple[Any, ...], Any] = {}

    def once(model: nn.Module, inputs: Any, **options: Any) -> Any:
        key = tuple(options.items())
        kept[key] = kept.get(key) or frpc.compile(model, inputs, **options)
        return kept[key]

    monkeypatch.setattr(work, "compile", once)


# What is written --------------------------------------------------------------------------------------------------------------


def test_every_sample_has_the_map_that_it_has_alone(data: Path, finished: Path):
    model, _ = load()
    explainer = frpc.compile(model)
    seen = []
    for entry, tensors in jobs.read_results(finished):
        seen.append(entry["index"])
        if entry["status"] == "failed":
            assert (entry["name"], tensors) == ("a/002.png", {}) and "not an image" in entry["reason"]
            continue
        x = prepare(data / entry["name"], RECIPE).pixels
        target = int(model(x).argmax())
        output, relevance = explainer(x, target=target)
        assert entry["target"] == int(tensors["target"]) == target
        torch.testing.assert_close(tensors["relevance"], relevance[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(tensors["output"], output[0])
        gap = abs(float(tensors["relevance"].double().sum()) - float(output[0, target]))
        assert gap / float(relevance.double().abs().sum()) <= 1e-6
    assert seen == list(range(10))


def test_the_index_has_a_line_for_each_sample(finished: Path):
    lines = [json.loads(line) for line in (finished / "index.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(10))
    assert [line["name"] for line in lines] == sorted(line["name"] for line in lines)
    assert sum(line["status"] == "failed" for line in lines) == 1
    assert {line["shard"] for line in lines if line["status"] == "done"} == {f"0000{k}.safetensors" for k in range(3)}
    assert lines == [entry for entry, _ in jobs.read_results(finished)]


def test_done_jobs_are_not_done_again(data: Path, finished: Path, monkeypatch):
    before = contents(finished)
    monkeypatch.setattr("frpc.jobs.job.Worker", None)
    counts: list[int] = []
    summary = jobs.run(task_of(data, finished), {"name": "tiny"}, begin=counts.append)
    assert summary.resumed == summary.count == 10 == counts[0] and contents(finished) == before
    assert [failure.name for failure in summary.failures] == ["a/002.png"]


@pytest.mark.usefixtures("compiled_once")
def test_methods_targets_and_pictures(tmp_path: Path, data: Path):
    out = tmp_path / "out"
    jobs.run(task_of(data, out, method="lid-ig", target="3", pictures=True), {})
    model, _ = load()
    at_zero = model(torch.zeros(1, 3, 16, 16))[0, 3]
    rows = [(entry, tensors) for entry, tensors in jobs.read_results(out) if tensors]
    for entry, tensors in rows:
        assert entry["target"] == 3
        torch.testing.assert_close(tensors["relevance"].sum(), (tensors["output"][3] - at_zero).detach(), rtol=0, atol=1e-5)
    drawn = sorted(path.name for path in (out / "png").iterdir())
    assert drawn == [f"{entry['index']:06d}-{Path(entry['name']).name}.png" for entry, _ in rows]
    with pytest.raises(TargetError, match="target 5 is out of range"):
        jobs.run(task_of(data, tmp_path / "other", target="5"), {})


# Kills ------------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_stopped_at_any_rename(tmp_path: Path, data: Path, finished: Path, monkeypatch, moment: str):
    """Manifest, three shards and index are renamed into place: the job stops before or after each of them."""
    rename = os.replace
    for at in range(5):
        out, calls = tmp_path / str(at), iter(range(100))

        def stop(old: Any, new: Any, at: int = at, calls: Any = calls) -> None:
            last = next(calls) == at
            if last and moment == "before":
                raise Killed
            rename(old, new)
            if last:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(store.os, "replace", stop)
            with pytest.raises(Killed):
                jobs.run(task_of(data, out), {"name": "tiny"})
        assert [path.suffix for path in out.rglob(".*.part")] == ([".part"] if moment == "before" else [])
        jobs.run(task_of(data, out), {"name": "tiny"})
        assert contents(out) == contents(finished)


def test_killed_twice(tmp_path: Path):
    data, context = make_folder(tmp_path / "data", 60), processes("frpc.jobs")

    def start(out: Path) -> Any:
        process = context.Process(target=child, args=(data, out))
        process.start()
        return process

    start(tmp_path / "whole").join()
    outs = killed_until_done(start, tmp_path / "killed", 2, seconds_of(tmp_path / "whole"))
    assert all(contents(out) == contents(tmp_path / "whole") for out in outs)
    assert [entry["index"] for entry, _ in jobs.read_results(outs[-1])] == list(range(60))


# What else can be wrong with a folder -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiled_once")
def test_a_damaged_shard_is_done_again_and_said(tmp_path: Path, data: Path, finished: Path):
    jobs.run(task_of(data, tmp_path), {"name": "tiny"})
    shards = sorted((tmp_path / "shards").iterdir())
    shards[0].write_bytes(shards[0].read_bytes()[:-5])
    shards[1].write_bytes(shards[2].read_bytes())  # another shard's, whole
    summary = jobs.run(task_of(data, tmp_path), {"name": "tiny"})
    assert [problem.split(":")[0] for problem in summary.damaged] == ["00000.safetensors", "00001.safetensors"]
    assert "does not contain the samples 4 to 7 exactly once" in summary.damaged[1] and summary.resumed == 2
    assert contents(tmp_path) == contents(finished)


def test_another_job_is_refused(data: Path, finished: Path):
    with pytest.raises(OptionError) as caught:
        jobs.run(task_of(data, finished, batch_size=2, method="lid-ig"), {"name": "tiny"})
    assert str(caught.value) == (
        f"{finished} contains a different job:\n"
        '  method: "frp" in the folder, "lid-ig" requested\n  bias: "uniform" in the folder, null requested\n'
        "  batch_size: 3 in the folder, 2 requested\n"
        "  Use the same options to resume it, or choose another --out"
    )


def test_changed_data_is_another_job(tmp_path: Path, finished: Path):
    data = make_folder(tmp_path, 10)
    (data / "b" / "000.png").write_bytes(picture(0) + b"more")
    with pytest.raises(OptionError, match=r"data\.sha256"):
        jobs.run(task_of(data, finished), {"name": "tiny"})


def test_two_processes_do_not_share_a_folder(tmp_path: Path, data: Path):
    task = task_of(data, tmp_path)
    with task.store.held({}), pytest.raises(OptionError, match="another process is writing to"), task.store.held({}):
        pass


def test_shards_without_a_manifest_are_refused(tmp_path: Path, data: Path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.safetensors").write_bytes(b"")
    with pytest.raises(OptionError, match=r"contains shards but no manifest\.json"):
        jobs.run(task_of(data, tmp_path), {})


@pytest.mark.usefixtures("compiled_once")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, data: Path, finished: Path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", full)
        with pytest.raises(OutputFolderError, match="No space left on device"):
            jobs.run(task_of(data, tmp_path), {"name": "tiny"})
    assert not list(tmp_path.rglob("*.part"))
    jobs.run(task_of(data, tmp_path), {"name": "tiny"})
    assert contents(tmp_path) == contents(finished)


# Samples that fail ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiled_once")
def test_a_file_that_vanishes_and_a_shard_where_all_fail(tmp_path: Path):
    data = make_folder(tmp_path / "data", 4)
    task = task_of(data, tmp_path / "out", size=1)
    (data / "b" / "000.png").unlink()
    summary = jobs.run(task, {})
    assert [(f.index, f.name) for f in summary.failures] == [(1, "a/002.png"), (2, "b/000.png")]
    assert summary.failures[1].reason == "cannot be read: No such file or directory"
    assert [entry["status"] for entry, _ in jobs.read_results(tmp_path / "out")] == ["done", "failed", "failed", "done"]


def test_a_map_that_is_not_finite_is_a_failure(tmp_path: Path, data: Path):
    def overflowing() -> jobs.Classifier:
        model, recipe = load()
        with torch.no_grad():
            model.classifier.weight.mul_(torch.inf)
        return model, recipe

    summary = jobs.run(replace(task_of(data, tmp_path), load=overflowing), {})
    assert {f.reason for f in summary.failures if f.name != "a/002.png"} == {"the output or its map contains NaN or Inf"}
    assert len(summary.failures) == 10


def test_data_errors(tmp_path: Path):
    with pytest.raises(DataError, match="no such data"):
        jobs.open_samples(tmp_path / "nothing")
    with pytest.raises(DataError, match="contains no pictures"):
        jobs.open_samples(tmp_path)
    (tmp_path / "words.txt").write_text("words")
    with pytest.raises(DataError, match=r"is neither a folder nor a \.parquet file"):
        jobs.open_samples(tmp_path / "words.txt")
    with pytest.raises(DataError, match="is a folder of pictures, which has no column 'label'"):
        jobs.open_samples(make_folder(tmp_path, 2), label="label")


# Parquet ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two files of several row groups; the pictures of the folder, one of them missing, and labels."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, seeds in (("one", range(5)), ("two", range(5, 12))):
        rows = [{"bytes": picture(seed) if seed != 6 else None, "path": f"{seed}.png"} for seed in seeds]
        labels = [9 if seed == 1 else None if seed == 3 else seed % 5 for seed in seeds]
        parquet.write_table(pyarrow.table({"image": rows, "label": labels}), folder / f"{name}.parquet", row_group_size=2)
    return folder


@pytest.mark.usefixtures("compiled_once")
def test_parquet_gives_what_files_give(tmp_path: Path, table: Path):
    samples = jobs.open_samples(table, label="label")
    whole = samples.read(0, len(samples))
    assert [s.name for s in whole] == [f"one.parquet:{k}" for k in range(5)] + [f"two.parquet:{k}" for k in range(7)]
    assert [one for start in range(0, 12, 3) for one in samples.read(start, start + 3)] == whole
    assert whole[7].content == picture(7)
    summary = jobs.run(task_of(table, tmp_path / "out", size=5, target="label", label="label"), {})
    assert [(f.name, f.reason.split(";")[0]) for f in summary.failures] == [
        ("one.parquet:1", "label 9: target 9 is out of range: the model has classes 0 to 4"),
        ("one.parquet:3", "the sample has no label"),
        ("two.parquet:1", "column 'image' is empty"),
    ]
    found = {entry["index"]: (entry, tensors) for entry, tensors in jobs.read_results(tmp_path / "out") if tensors}
    assert {index: entry["target"] for index, (entry, _) in found.items()} == {k: k % 5 for k in (0, 2, 4, 5, 7, 8, 9, 10, 11)}
    file = tmp_path / "7.png"
    file.write_bytes(picture(7))
    x = prepare(file, RECIPE).pixels
    expected = frpc.compile(load()[0])(x, target=2).relevance[0]
    torch.testing.assert_close(found[7][1]["relevance"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("picture",), "has no column 'picture'; known names: image, label"),
        (("label",), "column 'label' of .* is int64; pictures must be encoded files"),
        (("image", "image"), "column 'image' of .* is struct<.*>; a class must be an integer or a name"),
    ],
)
def test_parquet_errors(table: Path, arguments, message: str):
    with pytest.raises(DataError, match=message):
        jobs.open_samples(table, *arguments)
    (table / "one.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not a Parquet file, or is damaged"):
        jobs.open_samples(table)


# Ray --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning")
def test_two_workers_of_a_cluster_one_of_them_killed(tmp_path: Path):
    """The bits of one process, in whichever order shards came, with a worker killed in the middle."""
    ray = pytest.importorskip("ray")
    data = make_folder(tmp_path / "data", 40)
    jobs.run(task_of(data, tmp_path / "alone"), {"name": "tiny"})
    task = task_of(data, tmp_path / "out")
    task = replace(task, samples=Deadly(task.samples, tmp_path / "killed"))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(TESTS)}},
    )
    try:
        counts: list[int] = []
        summary = jobs.run(task, {"name": "tiny"}, "ray", 2, advance=lambda done, failed: counts.append(done + failed))
    finally:
        ray.shutdown()
    assert int((tmp_path / "killed").read_text()) != os.getpid()
    assert sum(counts) == 40 and len(summary.failures) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
