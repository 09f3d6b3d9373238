"""``cache_stats()``: what a KV cache holds and what it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..gathering import gathered
from ..lowering.layout import Layout
from ..reporting.text import bytes_text
from .attached import find_state
from .release import is_released
from .tensor import CompressedKV, storage_bytes


@dataclass(frozen=True)
class CacheStats:
    """tokens: written tokens of the longest layer. stored_bytes: what is really allocated. dense_bytes: what the same
    cache takes uncompressed. compressed_tensors: how many of its ``tensors`` (K and V count apart) are compressed.
    kept: of a row of each tensor, K and V of each layer in turn, rank after rank: "64/128", "40/128 int8",
    "40/128 by output-aware", "64/128 (2 heads) + 40/128 (6 heads)" where KV heads differ, or "dense"."""

    tokens: int
    stored_bytes: int
    dense_bytes: int
    tensors: int
    compressed_tensors: int
    kept: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Stored over dense bytes; below 1 where memory is saved."""
        return self.stored_bytes / self.dense_bytes if self.dense_bytes else 1.0

    def __str__(self) -> str:
        kind = f"{self.compressed_tensors} of {self.tensors} tensors compressed"
        kinds = Counter(self.kept)
        if len(kinds) > 1:
            kind += f": {', '.join(f'{count} x {kept}' for kept, count in kinds.items())}"
        return (
            f"{self.tokens} tokens, {bytes_text(self.stored_bytes)} stored, {bytes_text(self.dense_bytes)} dense "
            f"(ratio {self.ratio:.3f}), {kind}"
        )


def cache_stats(past_key_values: Any, tokens_dim: int = 2, group: Any = None) -> CacheStats:
    """Sizes of a KV cache, as this process holds it.

    past_key_values: a transformers Cache, nested tuples, lists or dicts of tensors, or a module whose buffers are the
    cache. Tensors of other than four dimensions are passed over. A view counts as far as it goes. A dense cache with
    attached compressed state counts with both, unless its dense memory was released. tokens_dim: the dimension of the
    tokens in dense tensors, 1 where they are [B, S, H, D]; compressed ones know theirs. group: a process group whose
    ranks hold parts of one cache, such as ``torch.distributed.group.WORLD``. All of them must call this; bytes and
    tensors of all are added up. Raises TypeError where no cache tensor is found, ValueError for another tokens_dim.
    Reads device counters of static caches.
    """
    if tokens_dim not in (1, 2):
        raise ValueError(f"tokens_dim={tokens_dim!r} is not accepted; it must be 2 ([B, H, S, D]) or 1 ([B, S, H, D])")
    tensors = list({id(t): t for t in _cache_tensors(past_key_values)}.values())
    if not tensors:
        raise TypeError(
            f"no cache tensors found in a {type(past_key_values).__name__}; accepted are a transformers Cache, nested "
            "tuples, lists or dicts of 4-dimensional tensors, and modules with such buffers"
        )
    holdings = [_holding(t, tokens_dim) for t in tensors]
    mine = CacheStats(
        tokens=max(tokens for tokens, _, _ in holdings),
        stored_bytes=storage_bytes(plain for _, held, _ in holdings for plain in held),
        dense_bytes=sum(t.numel() * t.element_size() for t in tensors),
        tensors=len(tensors),
        compressed_tensors=sum(format is not None for _, _, format in holdings),
        kept=tuple("dense" if format is None else format.described for _, _, format in holdings),
    )
    return mine if group is None else _together(gathered(mine, group))


def _together(parts: Sequence[CacheStats]) -> CacheStats:
    """Those of a cache of which ranks hold parts."""
    return CacheStats(
        tokens=max(part.tokens for part in parts),
        stored_bytes=sum(part.stored_bytes for part in parts),
        dense_bytes=sum(part.dense_bytes for part in parts),
        tensors=sum(part.tensors for part in parts),
        compressed_tensors=sum(part.compressed_tensors for part in parts),
        kept=tuple(kept for part in parts for kept in part.kept),
    )


def _cache_tensors(cache: Any) -> Iterator[Tensor]:
    if isinstance(cache, Tensor):
        if cache.dim() == 4 and cache.is_floating_point():
            yield cache
    elif isinstance(cache, torch.nn.Module):
        yield from _cache_tensors([b for m in cache.modules() for b in vars(m).values() if isinstance(b, Tensor)])
        yield from _cache_tensors(list(cache.buffers()))
    elif isinstance(cache, Mapping):
        yield from _cache_tensors(list(cache.values()))
    elif isinstance(cache, list | tuple):
        for item in cache:
            yield from _cache_tensors(item)
    elif hasattr(cache, "self_attention_cache"):
        yield from _cache_tensors(cache.self_attention_cache)
    elif hasattr(cache, "layers"):
        for layer in cache.layers:
            yield from _cache_tensors([getattr(layer, "keys", None), getattr(layer, "values", None)])


def _holding(tensor: Tensor, tokens_dim: int) -> tuple[int, Sequence[Tensor], Layout | None]:
    """(tokens, the plain tensors that hold them, the format, None where dense) of one K or V."""
    if isinstance(tensor, CompressedKV):
        tokens = tensor.tokens if tensor.grows else _written(tensor.counts)
        return tokens, tensor.buffers, tensor.format
    state = find_state(tensor)
    if state is not None:
        dense = [] if is_released(tensor) else [tensor]
        return _written(state.buffers[-1]), [*dense, *state.buffers], state.format
    return tensor.shape[tokens_dim], [tensor], None


def _written(counts: Tensor) -> int:
    """Tokens of the longest row of the batch."""
    return int(counts[:, 0].max()) if counts.numel() else 0
