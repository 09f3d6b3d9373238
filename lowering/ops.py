"""The custom ops: the stable boundary between graph rewriting and kernels, and the handle of the test oracle.

``compress``, ``decompress`` and ``decode_attention`` are composites. Where kernels of our own can do the work
(``backends``) they become the op of the same name with ``_kernel`` behind it, which stays whole in a traced graph and
runs them, on a GPU ``kernels`` and on a CPU ``native``; elsewhere they become the plain PyTorch of ``portable``, which
Inductor compiles. Both follow from device, dtypes and shapes alone, so tracing decides as eager does.

A cache tensor is given as the list of its buffers and the text of its ``Format``, or of its ``HeadGroups``, whose
groups the composites take one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention, backends, band, by_channel, by_group, head_groups, native, portable
from .format import MAX_QUERY_TOKENS, Format
from .head_groups import HeadGroups
from .strategies.answers import as_state, as_weights

_LIBRARY = torch.library.Library("mustafar", "DEF")

_COMPRESS = "(Tensor dense, Tensor tokens, str format, SymInt capacity"
_DECOMPRESS = "(Tensor[] buffers, str format, SymInt length) -> Tensor"
_DECODE_ATTENTION = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a!)[] keys, Tensor(b!)[] values,"
    " str key_format, str value_format, Tensor? position, Tensor? mask, Tensor? sinks, float scale,"
    " float softcap=0.0, SymInt? length=None"
)
_SCHEMAS = {
    "compress": f"{_COMPRESS}, Tensor? queries=None, Tensor[]? past=None, Tensor? attention=None) -> Tensor[]",
    "compress_kernel": f"{_COMPRESS}, Tensor? weights=None) -> Tensor[]",
    "latest_weights": "(Tensor query, Tensor keys, Tensor? mask, Tensor? sinks, bool causal, float scale,"
    " float softcap=0.0) -> Tensor",
    "band_limits": "(Tensor last, Tensor? first, Tensor? columns) -> Tensor",
    "band_attention": "(Tensor query, Tensor key, Tensor value, Tensor? columns, Tensor limits, float scale) -> Tensor",
    "decompress": _DECOMPRESS,
    "decompress_kernel": _DECOMPRESS,
    "decode_attention": f"{_DECODE_ATTENTION}) -> Tensor",
    "weigh_queries_kernel": "(Tensor query, Tensor position, Tensor(a!) ring) -> Tensor",
    "decode_attention_kernel": f"{_DECODE_ATTENTION}, Tensor? key_weights=None, Tensor? value_weights=None) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)


def _compress(
    dense: Tensor,
    tokens: Tensor,
    format: str,
    capacity: int,
    queries: Tensor | None = None,
    past: Sequence[Tensor] | None = None,
    attention: Tensor | None = None,
) -> list[Tensor]:
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


def _decompress(buffers: Sequence[Tensor], format: str, length: int) -> Tensor:
    form = head_groups.decode(format)
    if isinstance(form, HeadGroups):
        return by_group.decompress(buffers, form, length)
    if form.by_channel:
        return by_channel.decompress(buffers, form, length)
    window = form.window_of(buffers)
    if backends.for_cache(form, window.dtype, window.device) is backends.PORTABLE:
        return portable.decompress(buffers, form, length)
    return torch.ops.mustafar.decompress_kernel(form.plain_of(buffers), form.plain.encode(), length)


def _decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_format: str,
    value_format: str,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    length: int | None = None,
) -> Tensor:
    counts = [x.shape[2] for x in (query, key, value)]
    if not 1 <= counts[0] <= MAX_QUERY_TOKENS or counts[1] != counts[0] or counts[2] != counts[0]:
        raise ValueError(
            f"decode_attention was given a query, key and value of {counts} tokens; accepted are as many of each, 1 to "
            f"{MAX_QUERY_TOKENS}"
        )
    key_form, value_form = head_groups.decode(key_format), head_groups.decode(value_format)
    if isinstance(key_form, HeadGroups) and isinstance(value_form, HeadGroups):
        grouped = key_form, value_form, position, mask, sinks, scale, softcap, length
        return by_group.decode_attention(query, key, value, keys, values, *grouped)
    if isinstance(key_form, HeadGroups) or isinstance(value_form, HeadGroups):
        raise ValueError(
            f"decode_attention was given keys of {key_format!r} and values of {value_format!r}; accepted are both in "
            "the same groups of KV heads"
        )
    forms, caches = (key_form, value_form), (keys, values)
    if forms[0].by_channel or (forms[1].by_channel and forms[0].window != forms[1].window):
        raise ValueError(
            f"decode_attention was given keys of {forms[0]} and values of {forms[1]}; accepted are keys that are "
            "pruned by token, and values by channel with the window of their keys"
        )
    window, other = (form.window_of(cache) for form, cache in zip(forms, caches, strict=True))
    work = backends.Work(*forms, window.dtype, window.device, query.shape[1] // window.shape[1], counts[0])
    alike = query.dtype == other.dtype == window.dtype and other.shape[1] == window.shape[1]
    portably = not alike or backends.for_step(work) is backends.PORTABLE
    by_kernel = not portably and window.device.type == "cuda"
    rankings = [_Ranking(form, cache, query, position, by_kernel) for form, cache in zip(forms, caches, strict=True)]
    weights = [ranking.weights() for ranking in rankings]
    rest: Any = position, mask, sinks, scale, softcap, length, *weights
    if portably:
        carried_by = by_channel if forms[1].by_channel else portable
        result = carried_by.decode_attention(query, key, value, keys, values, *forms, *rest)
    else:
        plain = [form.plain_of(cache) for form, cache in zip(forms, caches, strict=True)]
        texts = [form.plain.encode() for form in forms]
        result = torch.ops.mustafar.decode_attention_kernel(query, key, value, *plain, *texts, *rest)
    for ranking in rankings:  # not before the step has checked where its tokens go
        ranking.remember()
    return result


class _Ranking:
    """The strategy of K or V in one decode step. by_kernel: in one launch, where there is a kernel for it."""

    def __init__(
        self, format: Format, buffers: Sequence[Tensor], query: Tensor, position: Tensor | None, by_kernel: bool
    ) -> None:
        self.strategy, self.window = format.ranking, format.window_of(buffers)
        self.kernel = self.strategy.step_kernel if by_kernel else None
        self.asks = format.strategy != "magnitude"
        if self.asks:  # which needs a place; the counts move on in the step
            tokens = buffers[format.place("counts")][:, 0]
            if position is not None:
                at = position.reshape(-1).to(torch.int64).expand(tokens.shape[0])
            else:
                at = tokens if self.kernel else tokens.clone()  # which is read behind the step, too
            self.given = query, at, format, format.state_of(buffers)

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


def _compress_kernel(
    dense: Tensor, tokens: Tensor, format: str, capacity: int, weights: Tensor | None = None
) -> list[Tensor]:
    from . import kernels

    with torch.cuda.device_of(dense):  # kernels are launched on the current device
        return kernels.compress(dense, tokens, Format.decode(format), capacity, weights)


def _decompress_kernel(buffers: Sequence[Tensor], format: str, length: int) -> Tensor:
    from . import kernels

    with torch.cuda.device_of(buffers[0]):
        return kernels.decompress(buffers, Format.decode(format), length)


def _decode_attention_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_format: str,
    value_format: str,
    *rest: Any,
) -> Tensor:
    from . import kernels

    forms = Format.decode(key_format), Format.decode(value_format)
    with torch.cuda.device_of(query):
        return kernels.decode_attention(query, key, value, keys, values, *forms, *rest)


def _weigh_queries_kernel(query: Tensor, position: Tensor, ring: Tensor) -> Tensor:
    from . import weighing

    with torch.cuda.device_of(query):
        return weighing.weigh_queries(query, position, ring)


def _natively(name: str, *given: Any) -> Any:
    """A function of ``native``, or of ``portable`` where its kernel cannot be built."""
    try:
        return getattr(native, name)(*given)
    except native.NotBuiltError:
        return getattr(portable, name)(*given)


def _compress_native(
    dense: Tensor, tokens: Tensor, format: str, capacity: int, weights: Tensor | None = None
) -> list[Tensor]:
    return _natively("compress", dense, tokens, Format.decode(format), capacity, weights)


def _decompress_native(buffers: Sequence[Tensor], format: str, length: int) -> Tensor:
    return _natively("decompress", buffers, Format.decode(format), length)


def _decode_attention_native(*given: Any) -> Tensor:
    return _natively("decode_attention", *given[:5], *map(Format.decode, given[5:7]), *given[7:])


for _name in ("compress", "decompress", "decode_attention"):
    _LIBRARY.impl(_name, globals()[f"_{_name}"], "CompositeImplicitAutograd")
    _LIBRARY.impl(f"{_name}_kernel", globals()[f"_{_name}_kernel"], "CUDA")
    _LIBRARY.impl(f"{_name}_kernel", globals()[f"_{_name}_native"], "CPU")
_LIBRARY.impl("weigh_queries_kernel", _weigh_queries_kernel, "CUDA")
_LIBRARY.impl("latest_weights", attention.latest_weights, "CompositeImplicitAutograd")
_LIBRARY.impl("band_limits", band.band_limits, "CompositeImplicitAutograd")
_LIBRARY.impl("band_attention", band.band_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("mustafar::compress_kernel", lib=_LIBRARY)
def _(dense, tokens, format, capacity, weights=None):
    form = Format.decode(format)
    if dense.device.type == "cpu":
        native.prepare_prompt(form, dense.dtype)
    shapes = form.shapes(dense.shape[0], dense.shape[1], capacity, dense.dtype)
    return [dense.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


@torch.library.register_fake("mustafar::decompress_kernel", lib=_LIBRARY)
def _(buffers, format, length):
    form = Format.decode(format)
    window = form.window_of(buffers)
    if window.device.type == "cpu":
        native.prepare_prompt(form, window.dtype)
    return window.new_empty(*window.shape[:2], length, form.head_dim)


@torch.library.register_fake("mustafar::decode_attention_kernel", lib=_LIBRARY)
def _(query, key, value, keys, values, key_format, value_format, *rest, **options):
    forms = Format.decode(key_format), Format.decode(value_format)
    group = query.shape[1] // key.shape[1]
    if query.device.type == "cpu" and isinstance(group, int):  # else it is built at the first call
        native.prepare_step(*forms, query.dtype, group)
    return query.new_empty(*query.shape[:3], forms[1].head_dim)


@torch.library.register_fake("mustafar::band_attention", lib=_LIBRARY)
def _(query, key, value, columns, limits, scale):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.register_fake("mustafar::weigh_queries_kernel", lib=_LIBRARY)
def _(query, position, ring):
    return ring.new_empty(*ring.shape[:2], *query.shape[2:], dtype=torch.float32)


compress: Callable[..., list[Tensor]] = torch.ops.mustafar.compress.default
"""Prune and pack a dense cache tensor.

