"""A peer: the best dense step over a cache in fp8, to which FlashInfer attends."""

from __future__ import annotations

from typing import Any

import dense
import torch
from decoder import Decoder
from timing import DEVICE
from torch import Tensor

FP8 = torch.float8_e4m3fn


class Fp8Decoder(Decoder):
    """Keys and values are rounded to e4m3 as they are, without scales.

    Not for a CUDA graph, see ``dense.planned_flashinfer``. Raises ImportError without FlashInfer, ValueError for a
    context that does not fill its last page.
    """

    def __init__(self, model: Any, batch: int, context: int) -> None:
        if context % dense.PAGE:
            raise ValueError(f"context={context} is not accepted; it must be a multiple of {dense.PAGE}")
        super().__init__(model, batch, context)
        heads, head_dim = (self.dims.heads, self.kv_heads), self.dims.head_dim
        self.attention = dense.planned_flashinfer(batch, heads, context, head_dim, FP8, DEVICE)
        pages = context // dense.PAGE
        shape = (2, batch * pages, self.kv_heads, dense.PAGE, head_dim)
        self.caches = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).to(FP8) for _ in self.layers]
        self.row = torch.empty(2, batch, self.kv_heads, 1, head_dim, dtype=torch.bfloat16, device=DEVICE)
        self.last_pages = torch.arange(1, batch + 1, device=DEVICE) * pages - 1

    def slot(self, i: int) -> Tensor:
        return self.row

    def attend(self, query: Tensor, i: int) -> Tensor:
        new = self.row[:, :, :, 0].to(FP8)
        self.caches[i].view(torch.uint8)[:, self.last_pages, :, -1] = new.view(torch.uint8)
        return self.attention.run(query[:, :, 0].contiguous(), tuple(self.caches[i]))[:, :, None]
