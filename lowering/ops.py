"""The custom ops: the stable boundary between graph rewriting and kernels, and the handle of the test oracle.

``compress``, ``decompress`` and ``decode_attention`` are composites (``composites``). Where kernels of our own can do
the work (``backends``) they become the op of the same name with ``_kernel`` behind it, which stays whole in a traced
graph (``kernel_ops``) and runs them, on a GPU ``kernels`` and on a CPU ``native``; elsewhere they become the plain
PyTorch of ``portable``, which Inductor compiles. Both follow from device, dtypes and shapes alone, so tracing decides
as eager does.

A cache tensor is given as the list of its buffers and the text of its ``Format``, or of its ``HeadGroups``, whose
groups the composites take one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import attention, band, composites, kernel_ops

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
# A cache lies as it was made, and all else may have any strides. By default Inductor makes each tensor anew, for each
# op of ours that takes it, with the strides that it has in eager mode: a mask once for each layer, say.
_OF_STEPS = dict.fromkeys(("decode_attention_kernel", "weigh_queries_kernel"), (torch.Tag.flexible_layout,))
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=_OF_STEPS.get(_name, ()))

_COMPOSITES = {
    "compress": composites.compress,
    "decompress": composites.decompress,
    "decode_attention": composites.decode_attention,
    "latest_weights": attention.latest_weights,
}
_ON_GPU = {
    "compress_kernel": kernel_ops.compress_on_gpu,
    "decompress_kernel": kernel_ops.decompress_on_gpu,
    "decode_attention_kernel": kernel_ops.decode_attention_on_gpu,
    "weigh_queries_kernel": kernel_ops.weigh_queries_on_gpu,
}
_ON_CPU = {
    "compress_kernel": kernel_ops.compress_on_cpu,
    "decompress_kernel": kernel_ops.decompress_on_cpu,
    "decode_attention_kernel": kernel_ops.decode_attention_on_cpu,
}
_ANYWHERE = {"band_limits": band.band_limits, "band_attention": band.band_attention}
_TRACED: dict[str, Callable] = {
    "compress_kernel": kernel_ops.compress_traced,
    "decompress_kernel": kernel_ops.decompress_traced,
    "decode_attention_kernel": kernel_ops.decode_attention_traced,
    "weigh_queries_kernel": kernel_ops.weigh_queries_traced,
    "band_limits": band.band_limits_traced,
    "band_attention": band.band_attention_traced,
}
for _functions, _key in (
    (_COMPOSITES, "CompositeImplicitAutograd"),
    (_ON_GPU, "CUDA"),
    (_ON_CPU, "CPU"),
    (_ANYWHERE, "CompositeExplicitAutograd"),
):
    for _name, _function in _functions.items():
        _LIBRARY.impl(_name, _function, _key)
for _name, _function in _TRACED.items():
    torch.library.register_fake(f"mustafar::{_name}", _function, lib=_LIBRARY)

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
