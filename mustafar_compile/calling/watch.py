"""A watch over CUDA graphs that wait for other ranks: torch's own looks at no collective that is in one."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import weakref

import torch

_LOOKS = 10
"""Within the timeout."""


class Watch:
    """Ends this process if a graph has not run to its end ``timeout`` seconds after it was launched.

    That is what torch does where a collective outside of CUDA graphs takes so long. Whoever waits for the GPU hears
    nothing, so a thread looks. ``TORCH_NCCL_ASYNC_ERROR_HANDLING=0`` turns off both.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.wanted = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") != "0"
        self.end: torch.cuda.Event | None = None  # of the latest graph
        self.launched = 0.0  # when that was

    def __call__(self) -> None:
        """A graph was launched on the current stream."""
        if not self.wanted:
            return
        self.launched = time.monotonic()  # ahead of the event, so that no time goes with a later one
        if self.end is None:
            self.end = torch.cuda.Event()
            threading.Thread(target=_look, args=(weakref.ref(self), self.timeout / _LOOKS), daemon=True).start()
        self.end.record()

    def look(self, ended: float) -> float:
        """``ended``, or a later launch whose graph has run to its end. While all goes well, the event is not asked."""
        launched = self.launched
        if self.end is None or launched == ended or time.monotonic() - launched < self.timeout:
            return ended
        try:
            if self.end.query():
                return launched
        except RuntimeError:  # a kernel failed: whoever waits for it is told
            return launched
        if launched == self.launched:
            _end(self.timeout)
        return ended


def _look(watch_of: weakref.ref[Watch], pause: float) -> None:
    """Look from time to time, until nothing has the watch any more."""
    ended = 0.0
    while (watch := watch_of()) is not None and watch.end is not None:
        ended = watch.look(ended)
        del watch
        time.sleep(pause)


def _end(timeout: float) -> None:
    message = (
        f"mustafar: a decode step has waited for other ranks for {timeout:.0f} s, the timeout of the process group: "
        "one of them ended, or does not call the same step. This rank ends, too. Its threads are at"
    )
    try:
        print(message, file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(2)  # standard error
    finally:
        os.abort()
