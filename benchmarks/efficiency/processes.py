"""Rows in processes of their own, spread over GPUs. On each some prepare side by side, and one at a time measures."""

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
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from study_files import StudyError

import turns
from mustafar_compile.planning.memory import OUTSIDE

from . import largest, plans
from .case import LARGEST, Case

COMMAND = "-m", "efficiency.child"
DESCRIBED_S = 100
"""Seconds in which a process must have said what its device is."""

Row = dict[str, Any]


class Process:
    """Ready to measure one case. environment: beside that of this process. log: takes what it prints."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._log = log
        path = os.pathsep.join(filter(None, sys.path))
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, *COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | environment | {"PYTHONPATH": path},
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


class Room:
    """A device's memory, for rows that run side by side. They enter in the order in which they come."""

    def __init__(self, total: int) -> None:
        self.total = self._free = total
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def of(self, needed: int) -> Iterator[None]:
        """Waits until there are so many bytes; where there never are, until nobody else has any."""
        needed = min(needed, self.total)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= needed)
            self._free -= needed
        try:
            yield
        finally:
            with self._changed:
                self._free += needed
                self._changed.notify_all()


class Device:
    """A GPU, or the CPU. Processes are always ready: their imports take seconds, in which others measure.

    gpu: its number, None for the CPU. ahead: how many processes. threads: that each may compile with, 0 for all.
    """

    def __init__(self, gpu: str | None, logs: Path, ahead: int, threads: int) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._name, self._logs, self._numbers = gpu or "cpu", logs, itertools.count()
        self._environment = {turns.LOCK: str(logs / f"{self._name}.lock")}
        self._environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self._environment |= {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)} if threads else {}
        self._lock, self._ended = threading.Lock(), False
        self._ready = deque(self._start() for _ in range(ahead))
        self._running: set[Process] = set()
        self.room = Room(0)

    def _start(self) -> Process:
        return Process(self._environment, self._logs / f"{self._name}-{next(self._numbers):03}.log")

    def answer(self, request: Row, limit_s: float) -> Row:
        """Of a process of its own."""
        with self._lock:
            if self._ended:
                return {"failed": "ended"}
            process = self._ready.popleft()
            self._ready.append(self._start())
            self._running.add(process)
        try:
            return process.answer(request, limit_s)
        finally:
            self._running.discard(process)

    def end(self) -> None:
        """End all that runs."""
        with self._lock:
            self._ended = True
            for process in [*self._ready, *self._running]:
                process.end()


class Machine:
    """The devices that rows are spread over. gpus: how many, 0 for the CPU. jobs: rows at once on each."""

    def __init__(self, gpus: int, logs: Path, jobs: int = 1) -> None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [seen[i] if len(seen) > i and seen[i] else str(i) for i in range(gpus)] or [None]
        half = (os.cpu_count() or 1) // 2  # the other half is for those that measure
        threads = max(1, half // (jobs * len(names))) if jobs > 1 else 0
        self._devices = [Device(name, logs, jobs, threads) for name in names]
        self._jobs, self._on_gpu = jobs, gpus > 0

    def measure(self, cases: Iterable[tuple[Case, float, int]]) -> Iterator[tuple[Case, Row]]:
        """The figures of all cases, as they come. With each the seconds that it may take, and the largest batch that is
        known of it, or 0.

        Raises StudyError for the largest batch of a card without a memory.
        """
        cases = list(cases)
        wanted = [case for case, *_ in cases]
        if self._on_gpu:
            threading.Thread(target=plans.plan_ahead, args=(wanted,), daemon=True).start()
        if self._on_gpu or any(case.batch == LARGEST and not case.memory_GB for case in wanted):
            self._ask_for_memory()
        free: queue.SimpleQueue[Device] = queue.SimpleQueue()
        for device in self._devices * self._jobs:
            free.put(device)

        def figures(case: Case, limit_s: float, known: int) -> Row:
            device = free.get()
            try:
                return self._figures(device, case, limit_s, known)
            finally:
                free.put(device)

        with ThreadPoolExecutor(free.qsize()) as pool:
            try:
                waiting = {pool.submit(figures, *given): given[0] for given in cases}
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self.end()

    def _ask_for_memory(self) -> None:
        said = self._devices[0].answer({}, DESCRIBED_S)
        if not said.get("bytes"):
            self.end()
            raise StudyError(f"the largest batch needs memory_GB where there is no GPU to ask: {said}")
        for device in self._devices:
            device.room = Room(said["bytes"])

    def end(self) -> None:
        """End all that runs."""
        for device in self._devices:
            device.end()

    def _figures(self, device: Device, case: Case, limit_s: float, known: int) -> Row:
        memory = int(1e9 * case.memory_GB)
        allocatable = memory - OUTSIDE if memory else 0

        def of_number(case: Case) -> Row:
            return device.answer({"case": case.described(), "allocatable": allocatable}, limit_s)

        try:
            needed = plans.needed(case, memory or device.room.total) if self._on_gpu else 0
            with device.room.of(needed):
                if case.batch != LARGEST:
                    return of_number(case)
                return largest.search(case, of_number, memory or device.room.total, known)
        except (OSError, ValueError, RuntimeError) as error:  # of planning
            return {"failed": f"{type(error).__name__}: {error}"}
