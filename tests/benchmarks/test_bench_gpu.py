"""``python -m bench gpu`` on a CPU: its order, its limits, what goes on after a failure, and small forms of its checks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from places import ROOT

sys.path.append(str(ROOT))  # bench is run from a checkout and not installed

from bench import page
from bench.gpu import checks, driver, parts
from bench.gpu import run as command
from bench.gpu.driver import FILE, Part, Run
from bench.machine import machine, open_console

ABOUT = {"benchmark": "gpu", "command": "gpu"}
SAME = {"source": "s", "gpu": "g", "torch": "t"}
WRITE = """
import json, sys
def note(**line):
    with open(sys.argv[1], "a") as out:
        out.write(json.dumps(line) + chr(10))
"""
PASS = 'note(what="a", status="passed")'


def part(name: str, code: str, limit: float = 60.0, missing: str | None = None) -> Part:
    return Part(name, f"shows {name}", ("-c", WRITE + code, FILE), limit, lambda: missing)


def ended(code: str, limit: float = 60.0, left: float = 60.0) -> driver.Record:
    return driver.judge(part("p", code, limit), left)


class Log:
    """Parts that write their names down when they run."""

    def __init__(self, folder: Path, seconds: float = 60.0, **same: str) -> None:
        self.file, self.runs = folder / "gpu.json", folder / "runs.txt"
        self.run = Run(self.file, ABOUT, {**SAME, **same}, seconds, open_console())

    def part(self, name: str, code: str = PASS, limit: float = 60.0, missing: str | None = None) -> Part:
        return part(name, f"open({str(self.runs)!r}, 'a').write({name + ' '!r})\n{code}", limit, missing)

    def names(self) -> list[str]:
        """Which parts ran since this was last asked, in order."""
        found = self.runs.read_text().split() if self.runs.exists() else []
        self.runs.unlink(missing_ok=True)
        return found

    def statuses(self) -> dict[str, str]:
        return {name: record["status"] for name, record in driver.read(self.file).items()}


# how one part ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (PASS, "passed", ""),
        (f"{PASS}\nnote(what='b', status='failed', reason='it is 3')\n{PASS}", "failed", "1 of 3: b: it is 3"),
        (f"{PASS}\nsys.exit(4)", "failed", "ended with 4 after 1 results"),
        (f"{PASS}\nraise ValueError('no')", "failed", "ended with 1 after 1 results"),
        (f"{PASS}\nimport os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "died of SIGSEGV after 1 results"),
        ("note(what='a', status='skipped', reason='no tool')", "skipped", "no tool"),
        (f"note(what='b', status='skipped', reason='no tool')\n{PASS}", "passed", ""),
        ("", "failed", "nothing was tried"),
    ],
)  # fmt: skip
def test_how_a_part_ended_is_told(code: str, status: str, reason: str) -> None:
    found = ended(code)
    assert (found["status"], found["reason"]) == (status, reason)


def test_a_part_that_hangs_is_ended_with_what_it_started_and_keeps_what_it_found(tmp_path: Path) -> None:
    born = tmp_path / "child"
    code = f"""{PASS}
import subprocess, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(born)!r}, "w").write(str(child.pid))
time.sleep(600)"""
    found = ended(code, limit=4.0)
    assert (found["status"], found["reason"]) == ("timed out", "not done after 4 s")
    assert [result["what"] for result in found["results"]] == ["a"]
    assert found["seconds"] < 30
    for _ in range(100):  # what is killed is gone once it is reaped
        if not alive(int(born.read_text())):
            break
        time.sleep(0.05)
    assert not alive(int(born.read_text()))


def alive(process: int) -> bool:
    """Whether a process runs; one that is dead and not reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_end_of_the_run_is_no_failure_of_the_part() -> None:
    found = ended("import time; time.sleep(600)", limit=60.0, left=2.0)
    assert (found["status"], found["reason"]) == ("cut short", "the time of this run was up")


def test_a_failure_before_the_limit_is_named() -> None:
    found = ended("note(what='b', status='failed', reason='it is 3')\nimport time; time.sleep(600)", limit=3.0)
    assert found["reason"] == "not done after 3 s; before that b: it is 3"


