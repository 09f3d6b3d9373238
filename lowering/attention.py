"""Attention over a compressed cache in plain PyTorch: scores, one softmax over all tokens, sums of values.

Glossary: see ``portable``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rows as packing
from .cache import Cache
from .decode_step import DecodeStep
from .format import BLOCK_TOKENS
from .masks import decides_later, with_four_dims


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """[B, H, G, L, D] and blocks of n rows [B, H, N, n, D] -> [B, H, G, L, N * n], in float32.

    One reduction for each query head of the group: they fuse into one loop that expands each key once.
    """
    keys, query = keys.float().unsqueeze(2), query.float()
    heads = [(query[:, :, g, :, None, None] * keys).sum(-1).flatten(3) for g in range(query.shape[2])]
    return torch.stack(heads, dim=2)


def _weighted_sum(weights: Tensor, values: Tensor, attended: Tensor | None) -> Tensor:
    """[B, H, G, L, N * n] and blocks of n rows [B, H, N, n, D] -> [B, H, G, L, D], in float32.

    attended: [B, L, N * n], where it differs from query to query: of other rows even NaN has no part then.
    """
    blocks = values.shape[2:4]
    weights, values = weights.unflatten(-1, blocks).unsqueeze(-1), values.float().unsqueeze(2)
    products = [weights[:, :, g] * values for g in range(weights.shape[2])]
    if attended is not None:
        attended = attended.unflatten(-1, blocks)[:, None, ..., None]
        products = [torch.where(attended, product, 0) for product in products]
    return torch.stack([product.sum((-3, -2)) for product in products], dim=2)


def _masked(scores: Tensor, mask: Tensor | None, token: Tensor, attended: Tensor) -> Tensor:
    """Apply a mask [B or 1, Hq or 1, L or 1, S] at the tokens [B or 1, n] of the scores [B, H, G, L, n].

    attended: [B, L, n], where there is anything to attend to.
    """
    nothing = float("-inf")
    if mask is not None:
        mask = with_four_dims(mask)
        token = token.clamp(min=0, max=mask.shape[-1] - 1)
        if token.shape[0] == 1:
            at_token = mask.index_select(-1, token[0])
        else:
            mask = mask.expand(token.shape[0], -1, -1, -1)
            at_token = mask.gather(-1, token[:, None, None].expand(-1, *mask.shape[1:3], -1))
        grouped = at_token.unflatten(1, (1, 1) if at_token.shape[1] == 1 else scores.shape[1:3])
        scores = torch.where(grouped, scores, nothing) if mask.dtype == torch.bool else scores + grouped.float()
    return torch.where(attended[:, None, None], scores, nothing)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row in which nothing is allowed gives zeros, as SDPA does."""
    weights = torch.softmax(scores, dim=-1)
    return torch.where((scores == float("-inf")).all(-1, keepdim=True), 0.0, weights)


def bounded(scores: Tensor, softcap: float) -> Tensor:
    """Scores under a softcap; 0: as they are."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def attended(cache: Cache, count: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each of the latest ``count`` tokens sees: of the packed rows [B, L, N * 32], of the ring [B, L, R].

    Each sees the cache as it was when that token was the latest; of later ones what the mask allows.
    """
    first_exact, in_ring = cache.first_exact(count).unsqueeze(-1), cache.ring_tokens().unsqueeze(1)
    pruned = torch.arange(cache.slots, device=in_ring.device) < first_exact
    exact = in_ring >= first_exact
    return pruned, exact if decides_later(mask) else exact & (in_ring <= cache.latest(count).unsqueeze(-1))


