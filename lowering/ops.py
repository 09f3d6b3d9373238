"""The custom ops: the stable boundary between graph rewriting and kernels, and the handle of the test oracle.

``compress``, ``decompress`` and ``decode_attention`` are composites. Where kernels of our own can do the work
(``kernels.supports``) they become the op of the same name with ``_kernel`` behind it, which stays whole in a traced
graph and launches them; elsewhere they become the plain PyTorch of ``portable``, which Inductor compiles. Both follow
from device, dtypes and shapes alone, so tracing decides as eager does.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from . import portable
from .format import MAX_QUERY_TOKENS, Layout

_LIBRARY = torch.library.Library("mustafar", "DEF")
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_SCHEMAS = {
    "compress": "(Tensor dense, Tensor tokens, int kept, int window, SymInt capacity)"
    " -> (Tensor values, Tensor bitmap, Tensor window, Tensor counts)",
    "decompress": "(Tensor values, Tensor bitmap, Tensor window, Tensor counts, SymInt length) -> Tensor",
    "decode_attention": "(Tensor query, Tensor key, Tensor value,"
    " Tensor(a!) key_values, Tensor(b!) key_bitmap, Tensor(c!) key_window, Tensor(d!) key_counts,"
    " Tensor(e!) value_values, Tensor(f!) value_bitmap, Tensor(g!) value_window, Tensor(h!) value_counts,"
    " Tensor? position, Tensor? mask, Tensor? sinks, float scale, float softcap=0.0) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.define(f"{_name}_kernel{_schema}")


def _kernels_for(*caches: Tensor) -> bool:
    """Whether kernels take cache tensors with the dtype, device and channels of these [B, H, S, D]."""
    if not _HAS_TRITON or caches[0].device.type != "cuda":
        return False
    from . import kernels  # imports Triton, which nothing else needs

    return kernels.supports(*caches)


def _compress(dense: Tensor, tokens: Tensor, kept: int, window: int, capacity: int) -> tuple[Tensor, ...]:
    compress = torch.ops.mustafar.compress_kernel if _kernels_for(dense) else portable.compress
    return compress(dense, tokens, kept, window, capacity)


def _decompress(values: Tensor, bitmap: Tensor, window: Tensor, counts: Tensor, length: int) -> Tensor:
    decompress = torch.ops.mustafar.decompress_kernel if _kernels_for(window) else portable.decompress
    return decompress(values, bitmap, window, counts, length)


def _decode_attention(query: Tensor, key: Tensor, value: Tensor, *rest, **options) -> Tensor:
    counts = [x.shape[2] for x in (query, key, value)]
    if not 1 <= counts[0] <= MAX_QUERY_TOKENS or counts[1] != counts[0] or counts[2] != counts[0]:
        raise ValueError(
            f"decode_attention was given a query, key and value of {counts} tokens; accepted are as many of each, 1 to "
            f"{MAX_QUERY_TOKENS}"
        )
    key_window, value_window = rest[2], rest[6]
    use_kernels = query.dtype == key_window.dtype and _kernels_for(key_window, value_window)
    attention = torch.ops.mustafar.decode_attention_kernel if use_kernels else portable.decode_attention
    return attention(query, key, value, *rest, **options)


def _launch(name: str):
    def launch(*arguments):
        from . import kernels

        with torch.cuda.device_of(arguments[0]):  # kernels are launched on the current device
            return getattr(kernels, name)(*arguments)

    return launch


for _name, _composite in zip(_SCHEMAS, (_compress, _decompress, _decode_attention), strict=True):
    _LIBRARY.impl(_name, _composite, "CompositeImplicitAutograd")
    _LIBRARY.impl(f"{_name}_kernel", _launch(_name), "CUDA")


@torch.library.register_fake("mustafar::compress_kernel", lib=_LIBRARY)
def _(dense, tokens, kept, window, capacity):
    batch, heads, _, head_dim = dense.shape
    shapes = Layout.interned(head_dim, kept, window).buffers(batch, heads, capacity, dense.dtype)
    return tuple(dense.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


@torch.library.register_fake("mustafar::decompress_kernel", lib=_LIBRARY)
def _(values, bitmap, window, counts, length):
    batch, heads, _, head_dim = window.shape
    return window.new_empty(batch, heads, length, head_dim)


@torch.library.register_fake("mustafar::decode_attention_kernel", lib=_LIBRARY)
def _(query, key, value, *rest, **options):
    return query.new_empty(*query.shape[:3], value.shape[3])


compress = torch.ops.mustafar.compress.default
"""Prune and pack a dense cache tensor.

dense: [B, H, S, D], float32, float16 or bfloat16, any strides. tokens: int64, one element, on the device of
``dense``: rows written. kept, window, capacity: see ``layout``. Returns the four buffers of ``layout``.
"""

decompress = torch.ops.mustafar.decompress.default
"""The dense tensor [B, H, length, D] that the buffers stand for: pruned elements and unwritten rows are zero."""

decode_attention = torch.ops.mustafar.decode_attention.default
"""One decode step of one layer over a compressed cache, in place.

query: [B, Hq, L, D], of at most ``MAX_QUERY_TOKENS`` tokens. key, value: the same tokens, [B, H, L, D] and
[B, H, L, Dv], with Hq a multiple of H. The buffers of K and V are updated in place. The results and the buffers are
those of L steps with one token each: every token sees the tokens up to itself, and of them as many in their pruned form
as if it were the last. Where the mask has a row for each of several tokens, it alone says which of the later ones, too,
a token sees; they are exact.
position: int64, one element, where the first of them goes, at most the tokens written (what lies past that is
undefined); None: behind the last.
mask: boolean (True: attend) or additive, broadcastable to [B, Hq, L, S]. sinks: [Hq], any float dtype: a logit for each
query head that counts in the softmax and has no value; scale, softcap and mask do not apply to it. softcap: scores
become ``softcap * tanh(score / softcap)`` before the mask; 0: they stay. Returns [B, Hq, L, Dv] in the dtype of
``query``; sums are in float32. Raises ValueError where the numbers of tokens are others.
"""