def test_what_a_failed_part_printed_is_kept_without_folders_of_this_machine() -> None:
    found = ended(f"print({str(ROOT / 'frpc' / 'emit' / 'plan.py')!r}, file=sys.stderr); sys.exit(1)")
    assert found["said"] == "frpc/emit/plan.py".replace("/", os.sep)
    assert "said" not in ended(f"print('all is well'); {PASS}")


def test_a_line_that_was_cut_off_counts_for_nothing() -> None:
    found = ended(f"{PASS}\nopen(sys.argv[1], 'a').write('{{\"what\": ')")
    assert found["status"] == "passed" and len(found["results"]) == 1


# one after another ------------------------------------------------------------------------------------------------------


def test_what_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.run.run([
        log.part("fails", "sys.exit(1)"),
        log.part("dies", "import os; os.abort()"),
        log.part("hangs", "import time; time.sleep(600)", limit=3.0),
        log.part("cannot", missing="no such tool"),
        log.part("passes"),
    ])  # fmt: skip
    assert log.names() == ["fails", "dies", "hangs", "passes"]
    assert log.statuses() == {
        "fails": "failed", "dies": "crashed", "hangs": "timed out", "cannot": "skipped", "passes": "passed",
    }  # fmt: skip
    assert driver.read(log.file)["cannot"]["reason"] == "no such tool"