def weights_of(step: DecodeStep, key: Cache) -> Tensor:
    """Weights of the latest L tokens, by one softmax each: [B, H, G, L, N * 32 + R], float32.

    They are of the packed keys, then of the slots of the ring; those of sinks stand behind.
    """
    heads, mask, device = key.window.shape[1], step.mask, key.window.device
    grouped = step.query.unflatten(1, (heads, -1))
    pruned, exact = attended(key, step.query_tokens, mask)
    slot, in_ring = torch.arange(key.slots, device=device), key.ring_tokens()
    past, recent = packing.expand(key.all_rows(), key.format), key.window.unsqueeze(2)
    scores = [
        _masked(bounded(_scores(grouped, past) * step.scale, step.softcap), mask, slot.unsqueeze(0), pruned),
        _masked(bounded(_scores(grouped, recent) * step.scale, step.softcap), mask, in_ring, exact),
    ]
    if step.sinks is not None:
        of_sinks = step.sinks.float().view(1, heads, -1, 1, 1)
        scores.append(of_sinks.expand(step.query.shape[0], -1, -1, step.query_tokens, -1))
    return packing.computed_once(softmax(torch.cat(scores, dim=-1)))


def sum_of_values(
    of_past: Tensor, of_recent: Tensor, past: Tensor, value: Cache, pruned: Tensor, exact: Tensor
) -> Tensor:
    """Weighted sums [B, Hq, L, D], in float32, of what is packed and of what the ring holds.

    of_past, of_recent: the weights, [B, H, G, L, N * 32] and [B, H, G, L, R]. past: packed rows in dense form
    [B, H, N, 32, D], zero where no token attends to them. pruned, exact: see ``attended``.
    """
    count = pruned.shape[1]
    differ = not (isinstance(count, int) and count == 1)
    # What no token attends to may hold anything, and 0 * NaN is NaN.
    recent = torch.where(exact.any(1)[:, None, :, None], value.window, 0).unsqueeze(2)
    out = _weighted_sum(of_past, past, pruned if differ else None)
    return (out + _weighted_sum(of_recent, recent, exact if differ else None)).flatten(1, 2)


def attend(step: DecodeStep, key: Cache, value: Cache) -> Tensor:
    """Attention of the latest L tokens [B, Hq, L, D] over the compressed tokens and the ring, with one softmax each."""
    weights, (pruned, exact) = weights_of(step, key), attended(key, step.query_tokens, step.mask)
    stays = pruned[:, -1].unflatten(-1, (1, -1, BLOCK_TOKENS))
    past = packing.expand(packing.cleared(value.all_rows(), stays, value.format), value.format)
    of_past, of_recent = weights[..., : key.slots], weights[..., key.slots : key.slots + key.format.ring]
    return sum_of_values(of_past, of_recent, past, value, pruned, exact).to(step.query.dtype)


def latest_weights(
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Weights of the last tokens of a prompt over dense keys, as many as the mask has: see ``ops.latest_weights``."""
    place = torch.arange(BLOCK_TOKENS, device=query.device) + (query.shape[2] - BLOCK_TOKENS)
    heads, before, rows = keys.shape[1], (place < 0).unsqueeze(-1), place.clamp(min=0)
    if mask is not None:
        mask = with_four_dims(mask)
        mask = mask if mask.shape[2] == 1 else mask.index_select(2, rows)
        keys = keys if mask.shape[3] == 1 else keys[:, :, : mask.shape[3]]
    latest = query.index_select(2, rows).float().unflatten(1, (heads, -1))
    scores = bounded(latest @ keys.float().unsqueeze(2).transpose(-1, -2) * scale, softcap).flatten(1, 2)
    left_out = before | (torch.arange(keys.shape[2], device=query.device) > rows.unsqueeze(-1)) if causal else before
    if mask is not None and mask.dtype == torch.bool:
        left_out = left_out | ~mask
    elif mask is not None:
        scores = scores + mask.float()
    scores = torch.where(left_out, float("-inf"), scores)
    if sinks is not None:
        of_sinks = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, of_sinks], dim=-1)
    return softmax(scores)[..., : keys.shape[2]].unflatten(1, (heads, -1)).sum(2)