dense: [B, H, S, D], float32, float16 or bfloat16, any strides. tokens: int64, [1] or [B], on the device of ``dense``:
rows written. format: the text of a ``Format``. capacity: tokens that the cache is to have room for. queries: of keys,
[B, Hq, n, D], the queries of the last n of these tokens as attention sees them, if they are known; the strategy of the
format says whether it wants them. past: what the strategy remembers of the cache that ``dense`` continues, if any
(``Format.state_of``). attention: of values whose strategy wants it, what ``latest_weights`` gives. Returns the buffers
of the format, in its order.
"""

latest_weights: Callable[..., Tensor] = torch.ops.mustafar.latest_weights.default
"""Attention weights [B, H, 32, S], float32, of the last 32 tokens of a prompt, summed over the query heads of each KV
head; zero before its first token, and for one that may attend to nothing.

query: [B, Hq, L, D]. keys: [B, H, S, D], dense; where the mask has fewer columns, only so many, which are S then.
causal: whether the i-th query of the prompt sees keys 0 to i alone. mask, sinks, scale, softcap: as of
``decode_attention``.
"""

band_limits: Callable[..., Tensor] = torch.ops.mustafar.band_limits.default
"""What decides how to attend under a mask that is a band, int64 [3] on the CPU: ``last``, ``first``, and the first of
the columns that some row of the batch leaves out.

