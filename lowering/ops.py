"""The custom ops: the stable boundary between graph rewriting and kernels, and the handle of the test oracle.

They are registered as composites of ``portable``: eager runs it, and Inductor sees through the op and compiles it.
A device that has kernels of its own registers them under its dispatch key; schema, rewriting and tests stay as
they are.
"""

from __future__ import annotations

import torch

from . import portable

_LIBRARY = torch.library.Library("mustafar", "DEF")

_LIBRARY.define(
    "compress(Tensor dense, Tensor tokens, int kept, int window, SymInt capacity)"
    " -> (Tensor values, Tensor bitmap, Tensor window, Tensor counts)"
)
_LIBRARY.define("decompress(Tensor values, Tensor bitmap, Tensor window, Tensor counts, SymInt length) -> Tensor")
_LIBRARY.define(
    "decode_attention(Tensor query, Tensor key, Tensor value,"
    " Tensor(a!) key_values, Tensor(b!) key_bitmap, Tensor(c!) key_window, Tensor(d!) key_counts,"
    " Tensor(e!) value_values, Tensor(f!) value_bitmap, Tensor(g!) value_window, Tensor(h!) value_counts,"
    " Tensor? position, Tensor? mask, float scale) -> Tensor"
)
for _name in ("compress", "decompress", "decode_attention"):
    _LIBRARY.impl(_name, getattr(portable, _name), "CompositeImplicitAutograd")

compress = torch.ops.mustafar.compress.default
"""Prune and pack a dense cache tensor.

dense: [B, H, S, D], float32, float16 or bfloat16, any strides. tokens: int64, one element, on the device of
``dense``: rows written. kept, window, capacity: see ``layout``. Returns the four buffers of ``layout``.
"""

decompress = torch.ops.mustafar.decompress.default
"""The dense tensor [B, H, length, D] that the buffers stand for: pruned elements and unwritten rows are zero."""

decode_attention = torch.ops.mustafar.decode_attention.default
"""One decode step of one layer over a compressed cache, in place.

query: [B, Hq, 1, D]. key, value: the new token, [B, H, 1, D] and [B, H, 1, Dv], with Hq a multiple of H. The buffers
of K and V are updated in place. position: int64, one element, where the token goes, at most the tokens written (what
lies past that is undefined); None: behind the last.
mask: boolean (True: attend) or additive, broadcastable to [B, Hq, 1, S]. Returns [B, Hq, 1, Dv] in the dtype of
``query``; sums are in float32.
"""
