"""What a model says of a given text when its cache is compressed: all tokens in one forward, without a decode step.

Token by token, each would attend to the latest tokens exactly and to older ones as its cache stores them. Here every
query does so at once, as the text is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calibration.attending import Attention, attending
from ..lowering import ops, portable
from ..lowering.format import Format
from ..policy import policy
from ..settings import Settings

_QUERIES = 512  # at a time: the mask of all would take gigabytes


@contextmanager
def teacher_forced(model: Any, settings: Settings) -> Iterator[None]:
    """Within it a model of transformers attends, in a forward without a cache, as if ``settings`` had made its cache.

    Texts begin at the first token and may be padded on the right. Layers with a sliding window and ``skip_layers`` are
    dense. The model runs as it is, also where it was compiled. Raises NotImplementedError, in the forward, for
    attention with a softcap, with sinks or in chunks.
    """
    format_of = policy(settings)

    def attend(of: Attention) -> Tensor:
        k, v = of.key, of.value
        key_format, value_format = (
            format_of(of.layer, role, x.shape[3], x.dtype, x.device) for role, x in (("key", k), ("value", v))
        )
        window, stored = of.window or k.shape[2], None
        if of.window is None and key_format is not None and value_format is not None:
            window, stored = settings.window, (as_stored(k, key_format, of.query), as_stored(v, value_format))
        return attention(of.query, k, v, stored, of.scale, window)

    with attending(model, attend), torch.compiler.set_stance("force_eager"):
        yield


def as_stored(x: Tensor, format: Format, queries: Tensor | None = None) -> Tensor:
    """Keys or values [B, H, T, D], all of them as a cache gives them back that have left its window.

    But for the last, which no query reads so. queries: of keys, [B, Hq, T, D].
    """
    plain, tokens = replace(format.plain, window=1), x.shape[2]
    given = x, torch.tensor([tokens], device=x.device)
    if format.strategy == "magnitude":
        return ops.decompress(ops.compress(*given, plain.encode(), tokens), plain.encode(), tokens)
    weights = format.ranking.of_text(x, format, queries)  # of each row, which no kernel takes
    return portable.decompress(portable.compress(*given, plain, tokens, weights), plain, tokens)


def attention(
    q: Tensor, k: Tensor, v: Tensor, stored: tuple[Tensor, Tensor] | None, scale: float, window: int
) -> Tensor:
    """Causal attention to the latest ``window`` tokens as they are, and to older ones as they are stored, if they are.

    q: [B, Hq, T, D]; k, v and what is ``stored`` of them: [B, H, T, D], where H divides Hq. Returns [B, Hq, T, D].
    """
    keys, values = (k, v) if stored is None else (torch.cat([old, x], 2) for old, x in zip(stored, (k, v), strict=True))
    tokens = torch.arange(k.shape[2], device=k.device)
    results = []
    for queries, part in zip(tokens.split(_QUERIES), q.split(_QUERIES, 2), strict=True):
        age = queries[:, None] - tokens
        exact = (age >= 0) & (age < window)
        mask = exact if stored is None else torch.cat([age >= window, exact], 1)
        results.append(
            torch.nn.functional.scaled_dot_product_attention(part, keys, values, mask, scale=scale, enable_gqa=True)
        )
    return torch.cat(results, 2)
