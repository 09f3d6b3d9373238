"""Rows in processes of their own, one after the other on each GPU."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from study_files import StudyError

from mustafar_compile.planning.memory import OUTSIDE

from . import largest
from .case import LARGEST, Case

COMMAND = "-m", "efficiency.child"
DESCRIBED_S = 100
"""Seconds in which a process must have said what its device is."""

Row = dict[str, Any]


class Process:
    """Ready to measure one case. gpu: its number, None for a CPU. log: takes what it prints."""

    def __init__(self, gpu: str | None, log: Path) -> None:
        self._log = log
        seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        path = os.pathsep.join(filter(None, sys.path))
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, *COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | seen | {"PYTHONPATH": path},
                start_new_session=True,  # so that it ends with all processes that it started
            )

    def answer(self, request: Row, limit_s: float) -> Row:
        """What ``child.answer`` says; the reason where it says nothing within ``limit_s`` seconds."""
        try:
            said, _ = self._process.communicate(json.dumps(request) + "\n", limit_s)
        except subprocess.TimeoutExpired:
            return {"failed": f"more than {limit_s:g} s"}
        finally:
            self.end()
        return json.loads(said) if said else {"failed": f"exit code {self._process.returncode}, see {self._log}"}

    def end(self) -> None:
        """End it, and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Device:
    """A GPU, or the CPU. A process is always ready: its imports take seconds, in which another one measures."""

    def __init__(self, gpu: str | None, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._gpu, self._logs, self._numbers = gpu, logs, itertools.count()
        self._lock, self._ended = threading.Lock(), False
        self._processes = [self._start()]

    def _start(self) -> Process:
        return Process(self._gpu, self._logs / f"{self._gpu or 'cpu'}-{next(self._numbers):03}.log")

    def answer(self, request: Row, limit_s: float) -> Row:
        """Of a process of its own."""
        with self._lock:
            if self._ended:
                return {"failed": "ended"}
            process = self._processes[-1]
            self._processes = [process, self._start()]
        return process.answer(request, limit_s)

    def end(self) -> None:
        """End all that runs."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                process.end()


class Machine:
    """The devices that rows are spread over. gpus: how many, 0 for the CPU."""

    def __init__(self, gpus: int, logs: Path) -> None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [seen[i] if len(seen) > i and seen[i] else str(i) for i in range(gpus)]
        self._devices = [Device(name, logs) for name in names or [None]]
        self._memory = 0

    def measure(self, cases: Iterable[tuple[Case, float]]) -> Iterator[tuple[Case, Row]]:
        """The figures of all cases, each with the seconds that it may take, as they come.

        Raises StudyError for the largest batch of a card without a memory.
        """
        cases = list(cases)
        to_plan = [case for case, _ in cases if case.batch == LARGEST]
        if any(not case.memory_GB for case in to_plan):
            self._memory = self._described()
        threading.Thread(target=largest.plan_ahead, args=(to_plan,), daemon=True).start()
        free: queue.SimpleQueue[Device] = queue.SimpleQueue()
        for device in self._devices:
            free.put(device)

        def figures(case: Case, limit_s: float) -> Row:
            device = free.get()
            try:
                return self._figures(device, case, limit_s)
            finally:
                free.put(device)

        with ThreadPoolExecutor(len(self._devices)) as pool:
            try:
                waiting = {pool.submit(figures, *case): case[0] for case in cases}
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self.end()

    def _described(self) -> int:
        said = self._devices[0].answer({}, DESCRIBED_S)
        if not said.get("bytes"):
            self.end()
            raise StudyError(f"the largest batch needs memory_GB where there is no GPU to ask: {said}")
        return said["bytes"]

    def end(self) -> None:
        """End all that runs."""
        for device in self._devices:
            device.end()

    def _figures(self, device: Device, case: Case, limit_s: float) -> Row:
        memory = int(1e9 * case.memory_GB)
        allocatable = memory - OUTSIDE if memory else 0

        def of_number(case: Case) -> Row:
            return device.answer({"case": case.described(), "allocatable": allocatable}, limit_s)

        if case.batch != LARGEST:
            return of_number(case)
        try:
            return largest.search(case, of_number, memory or self._memory)
        except (OSError, ValueError, RuntimeError) as error:  # of planning
            return {"failed": f"{type(error).__name__}: {error}"}
