"""benchmarks/reproduce.py: many benchmarks in one go, spread over devices."""

from __future__ import annotations

import time

import pytest
from study_files import StudyError

import reproduce
from reproduce import Job, read_jobs, run_all

SEEN = "-c \"import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['BENCHMARK_OUT'])\""
"""What a job prints of its devices and of the folder for its results."""


MEET = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.05)
"""

ENDLESS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
while True:
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(0.05)
"""


def script(path, name, text):
    file = path / name
    file.write_text(text)
    return file


def listed(path, text):
    file = path / "list.yaml"
    file.write_text(text)
    return file


def log(folder, name):
    return (folder / name / "log").read_text()


def statuses(rows):
    return {row["name"]: row["exit status"] for row in rows}


def test_each_job_has_devices_and_a_folder_of_its_own(tmp_path):
    jobs = [Job("pair", (SEEN,), gpus=2), Job("single", (SEEN,)), Job("fails", ("-c 'raise SystemExit(3)'",))]
    assert statuses(run_all(jobs, ["4", "7"], 600, tmp_path)) == {"pair": 0, "single": 0, "fails": 3}
    assert log(tmp_path, "pair").split() == ["4,7", str(tmp_path / "pair")]
    assert log(tmp_path, "single").split()[0] in {"4", "7"}


def test_as_many_run_side_by_side_as_there_are_devices(tmp_path):
    meet = script(tmp_path, "meet.py", MEET)
    jobs = [Job(a, (f"{meet} {tmp_path}/{a} {tmp_path}/{b}",), minutes=0.5) for a, b in (("a", "b"), ("b", "a"))]
    assert statuses(run_all(jobs, ["0", "1"], 600, tmp_path / "out")) == {"a": 0, "b": 0}


def test_commands_of_a_job_follow_each_other_until_one_fails(tmp_path):
    jobs = [Job("three", ("-c 'print(1)'", "-c 'print(2); raise SystemExit(1)'", "-c 'print(3)'"))]
    assert statuses(run_all(jobs, [], 600, tmp_path)) == {"three": 1}
    assert log(tmp_path, "three").split() == ["1", "2"]


def test_what_takes_too_long_is_ended_with_all_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "GRACE_S", 0.5)
    child, endless = tmp_path / "alive", script(tmp_path, "endless.py", ENDLESS)
    (row,) = run_all([Job("endless", (f"{endless} {child}",), minutes=0.02)], ["0"], 600, tmp_path)
    assert row["exit status"] < 0
    assert child.exists()
    child.unlink()
    time.sleep(0.3)
    assert not child.exists()


def test_nothing_begins_for_which_no_time_is_left(tmp_path):
    rows = run_all([Job("long", (SEEN,), minutes=10), Job("short", (SEEN,), minutes=0.5)], ["0"], 60, tmp_path)
    assert statuses(rows) == {"long": "no time left", "short": 0}
    assert not (tmp_path / "long").exists()


def test_a_file_of_jobs(tmp_path):
    file = listed(tmp_path, "- {name: a, run: x.py --quick}\n- {name: b, run: [x.py, y.py], gpus: 2, minutes: 1}")
    assert read_jobs(file) == [Job("a", ("x.py --quick",)), Job("b", ("x.py", "y.py"), 2, 1)]
    assert [job.name for job in read_jobs(file, ["b"])] == ["b"]


@pytest.mark.parametrize(
    ("text", "only", "message"),
    [
        ("name: a", (), "list of entries"),
        ("- {name: a}", (), "no run"),
        ("- {name: a, run: x, gpu: 2}", (), "gpu is unknown"),
        ("- {name: a, run: x}\n- {name: a, run: y}", (), "more than one entry a"),
        ("- {name: a, run: x}", ("b",), "b is unknown; accepted are a"),
    ],
)
def test_what_a_file_must_not_say(tmp_path, text, only, message):
    with pytest.raises(StudyError, match=message):
        read_jobs(listed(tmp_path, text), only)


def test_every_script_of_the_results_is_there():
    for job in read_jobs(reproduce.HERE / "runs" / "results.yaml"):
        scripts = [word for run in job.run for word in run.split() if word.endswith((".py", ".yaml"))]
        assert scripts
        assert all((reproduce.HERE.parent / script).is_file() for script in scripts)