def test_a_result_is_written_before_the_next_part_begins(tmp_path: Path) -> None:
    log = Log(tmp_path)
    look = f"state = json.load(open({str(log.file)!r}))\nnote(what=str([r['status'] for r in state['results']]), status='passed')"
    log.run.run([log.part("one"), log.part("two", look)])
    assert driver.read(log.file)["two"]["results"][0]["what"] == "['passed', 'running']"


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Killed in the middle of its second part, the command later runs the third, and the one that was under way last."""
    log = Log(tmp_path)
    three = [log.part("one"), log.part("two", "import time; time.sleep(600)", 600), log.part("three")]
    started = os.fork()
    if started == 0:  # the command itself, which is killed
        try:
            log.run.run(three)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while log.statuses().get("two") != "running" or "two" not in (log.runs.read_text() if log.runs.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(started, signal.SIGTERM)
    os.waitpid(started, 0)
    assert log.names() == ["one", "two"] and log.statuses() == {"one": "passed", "two": "running"}
    log.run.run([log.part("one"), log.part("two"), log.part("three")])
    assert log.names() == ["three", "two"]
    assert log.statuses() == dict.fromkeys(("one", "two", "three"), "passed")


def test_what_has_a_result_is_not_run_again_unless_it_is_asked_for(tmp_path: Path) -> None:
    log = Log(tmp_path)
    some = [log.part("good"), log.part("bad", "sys.exit(1)"), log.part("cannot", missing="no such tool")]
    log.run.run(some)
    assert log.names() == ["good", "bad"]
    log.run.run(some)
    assert log.names() == []
    log.run.run(some, misses=True)
    assert log.names() == ["bad"]
    log.run.run(some, again=True)
    assert log.names() == ["good", "bad"]
    log.run.run([log.part("cannot")])  # now it can
    assert log.names() == ["cannot"] and log.statuses()["cannot"] == "passed"


@pytest.mark.parametrize("changed", ["source", "gpu", "torch"])
def test_results_of_other_code_or_another_gpu_do_not_count(changed: str, tmp_path: Path) -> None:
    before = Log(tmp_path)
    before.run.run([before.part("one"), before.part("two")])
    assert before.names() == ["one", "two"]
    after = Log(tmp_path, **{changed: "other"})
    assert after.run.known() == {}
    after.run.run([after.part("one")])
    assert after.names() == ["one"]
    assert list(after.run.known()) == ["one"]  # the other's result stays in the file, under its own source
    assert driver.read(after.file)["two"][changed] == SAME[changed]


def test_no_part_starts_when_the_time_is_up(tmp_path: Path) -> None:
    log = Log(tmp_path, seconds=driver.LEAST + 1)
    log.run.run([log.part("slow", f"import time; time.sleep(1.5)\n{PASS}"), log.part("late")])
    assert log.names() == ["slow"]
    assert log.statuses() == {"slow": "passed", "late": "waiting"}
    log.run.run([log.part("slow"), log.part("late")])
    assert log.names() == ["late"]


# the command ------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr == ""
    assert done.stdout.startswith("Nothing was run: ") and len(done.stdout.splitlines()) == 1
    assert not file.exists()


def test_a_device_that_does_not_work_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*size: int, device: str) -> None:
        raise RuntimeError("CUDA error: unknown error\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", broken)
    assert command.why_no_gpu() == "the CUDA device does not work: CUDA error: unknown error"


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(ROOT / "unused.json", ["grphs"], False, False, 1.0) == 2
    assert "no part grphs; there are first, kernel-tests, graphs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("code", "status"), [(PASS, 0), ("sys.exit(1)", 1)])
def test_it_prints_a_table_and_writes_where_it_ran(
    code: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "why_no_gpu", lambda: None)
    file = tmp_path / "gpu.json"
    figure = "note(what='time', status='passed', line='3 ms [fast]')\n"
    some = [part("one", figure + code), part("two", PASS, missing="no such tool")]
    assert command.run(file, [], False, False, 60.0, some) == status
    printed = capsys.readouterr().out
    assert "one: 3 ms [fast]" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if " shows " in line and "at most" not in line}
    assert ("passed" if status == 0 else "failed") in rows["one"] and "no such tool" in rows["two"]
    record = json.loads(file.read_text())
    assert set(machine(1)) <= set(record["machine"]) and "cuda" in record["machine"]["versions"]
    assert record["results"][0]["source"] == command.source()
    text = page.render({"gpu-cuda": [record]})
    assert "| `two` | shows two | skipped | no such tool | 0 |" in text and "- `one`: 3 ms [fast]" in text


def test_parts_can_run_and_are_in_the_order_of_what_they_say() -> None:
    names = [part.name for part in parts.PARTS]
    assert len(set(names)) == len(names) and names[0] == "first"
    for one in parts.PARTS:
        assert one.limit <= 150 and FILE in one.command
        module = one.command[one.command.index("-m") + 1]
        if module == "bench.gpu.checks":
            assert one.command[2] in checks.CHECKS
        else:
            named = [word.split("::")[0] for word in one.command if word.startswith("tests/")]
            assert named and all((ROOT / name).is_file() for name in named)


def test_a_missing_tool_skips_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.shutil, "which", lambda program: None)
    monkeypatch.setattr(parts, "find_spec", lambda module: None)
    reasons = {part.name: part.missing() for part in parts.PARTS}
    assert reasons["sanitizer"] == "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    assert reasons["kernels"] == "triton is not installed" and reasons["net-bert"] == "transformers is not installed"
    assert reasons["first"] is None


def test_tests_are_written_down_one_by_one(tmp_path: Path) -> None:
    """In a process of its own, as the part is: one that passes, one that fails, one that is skipped, one that cannot start."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_not_here(): pytest.skip('no tool')\n"
        "@pytest.fixture\ndef broken(): raise ValueError('not built')\n"
        "def test_without(broken): pass\n"
    )
    (tmp_path / "test_other.py").write_text("import pytest\npytest.importorskip('no_such_module', reason='not installed')\n")
    file = tmp_path / "results.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.tests", str(file), str(tmp_path), "-n", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    found = {line["what"].rsplit("::", 1)[-1]: line for line in map(json.loads, file.read_text().splitlines())}
    statuses = {name.rsplit("/", 1)[-1]: line["status"] for name, line in found.items()}
    assert statuses == {
        "test_good": "passed", "test_bad": "failed", "test_not_here": "skipped", "test_without": "failed",
        "test_other.py": "skipped",
    }  # fmt: skip
    assert found["test_bad"]["reason"].endswith("assert 1 == 2") and found["test_not_here"]["reason"] == "no tool"
