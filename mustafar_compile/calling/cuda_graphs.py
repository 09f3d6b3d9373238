"""Decode steps as CUDA graphs: recorded at the second call with the same addresses, replayed from then on.

Torch's own CUDA graph trees keep a recording for each set of addresses that they ever saw, and search all of them at
each call. A cache that every prompt makes anew would add one a prompt. Here few recordings are kept, found by their
addresses; none keeps a cache alive; and what a call returns is its own, so no later replay overwrites it.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from .. import _compat
from ..reporting.notices import notify
from .recordable import Places

Function = Callable[..., Sequence[Any]]

Key = tuple[Hashable, tuple[Hashable, ...]]
"""Form and addresses of the inputs of a step, see ``Places``."""

KEPT = 4
"""Recordings of a step, so that a few caches can take turns."""


@dataclass(frozen=True)
class Recording:
    """A step at fixed addresses.

    inputs: of those that are copied, what they are copied into. expanded: which of them have the same memory for
    several elements, by their place among them. lengths: true ones, tensors []. results: of each replay; an input that
    the step returns is its place among all. marks: of the memory that it is bound to, see ``Places``.
    """

    inputs: list[Tensor]
    expanded: list[int]
    lengths: list[Tensor]
    results: list[Any]
    marks: list[Any]
    replay: Callable[[], None]


@dataclass
class _Device:
    """What all steps on a device share. recording: a stream; cuBLAS keeps 32 MiB for each that it ever saw."""

    recording: torch.cuda.Stream
    lock: threading.Lock = field(default_factory=threading.Lock)

    def active(self) -> AbstractContextManager[Any]:
        """Within it, this is the current device."""
        return torch.cuda.device(self.recording.device)


@functools.cache
def _device(index: int) -> _Device:
    return _Device(torch.cuda.Stream(index))


_steps: WeakSet[CudaGraphs] = WeakSet()


def release_recordings() -> None:
    """Give up the CUDA graphs of all decode steps. A step that is called again is recorded again.

    All ranks must call it before ``torch.distributed.destroy_process_group``: NCCL waits there until no CUDA graph
    holds a collective of the group. ``torch._dynamo.reset`` does not do: torch keeps the stacks of the latest
    collectives, and with them the compiled code.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    for step in list(_steps):
        step.release()


class NotRecordableError(RuntimeError):
    """A step cannot be a CUDA graph."""