last, first: int64, []; key j is admitted to query i where first < j - i <= last; no first: from the beginning.
columns: boolean, broadcastable to [B, Hq, 1, S]; keys that the mask admits besides.
"""

band_attention: Callable[..., Tensor] = torch.ops.mustafar.band_attention.default
"""Attention [B, L, Hq, Dv] of a prompt under a mask that is a band, which is not made: ``softmax(scale * query @ key)
@ value`` as ``scaled_dot_product_attention`` has it.

query: [B, Hq, L, D]. key, value: [B, H, S, D] and [B, H, S, Dv], with Hq a multiple of H. columns: as of
``band_limits``, which gives limits. A query that sees no key gets what ``scaled_dot_product_attention`` gives it.
"""

decompress: Callable[..., Tensor] = torch.ops.mustafar.decompress.default
"""The dense tensor [B, H, length, D] that the buffers stand for: pruned elements and unwritten rows are zero."""

decode_attention: Callable[..., Tensor] = torch.ops.mustafar.decode_attention.default
"""One decode step of one layer over a compressed cache, in place.

query: [B, Hq, L, D], of at most ``MAX_QUERY_TOKENS`` tokens. key, value: the same tokens, [B, H, L, D] and
[B, H, L, Dv], with Hq a multiple of H. keys, values: the buffers of K and V, of the formats key_format and
value_format, updated in place. The results and the buffers are
those of L steps with one token each: every token sees the tokens up to itself, and of them as many in their pruned form
as if it were the last. Where the mask has a row for each of several tokens, it alone says which of the later ones, too,
a token sees; they are exact.
position: int64, [1] or [B], where the first of them goes, from 0 to the tokens written; None: behind the last.
mask: boolean (True: attend) or additive, broadcastable to [B, Hq, L, S]. sinks: [Hq], any float dtype: a logit for each
query head that counts in the softmax and has no value; scale, softcap and mask do not apply to it. softcap: scores
become ``softcap * tanh(score / softcap)`` before the mask; 0: they stay. length: tokens that a static cache takes in
all, and as many as its mask has; None for a growing cache. Returns [B, Hq, L, Dv] in the dtype of ``query``; sums are
in float32.

Raises ValueError where the numbers of tokens are others. Asserts on the device, with RuntimeError on a CPU, that
positions are as said and that the mask of a static cache admits no token that was never written (see ``checks``).
"""
