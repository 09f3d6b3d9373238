"""Many benchmarks in one go, spread over the GPUs of a machine: what RESULTS.md is made of.

    python benchmarks/reproduce.py --gpus 2
    python benchmarks/reproduce.py --minutes 9 --only attention codes

The list is a YAML file. An entry has a ``name`` and says what to ``run`` (arguments of Python; several are run one
after the other, until one fails), how many ``gpus`` it takes (1), and after how many ``minutes`` it is ended (5).
Entries start in the order of the file, each as soon as so many GPUs are free, and have these for themselves. One that
may take longer than what is left of ``--minutes`` is left out. Log and results of each are in a folder of its name
below ``benchmarks/out/reproduce/``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timing
from study_files import StudyError, known

HERE = Path(__file__).resolve().parent
POLL_S = 0.2
GRACE_S = 5.0


@dataclass(frozen=True)
class Job:
    """An entry of the list. See above."""

    name: str
    run: tuple[str, ...]
    gpus: int = 1
    minutes: float = 5.0

    @property
    def script(self) -> str:
        """For a shell."""
        return " && ".join(f"{shlex.quote(sys.executable)} {arguments}" for arguments in self.run)


def read_jobs(path: Path, only: Sequence[str] = ()) -> list[Job]:
    """The entries of a file, or those of these names.

    Raises StudyError for a file that does not say what it must, and for unknown names.
    """
    import yaml

    jobs = []
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise StudyError(f"{path} must hold a list of entries with name and run; it is {type(entries).__name__}")
    for entry in entries:
        known(entry, [f.name for f in fields(Job)], "entry", needed=["name", "run"])
        run = entry["run"]
        jobs.append(Job(**(entry | {"run": (run,) if isinstance(run, str) else tuple(run)})))
    names = [job.name for job in jobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise StudyError(f"{path} has more than one entry {', '.join(sorted(twice))}")
    known(dict.fromkeys(only), names, "entry")
    return [job for job in jobs if not only or job.name in only]


class Running:
    """A job that was started, and the devices that it has."""

    def __init__(self, job: Job, devices: Sequence[str], folder: Path) -> None:
        self.job, self.devices = job, devices
        self._started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        with open(folder / "log", "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", job.script],
                env=os.environ | seen | {timing.OUT_VARIABLE: str(folder), "PYTHONUNBUFFERED": "1"},
                cwd=HERE.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    def ended(self) -> bool:
        """Whether it is done. One that takes too long is ended here."""
        if self.seconds > 60 * self.job.minutes:
            self.end()
        return self._process.poll() is not None

    def end(self) -> None:
        """End it with all its processes, and wait for that."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
            os.killpg(self._process.pid, signal.SIGKILL)  # the shell goes first, whatever its children do
        self._process.wait()

    def row(self) -> dict[str, Any]:
        """What became of it."""
        code = self._process.returncode
        return {"name": self.job.name, "seconds": round(self.seconds), "exit status": code, "run": self.job.script}


def run_all(jobs: Sequence[Job], devices: Sequence[str], seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Run all for which there is time; a row for each, as they end.

    devices: as CUDA_VISIBLE_DEVICES names them; none on a machine without a GPU, where one job runs at a time.
    """
    deadline = time.monotonic() + seconds
    waiting, running, rows = list(jobs), list[Running](), list[dict[str, Any]]()
    free = list(devices)
    try:
        while waiting or running:
            while waiting and (len(free) >= waiting[0].gpus if devices else not running):
                job = waiting.pop(0)
                if time.monotonic() + 60 * job.minutes > deadline:
                    rows.append({"name": job.name, "exit status": "no time left", "run": job.script})
                else:
                    taken, free = free[: job.gpus], free[job.gpus :]
                    running.append(Running(job, taken, folder / job.name))
            for one in [one for one in running if one.ended()]:
                running.remove(one)
                free += one.devices
                rows.append(one.row())
                print(f"{one.job.name}: {rows[-1]['exit status']} after {rows[-1]['seconds']} s", flush=True)
            time.sleep(POLL_S)
    finally:
        for one in running:
            one.end()
    return rows


def main() -> None:
    """Run from the command line."""
    arguments = timing.parser(__doc__)
    arguments.add_argument("list", type=Path, nargs="?", default=HERE / "runs" / "results.yaml", metavar="RUNS.yaml")
    arguments.add_argument("--gpus", type=int, default=int(timing.ON_GPU), help="spread over so many")
    arguments.add_argument("--minutes", type=float, default=float("inf"), help="start nothing that may take longer")
    arguments.add_argument("--only", nargs="+", metavar="NAME", default=[], help="of the list, only these")
    args = arguments.parse_args()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(i) for i in range(args.gpus))
    try:
        jobs = read_jobs(args.list, args.only)
    except (OSError, StudyError) as error:
        arguments.error(str(error))
    if too_many := [job.name for job in jobs if args.gpus and job.gpus > args.gpus]:
        print(f"left out, as they need more than {args.gpus} GPU: {', '.join(too_many)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    fitting = [job for job in jobs if job.name not in too_many]
    rows = run_all(fitting, seen.split(",")[: args.gpus], 60 * args.minutes, timing.OUT / "reproduce")
    timing.write("reproduce", rows)
    sys.exit(any(row["exit status"] != 0 for row in rows))


if __name__ == "__main__":
    main()
