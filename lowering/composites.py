"""The ops that graphs and caches call: each becomes an op with a kernel, or plain PyTorch. See ``ops``.

A format by channel or of groups of heads has code of its own; a strategy is asked here, so that kernels know of none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, by_channel, by_group, head_groups, portable
from .decode_step import DecodeStep
from .format import MAX_QUERY_TOKENS, Format
from .head_groups import HeadGroups
from .strategies.answers import as_state, as_weights


def compress(
    dense: Tensor,
    tokens: Tensor,
    format: str,
    capacity: int,
    queries: Tensor | None = None,
    past: Sequence[Tensor] | None = None,
    attention: Tensor | None = None,
) -> list[Tensor]:
    """See ``ops.compress``."""
    form = head_groups.decode(format)
    if isinstance(form, HeadGroups):
        return by_group.compress(dense, tokens, form, capacity, queries, past, attention)
    if form.by_channel:
        return by_channel.compress(dense, tokens, form, capacity, attention)
    written, rows = tokens.reshape(-1).to(torch.int64).expand(dense.shape[0]), form.plain
    weights, state = form.ranking.of_prompt(dense, written, form, queries, past)
    weights, state = as_weights(weights, dense, form, 1), as_state(state, dense, form)
    if backends.for_cache(form, dense.dtype, dense.device) is backends.PORTABLE:
        packed = portable.compress(dense, tokens, rows, capacity, weights)
    else:
        packed = torch.ops.mustafar.compress_kernel(dense, tokens, rows.encode(), capacity, weights)
    return form.joined(packed, state)


def decompress(buffers: Sequence[Tensor], format: str, length: int) -> Tensor:
    """See ``ops.decompress``."""
    form = head_groups.decode(format)
    if isinstance(form, HeadGroups):
        return by_group.decompress(buffers, form, length)
    if form.by_channel:
        return by_channel.decompress(buffers, form, length)
    window = form.window_of(buffers)
    if backends.for_cache(form, window.dtype, window.device) is backends.PORTABLE:
        return portable.decompress(buffers, form, length)
    return torch.ops.mustafar.decompress_kernel(form.plain_of(buffers), form.plain.encode(), length)


def decode_attention(*given: Any) -> Tensor:
    """See ``ops.decode_attention``."""
    step = DecodeStep.of(given, head_groups.decode)
    _check_counts(step)
    if step.key_format.groups or step.value_format.groups:
        return by_group.decode_attention(step)
    _check_formats(step)
    portably = _backend(step) is backends.PORTABLE
    by_kernel = not portably and step.query.device.type == "cuda"
    rankings = [
        _Ranking(format, buffers, step, by_kernel)
        for format, buffers in ((step.key_format, step.keys), (step.value_format, step.values))
    ]
    key_weights, value_weights = (ranking.weights() for ranking in rankings)
    step = step._replace(key_weights=key_weights, value_weights=value_weights)
    if portably:
        carried_by = by_channel if step.value_format.by_channel else portable
        result = carried_by.decode_attention(step)
    else:
        result = torch.ops.mustafar.decode_attention_kernel(*_without_strategies(step))
    for ranking in rankings:  # not before the step has checked where its tokens go
        ranking.remember()
    return result


def _check_counts(step: DecodeStep) -> None:
    counts = [x.shape[2] for x in (step.query, step.key, step.value)]
    if not 1 <= counts[0] <= MAX_QUERY_TOKENS or counts[1] != counts[0] or counts[2] != counts[0]:
        raise ValueError(
            f"decode_attention was given a query, key and value of {counts} tokens; accepted are as many of each, 1 to "
            f"{MAX_QUERY_TOKENS}"
        )


def _check_formats(step: DecodeStep) -> None:
    key, value = step.key_format, step.value_format
    if key.by_channel or (value.by_channel and key.window != value.window):
        raise ValueError(
            f"decode_attention was given keys of {key} and values of {value}; accepted are keys that are "
            "pruned by token, and values by channel with the window of their keys"
        )


def _backend(step: DecodeStep) -> backends.Backend:
    """What carries out a step. Kernels take K, V and query of one dtype, and as many heads of V as of K."""
    window, other = step.key_format.window_of(step.keys), step.value_format.window_of(step.values)
    if not step.query.dtype == other.dtype == window.dtype or other.shape[1] != window.shape[1]:
        return backends.PORTABLE
    formats = step.key_format, step.value_format
    return backends.for_step(backends.Work(*formats, window.dtype, window.device, step.group, step.query_tokens))


def _without_strategies(step: DecodeStep) -> DecodeStep:
    """The step as the op with a kernel takes it: without what strategies remember, and with texts of formats."""
    key, value = step.key_format, step.value_format
    caches = {"keys": key.plain_of(step.keys), "values": value.plain_of(step.values)}
    return step._replace(**caches, key_format=key.plain.encode(), value_format=value.plain.encode())


class _Ranking:
    """The strategy of K or V in one decode step. by_kernel: in one launch, where there is a kernel for it."""

    def __init__(self, format: Format, buffers: Sequence[Tensor], step: DecodeStep, by_kernel: bool) -> None:
        self.strategy, self.window = format.ranking, format.window_of(buffers)
        self.kernel = self.strategy.step_kernel if by_kernel else None
        self.asks = format.strategy != "magnitude"
        if self.asks:  # which needs a place; the counts move on in the step
            tokens = buffers[format.place("counts")][:, 0]
            if step.position is not None:
                at = step.position.reshape(-1).to(torch.int64).expand(tokens.shape[0])
            else:
                at = tokens if self.kernel else tokens.clone()  # which is read behind the step, too
            self.given = step.query, at, format, format.state_of(buffers)

    def weights(self) -> Tensor | None:
        if not self.asks:
            return None
        query, at, format, state = self.given
        if self.kernel is not None:
            return getattr(torch.ops.mustafar, self.kernel)(query, at, *state)
        return as_weights(self.strategy.of_step(*self.given), self.window, format, query.shape[2])

    def remember(self) -> None:
        if self.asks and self.kernel is None:
            self.strategy.remember(*self.given)
