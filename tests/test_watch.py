"""The watch over CUDA graphs that wait for other ranks."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
import torch

from mustafar_compile.calling import watch as module
from mustafar_compile.calling.watch import Watch

TIMEOUT = 0.3


class Event:
    """In place of CUDA's: reached or not, as the test says, or what asking for it raises."""

    reached: bool | RuntimeError = False

    def __init__(self):
        self.asked = 0

    def record(self):
        pass

    def query(self):
        self.asked += 1
        if isinstance(self.reached, RuntimeError):
            raise self.reached
        return self.reached


@pytest.fixture
def watched():
    """Makes watches over which no thread looks any more when the test has ended."""
    made = []

    def watched(timeout):
        made.append(weakref.ref(watch := Watch(timeout)))
        return watch

    yield watched
    for watch in made:
        if watch() is not None:
            watch().end = None


@pytest.fixture
def ended(monkeypatch):
    """Set when the process would have ended."""
    ended = threading.Event()
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "reached", False)
    monkeypatch.setattr(module.os, "abort", ended.set)
    return ended


def test_a_graph_that_does_not_end_ends_the_process(watched, ended, capfd):
    watch, start = watched(TIMEOUT), time.monotonic()
    watch()
    assert ended.wait(20)
    assert time.monotonic() - start >= TIMEOUT
    assert "a decode step has waited for other ranks for 0 s" in capfd.readouterr().err


def test_the_time_goes_from_the_latest_graph(watched, ended):
    watch = watched(4 * TIMEOUT)
    for _ in range(6):
        watch()
        assert not ended.wait(TIMEOUT)
    assert ended.wait(20)


@pytest.mark.parametrize("reached", [True, RuntimeError("a kernel failed")], ids=["ended", "failed"])
def test_a_graph_that_ends_is_asked_for_once(watched, ended, monkeypatch, reached):
    monkeypatch.setattr(Event, "reached", reached)
    watch = watched(TIMEOUT)
    for asked in (1, 2):
        watch()
        assert not ended.wait(3 * TIMEOUT)
        assert watch.end.asked == asked


def test_torchs_own_switch_turns_it_off(watched, ended, monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    watch = watched(TIMEOUT)
    watch()
    assert watch.end is None


def test_nobody_looks_at_a_watch_that_is_gone(watched, ended):
    before = set(threading.enumerate())
    watch = watched(TIMEOUT)
    watch()
    (thread,) = set(threading.enumerate()) - before
    thread.join(TIMEOUT / 2)
    assert thread.is_alive()
    del watch
    thread.join(20)
    assert not thread.is_alive()
    assert not ended.is_set()
