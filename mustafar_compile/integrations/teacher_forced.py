"""What a model says of a given text when its cache is compressed: all tokens in one forward, without a decode step.

Token by token, each would attend to the latest tokens exactly and to older ones as its cache stores them. Here every
query does so at once, as the text is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calibration.attending import Attention, attending
from ..lowering import ops, portable
from ..lowering.by_group import put_back, taken
from ..lowering.format import BLOCK_TOKENS, Format
from ..lowering.strategies.answers import as_weights
from ..policy import check_layers, layers_of, policy
from ..settings import Settings

_QUERIES = 512  # at a time: the mask of all would take gigabytes


@contextmanager
def teacher_forced(model: Any, settings: Settings) -> Iterator[None]:
    """Within it a model of transformers attends, in a forward without a cache, as if ``settings`` had made its cache.

    Texts begin at the first token and may be padded on the right. Layers with a sliding window and ``skip_layers`` are
    dense. The model runs as it is, also where it was compiled. Raises UnknownLayerError for settings that name a layer
    which the model does not have, and NotImplementedError, in the forward, for attention with a softcap, with sinks or
    in chunks.
    """
    check_layers(settings, layers_of(model.config))
    format_of = policy(settings)

    def attend(of: Attention) -> Tensor:
        key, value = (
            format_of(of.layer, role, x.shape[1], x.shape[3], x.dtype, x.device)
            for role, x in (("key", of.key), ("value", of.value))
        )
        if of.window is not None or key is None or value is None:
            return attention(of.query, of.key, of.value, None, of.scale, of.window or of.key.shape[2])
        groups = key.groups or (tuple(range(of.key.shape[1])),)
        parts = zip(groups, key.parts, value.parts, strict=True)
        return put_back([_pruned(_of_heads(of, group), *formats) for group, *formats in parts], groups)

    with attending(model, attend), torch.compiler.set_stance("force_eager"):
        yield


def _of_heads(of: Attention, group: Sequence[int]) -> Attention:
    """An attention as far as it is of these KV heads."""
    size = of.query.shape[1] // of.key.shape[1]
    query, key, value = taken(of.query, group, size), taken(of.key, group), taken(of.value, group)
    return replace(of, query=query, key=key, value=value)


def _pruned(of: Attention, key_format: Format, value_format: Format) -> Tensor:
    """What an attention gives over keys and values of these formats."""
    keys, seen = as_stored(of.key, key_format, of.query), None
    if value_format.ranking.wants_attention:
        seen = attention_to_blocks(of.query, of.key, keys, of.scale, value_format)
    stored = keys, as_stored(of.value, value_format, attention=seen)
    return attention(of.query, of.key, of.value, stored, of.scale, key_format.window, value_format)


def as_stored(x: Tensor, format: Format, queries: Tensor | None = None, attention: Tensor | None = None) -> Tensor:
    """Keys or values [B, H, T, D], all of them as a cache gives them back that have left its window.

    But for the last, by channel the last block, which no query reads so. queries: of keys, [B, Hq, T, D]. attention: of
    values whose strategy wants it, what ``attention_to_blocks`` gives.
    """
    tokens = x.shape[2]
    written = x, torch.tensor([tokens], device=x.device)
    if format.by_channel:
        text = replace(format, window=1).encode()
        return ops.decompress(ops.compress(*written, text, tokens, attention=attention), text, tokens)
    plain = replace(format.plain, window=1)
    if format.strategy == "magnitude":
        return ops.decompress(ops.compress(*written, plain.encode(), tokens), plain.encode(), tokens)
    given = format.ranking.of_text(x, format, queries)
    weights = as_weights(given, x, format, tokens)  # of each row, which no kernel takes
    return portable.decompress(portable.compress(*written, plain, tokens, weights), plain, tokens)


def attention_to_blocks(q: Tensor, k: Tensor, stored: Tensor, scale: float, format: Format) -> Tensor:
    """The weights that rank each token in its block when that leaves the window, [B, H, 1, T] float32.

    They are summed over the 32 latest queries of then and the query heads of a KV head. q: [B, Hq, T, D]; k and what is
    ``stored`` of it: [B, H, T, D]. format: of values.
    """
    sums, window = k.new_zeros(*k.shape[:2], 1, k.shape[2], dtype=torch.float32), format.window
    for first in range(0, format.left(k.shape[2]), BLOCK_TOKENS):
        begin, end = first + window, first + window + BLOCK_TOKENS
        age = torch.arange(begin, end, device=k.device)[:, None] - torch.arange(end, device=k.device)
        part = q[:, :, begin:end].float().unflatten(1, (k.shape[1], -1))
        old, new = (part @ x[:, :, :end].float().unsqueeze(2).transpose(-1, -2) * scale for x in (stored, k))
        scores = torch.where(age >= window, old, new).masked_fill(age < 0, float("-inf"))
        sums[:, :, 0, first : first + BLOCK_TOKENS] = scores.softmax(-1)[..., first : first + BLOCK_TOKENS].sum((2, 3))
    return sums


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored: tuple[Tensor, Tensor] | None,
    scale: float,
    window: int,
    value_format: Format | None = None,
) -> Tensor:
    """Causal attention to the latest ``window`` tokens as they are, and to older ones as they are stored, if they are.

    q: [B, Hq, T, D]; k, v and what is ``stored`` of them: [B, H, T, D], where H divides Hq. value_format: by channel,
    values leave the window in blocks, and so later than their keys. Returns [B, Hq, T, D].
    """
    by_channel = stored is not None and value_format is not None and value_format.by_channel
    keys, values = [k], [v]
    if stored is not None:
        keys, values = [stored[0], *[stored[0]] * by_channel, k], [stored[1], *[v] * by_channel, v]
    kinds = torch.cat(keys, 2), torch.cat(values, 2)
    tokens = torch.arange(k.shape[2], device=k.device)
    results = []
    for queries, part in zip(tokens.split(_QUERIES), q.split(_QUERIES, 2), strict=True):
        age = queries[:, None] - tokens
        masks = [(age >= 0) & (age < window)]
        if by_channel:
            assert value_format is not None
            pruned = tokens < value_format.left(queries + 1)[:, None]
            masks = [pruned, (age >= window) & ~pruned, *masks]
        elif stored is not None:
            masks = [age >= window, *masks]
        results.append(
            torch.nn.functional.scaled_dot_product_attention(
                part, *kinds, torch.cat(masks, 1), scale=scale, enable_gqa=True
            )
        )
    return torch.cat(results, 2)
