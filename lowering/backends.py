"""What can carry out the ops, in order of preference, and what each of them takes.

``ops`` and ``explain()`` ask here. A new backend is one more entry of ``BACKENDS``.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import builds
from .format import CHUNK, Format, order_for
from .step import DTYPE_NAMES, Step

MAX_HEAD_DIM = 256
_HAS_TRITON = importlib.util.find_spec("triton") is not None


CacheRefusal = Callable[[Format, torch.dtype, torch.device], str | None]


@dataclass(frozen=True)
class Work:
    """A decode step, as far as it decides on who can carry it out.

    key, value: the formats of the cache. dtype: of the cache. group: query heads of a KV head. queries: query tokens.
    """

    key: Format
    value: Format
    dtype: torch.dtype
    device: torch.device
    group: int
    queries: int = 1


@dataclass(frozen=True)
class Backend:
    """Something that carries out the ops.

    name: as ``explain()`` has it. refuses_cache: why not a cache of a format, dtype and device, None where it takes it.
    refuses_step: the same of a decode step.
    """

    name: str
    refuses_cache: CacheRefusal
    refuses_step: Callable[[Work], str | None]


def _refuses_cache(format: Format, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the cache is on {device.type}"
    if format.order != order_for(device):
        return f"its elements stand in {format.order}"
    if format.by_channel:
        return "no kernel prunes by channel"
    if not _HAS_TRITON:
        return "Triton is not installed"
    if dtype not in DTYPE_NAMES or format.head_dim % CHUNK or format.head_dim > MAX_HEAD_DIM:
        return f"{dtype} rows of {format.head_dim} channels have no kernel"
    return None


def _refuses_native(format: Format, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cache is on {device.type}"
    if format.order != order_for(device) or dtype not in DTYPE_NAMES or format.head_dim > MAX_HEAD_DIM:
        return f"{dtype} rows of {format.head_dim} channels in {format.order} have no kernel"
    if format.by_channel:
        return "no kernel prunes by channel"
    return builds.why_not()


def _of_step(refuses_cache: CacheRefusal) -> Callable[[Work], str | None]:
    """What kernels that refuse such caches refuse of steps."""

    def refuses_step(work: Work) -> str | None:
        if work.key.window != work.value.window:
            return "K and V have windows of different sizes"
        return next((r for f in (work.key, work.value) if (r := refuses_cache(f, work.dtype, work.device))), None)

    return refuses_step


_refuses_step = _of_step(_refuses_cache)


def _refuses_tuned(work: Work) -> str | None:
    reason = _refuses_step(work)
    if reason is None and not runs_ptx(work.device):
        return "the GPU is not an NVIDIA one of compute capability 8.0 or newer"
    if reason is None and Step.of(work.key, work.value, work.group, work.queries, work.dtype).tuned() is None:
        return "the tuned kernel takes float16 and bfloat16, and rows of a multiple of 32 channels that fit in it"
    return reason


@functools.cache
def runs_ptx(device: torch.device) -> bool:
    """Whether the device has what the inline PTX uses: NVIDIA's tensor cores with bfloat16, from sm_80 on."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


TUNED = Backend("tuned kernels", _refuses_cache, _refuses_tuned)
PLAIN = Backend("plain kernels", _refuses_cache, _refuses_step)
NATIVE = Backend("C++ kernels", _refuses_native, _of_step(_refuses_native))
PORTABLE = Backend("PyTorch", lambda format, dtype, device: None, lambda work: None)

BACKENDS = (TUNED, PLAIN, NATIVE, PORTABLE)


def for_cache(format: Format, dtype: torch.dtype, device: torch.device) -> Backend:
    """The first that takes a cache."""
    return next(b for b in BACKENDS if b.refuses_cache(format, dtype, device) is None)


def for_step(work: Work) -> Backend:
    """The first that takes a decode step."""
    return next(b for b in BACKENDS if b.refuses_step(work) is None)
