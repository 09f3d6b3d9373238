"""The ops that stay whole in a traced graph: what runs them on a GPU and on a CPU, and the shapes of their results.

Formats are without strategies here (``Format.plain``). What launches on a GPU is imported when it first runs, as it
needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import builds, native, portable
from .decode_step import DecodeStep
from .format import Format

# --------------------------------------------------------------------------------------------------------- on a GPU


def compress_on_gpu(
    dense: Tensor, tokens: Tensor, format: str, capacity: int, weights: Tensor | None = None
) -> list[Tensor]:
    from . import kernels

    with torch.cuda.device_of(dense):  # kernels are launched on the current device
        return kernels.compress(dense, tokens, Format.decode(format), capacity, weights)


def decompress_on_gpu(buffers: Sequence[Tensor], format: str, length: int) -> Tensor:
    from . import kernels

    with torch.cuda.device_of(buffers[0]):
        return kernels.decompress(buffers, Format.decode(format), length)


def decode_attention_on_gpu(*given: Any) -> Tensor:
    from . import kernels

    step = DecodeStep.of(given, Format.decode)
    with torch.cuda.device_of(step.query):
        return kernels.decode_attention(step)


def weigh_queries_on_gpu(query: Tensor, position: Tensor, ring: Tensor) -> Tensor:
    from . import weighing

    with torch.cuda.device_of(query):
        return weighing.weigh_queries(query, position, ring)


# --------------------------------------------------------------------------------------------------------- on a CPU


def _natively(name: str, *given: Any) -> Any:
    """A function of ``native``, or of ``portable`` where its kernel cannot be built."""
    try:
        return getattr(native, name)(*given)
    except builds.NotBuiltError:
        return getattr(portable, name)(*given)


def compress_on_cpu(
    dense: Tensor, tokens: Tensor, format: str, capacity: int, weights: Tensor | None = None
) -> list[Tensor]:
    return _natively("compress", dense, tokens, Format.decode(format), capacity, weights)


def decompress_on_cpu(buffers: Sequence[Tensor], format: str, length: int) -> Tensor:
    return _natively("decompress", buffers, Format.decode(format), length)


def decode_attention_on_cpu(*given: Any) -> Tensor:
    return _natively("decode_attention", DecodeStep.of(given, Format.decode))


# ----------------------------------------------------------------------- shapes of results, when a graph is traced


def compress_traced(
    dense: Tensor, tokens: Tensor, format: str, capacity: int, weights: Tensor | None = None
) -> list[Tensor]:
    form = Format.decode(format)
    if dense.device.type == "cpu":
        builds.prepare_prompt(form, dense.dtype)
    shapes = form.shapes(dense.shape[0], dense.shape[1], capacity, dense.dtype)
    return [dense.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


def decompress_traced(buffers: Sequence[Tensor], format: str, length: int) -> Tensor:
    form = Format.decode(format)
    window = form.window_of(buffers)
    if window.device.type == "cpu":
        builds.prepare_prompt(form, window.dtype)
    return window.new_empty(*window.shape[:2], length, form.head_dim)


def decode_attention_traced(*given: Any, **named: Any) -> Tensor:
    step = DecodeStep(*given, **named)
    key, value = Format.decode(step.key_format), Format.decode(step.value_format)
    if step.query.device.type == "cpu" and isinstance(step.group, int):  # else it is built at the first call
        builds.prepare_step(key, value, step.query.dtype, step.group)
    return step.query.new_empty(*step.query.shape[:3], value.head_dim)


def weigh_queries_traced(query: Tensor, position: Tensor, ring: Tensor) -> Tensor:
    return ring.new_empty(*ring.shape[:2], *query.shape[2:], dtype=torch.float32)