class CudaGraphs:
    """``function``, whose inputs are laid out as ``places`` says, with its calls replayed where that is possible.

    Where there are lengths the function has one more input, their true values, int64 on ``device``. watch: of a step
    that waits for other ranks.
    """

    def __init__(
        self, function: Function, places: Places, device: torch.device, watch: Callable[[], None] | None = None
    ) -> None:
        self.function = function
        self.places = places
        self.watch = watch
        self.index = device.index if device.index is not None else torch.cuda.current_device()
        self.device = torch.device(device.type, self.index)
        self.recordings: OrderedDict[Key, Recording] = OrderedDict()
        self.latest: Key | None = None  # that of the last call
        self.marks: list[Any] = []  # of the memory of the last call
        self.moved: frozenset[int] = frozenset()  # what alone lay elsewhere at the last call than before
        self.served = 0  # replays since something was recorded
        self.refused = False
        self.pool: Any = None  # of all recordings, which run one after the other
        self.stream: torch.cuda.Stream | None = None  # on which the last one ran
        _steps.add(self)

    def release(self) -> None:
        """Give up all recordings."""
        with _device(self.index).lock:
            self.recordings.clear()
            self.latest, self.marks, self.pool, self.served = None, [], None, 0

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self.refused or torch.cuda.is_current_stream_capturing():  # into a graph of the caller
            return self._plain(inputs)
        device = _device(self.index)
        with device.lock, device.active():
            recording = self._recording(inputs)
            if recording is not None:
                stream, before = torch.cuda.current_stream(), self.stream
                if before is not None and before != stream:
                    stream.wait_stream(before)
                self.stream = stream
                return self._replayed(recording, inputs)
        return self._plain(inputs)

    def _plain(self, inputs: Sequence[Any]) -> Sequence[Any]:
        values, lengths = self._values()
        self._fill(lengths, inputs)
        return self.function(*inputs, *values)

    def _values(self) -> tuple[list[Tensor], list[Tensor]]:
        """The input for true lengths, if the function has it, and its elements."""
        count = len(self.places.lengths)
        values = [torch.zeros(count, dtype=torch.int64, device=self.device)] if count else []
        return values, [element for x in values for element in x]

    def _fill(self, elements: Sequence[Tensor], inputs: Sequence[Any]) -> None:
        for element, length in zip(elements, self.places.lengths, strict=True):
            element.fill_(length.of(inputs))

    def _recording(self, inputs: Sequence[Any]) -> Recording | None:
        """The recording of a call, made where the kernels are compiled by then and it will serve again.

        That is where the call before had the same key, and where nothing but addresses is new and the last recording
        served: a new cache takes the place of another one.
        """
        key = self.places.form(inputs), self.places.addresses(inputs)
        recording = self.recordings.get(key)
        if recording is None:
            key = self._without_moved(key, inputs)
            again = key == self.latest
            if again or (self._guesses() and self.latest is not None and key[0] == self.latest[0]):
                recording = self._try_to_record(key, inputs, again)
        else:
            self.moved = frozenset()
        if recording is not None:
            self.recordings.move_to_end(key)
            self.served += 1
        self.latest, self.marks = key, self.places.marks(inputs) if recording is None else recording.marks
        return recording

    def _guesses(self) -> bool:
        """Whether another cache is recorded at once. A guess may fail, and must not on one rank of several."""
        return self.served > 1 and not self.places.waits

    def _without_moved(self, key: Key, inputs: Sequence[Any]) -> Key:
        """The new key of a call. What moves alone at two calls in a row is copied from now on, so it is not in it.

        That is a large mask, say, which the caller makes anew for each step.
        """
        before, self.moved = self.moved, frozenset()
        if self.latest is not None and key[0] == self.latest[0]:
            self.moved = self.places.moved(self.latest[1], key[1])
        moved = before & self.moved
        if moved:
            self.places = self.places.copying(moved)
            self.recordings.clear()
            self.latest = key = key[0], self.places.addresses(inputs)
        return key

    def _try_to_record(self, key: Key, inputs: Sequence[Any], again: bool) -> Recording | None:
        self.served = 0
        try:
            recording = self._record(inputs)
        except Exception as error:  # nothing has run yet
            if self.places.waits:
                raise NotRecordableError(
                    f"a decode step could not be recorded as a CUDA graph, and other ranks go on with theirs: {error}. "
                    'Accepted is options={"triton.cudagraphs": False} on all of them'
                ) from error
            if again:
                self.refused = True
                notify(f"a decode step runs without a CUDA graph, which could not be recorded: {error}")
            return None
        self.recordings[key] = recording
        if len(self.recordings) > KEPT:
            self.recordings.popitem(last=False)
        return recording

    def _record(self, given: Sequence[Any]) -> Recording:
        inputs = list(given)
        with torch.inference_mode(False):  # to be copied into in either mode
            for i in self.places.copied:
                x = given[i]
                inputs[i] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_()
            for i, x in self.places.roomy(given).items():
                inputs[i] = x
            values, lengths = self._values()
        if not self.recordings:  # a pool ends with the last recording in it
            self.pool = torch.cuda.graph_pool_handle()
        step = functools.partial(self.function, *inputs, *values)
        results, replay = capture(step, self.pool, _device(self.index).recording)
        copied = [inputs[i] for i in self.places.copied]
        expanded = [place for place, x in enumerate(copied) if 0 in x.stride()]
        into = [_each_once(x) for x in copied]
        named = _without_inputs(results, inputs + values)
        return Recording(into, expanded, lengths, named, self.places.marks(given), replay)

    def _replayed(self, recording: Recording, inputs: Sequence[Any]) -> list[Any]:
        given, into = [inputs[i] for i in self.places.copied], [*recording.inputs]
        for place in self.places.long_copied:
            into[place] = into[place][tuple(map(slice, given[place].shape))]
        for place in recording.expanded:
            given[place] = _each_once(given[place])
        if into:
            _compat.tensors.foreach_copy(into, given)
        self._fill(recording.lengths, inputs)
        recording.replay()
        if self.watch is not None:
            self.watch()
        if self.places.written:
            _compat.tensors.foreach_copy(*([of[place] for place in self.places.written] for of in (given, into)))
        return [
            inputs[result.place] if isinstance(result, _Input) else result.clone() if _is_tensor(result) else result
            for result in recording.results
        ]


def _each_once(x: Tensor) -> Tensor:
    """A view of ``x`` with each element of its memory once, where it was expanded."""
    return x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]


@dataclass(frozen=True)
class _Input:
    """A result that is the input at ``place``."""

    place: int


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _without_inputs(results: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """``results`` with the inputs among them named. Raises NotRecordableError for a view of one."""
    places = {id(x): i for i, x in enumerate(inputs) if _is_tensor(x)}
    storages = {x.untyped_storage().data_ptr() for x in inputs if _is_tensor(x)}
    named: list[Any] = [_Input(places[id(x)]) if id(x) in places else x for x in results]
    if any(_is_tensor(x) and x.untyped_storage().data_ptr() in storages for x in named):
        raise NotRecordableError("it returns a view of an input")
    return named


def capture(
    function: Callable[[], Sequence[Any]], pool: Any, stream: torch.cuda.Stream
) -> tuple[Sequence[Any], Callable[[], None]]:
    """What ``function`` returns and a replay that fills it. Nothing has run until the first replay."""
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            results = function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return results, graph.replay
