"""The oracle: plain eager code for what the backend must compute. It shares nothing with the package."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor


def kept_count(head_dim: int, sparsity: float) -> int:
    """ceil((1 - sparsity) * head_dim), rounded up to a multiple of 8, at most head_dim."""
    exact = (Decimal(1) - Decimal(str(sparsity))) * head_dim
    eights = (exact / 8).to_integral_value(rounding=ROUND_CEILING)
    return min(int(eights) * 8, head_dim)


def kept_mask(x: Tensor, kept: int, weights: Tensor | None = None) -> Tensor:
    """True for the ``kept`` largest magnitudes of each row; ties to the lower channel, NaN first.

    weights: what magnitudes count times, in float32; the product is rounded to the dtype of ``x``.
    """
    ranked = x.abs() if weights is None else (x.abs().float() * weights).to(x.dtype)
    largest = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, largest, True)


def prune(x: Tensor, kept: int, weights: Tensor | None = None) -> Tensor:
    """Rows [..., D] with all but the ``kept`` largest magnitudes, times ``weights``, set to zero."""
    return torch.where(kept_mask(x, kept, weights), x, torch.zeros_like(x))


def quantized(x: Tensor, kept: int, code: str, weights: Tensor | None = None) -> Tensor:
    """What rows [..., D] are once they are pruned and stored in a code, in float32."""
    row = prune(x, kept, weights).float()
    peak = row.abs().amax(-1, keepdim=True)
    level = (row.abs() * (torch.full_like(peak, 127) / peak)).round().where(peak >= 2.0**-119, 0)
    if code == "int4":
        floor = level.masked_fill(~kept_mask(x, kept, weights), 127).amin(-1, keepdim=True).double()
        levels = [(floor + (127 - floor) * i * (8 * i + floor) / (7 * (56 + floor)) + 0.5).floor() for i in range(8)]
        levels = torch.cat(levels, -1).unsqueeze(-2)
        distance = (level.double().unsqueeze(-1) - levels).abs()
        level = levels.expand(distance.shape).gather(-1, distance.argmin(-1, keepdim=True)).squeeze(-1).float()
    row = (level.copysign(row) * (peak * (1 / 127))).masked_fill(~peak.isfinite(), math.nan)
    return row.where(kept_mask(x, kept, weights), 0)


def pruned_cache(x: Tensor, sparsity: float, window: int, code: str = "none", weights: Tensor | None = None) -> Tensor:
    """A cache tensor [B, H, n, D] in which all tokens but the last ``window`` are pruned; float32 with a code.

    weights: of each row, [B, H, n, D].
    """
    first_exact = max(x.shape[2] - window, 0)
    kept, past = kept_count(x.shape[3], sparsity), x[:, :, :first_exact]
    weights = None if weights is None else weights[:, :, :first_exact]
    pruned = prune(past, kept, weights) if code == "none" else quantized(past, kept, code, weights)
    return torch.cat([pruned, x[:, :, first_exact:].to(pruned.dtype)], dim=2)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_sparsity: float,
    value_sparsity: float,
    window: int,
    mask: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    codes: tuple[str, str] = ("none", "none"),
) -> Tensor:
    """Dense attention in ``dtype`` of q [B, Hq, L, D] over the pruned k and v [B, H, n, D].

    A query that may attend to nothing gives zeros, as SDPA does. sinks: [Hq], logits that take weight and give nothing.
    codes: of K and V.
    """
    keys = pruned_cache(k, key_sparsity, window, codes[0])
    values = pruned_cache(v, value_sparsity, window, codes[1]).to(dtype)
    weights = reference_weights(q, keys, mask, scale, dtype, softcap, sinks)
    return (weights @ values.repeat_interleave(q.shape[1] // k.shape[1], dim=1)).to(q.dtype)


def reference_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The weights [B, Hq, L, n] of dense attention in ``dtype`` over k as it is. Arguments as above."""
    keys = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(dtype) @ keys.transpose(2, 3) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(dtype)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(nothing, 0)[..., : k.shape[2]]


@contextmanager
def pruned_generation(
    key_sparsity: float,
    value_sparsity: float,
    window: int,
    layers: Collection[int] | None = None,
    codes: tuple[str, str] = ("none", "none"),
) -> Iterator[None]:
    """Within it, eager HF models over a DynamicCache generate as the pruned model should.

    A decode step prunes the cache, its own token included, before it attends. A step of several tokens attends
    densely over the past as it was pruned; sliding-window layers stay as they are. layers: those with a pruned cache,
    all where None. codes: of K and V.
    """
    from transformers.cache_utils import Cache

    original = Cache.update

    def prune_stored(cache, index):
        layer = cache.layers[index] if index < len(cache.layers) else None
        if layer is None or layer.is_sliding or not (layers is None or index in layers) or not layer.get_seq_length():
            return
        layer.keys = pruned_cache(layer.keys, key_sparsity, window, codes[0]).to(layer.keys.dtype)
        layer.values = pruned_cache(layer.values, value_sparsity, window, codes[1]).to(layer.values.dtype)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        prune_stored(self, layer_idx)
        keys, values = original(self, key_states, value_states, layer_idx, *args, **kwargs)
        if key_states.shape[2] > 1 or self.layers[layer_idx].is_sliding:
            return keys, values
        prune_stored(self, layer_idx)
        return self.layers[layer_idx].keys, self.layers[layer_idx].values

    Cache.update = update
    try:
        yield
    finally:
        Cache.update = original
