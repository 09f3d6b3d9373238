"""What a model says of a text when its cache is stored in some way: all tokens in one forward.

Generation would have each token attend to the latest tokens exactly and to older ones as the cache stores them. Here
every query does so at once, since the text is given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mustafar_compile.calibration import attending as hooked
from mustafar_compile.calibration.attending import Attention

Storage = Callable[[Tensor], Tensor]
"""Keys (rotated) or values of one layer [B, H, T, D] -> what a query reads of them once they have left the window."""

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Queries [B, Hq, T, D], keys and values of one layer, scale -> the result of causal attention [B, Hq, T, D]."""

_QUERIES = 128  # at a time: all scores of a text at once would take gigabytes
_LOGITS = 512  # tokens at a time


def attention(q: Tensor, k: Tensor, v: Tensor, stored_k: Tensor, stored_v: Tensor, window: int, scale: float) -> Tensor:
    """Causal attention in which query t reads the tokens after t - window exactly and older ones as they are stored.

    q: [B, Hq, T, D]; k, v and what is stored of them: [B, H, T, D], where H divides Hq. Returns [B, Hq, T, D].
    """
    starts = range(0, q.shape[2], _QUERIES)
    parts = zip(starts, q.split(_QUERIES, dim=2), strict=True)
    results = [attended(part, start, k, v, stored_k, stored_v, window, scale) for start, part in parts]
    return torch.cat(results, dim=2)


def attended(
    q: Tensor, start: int, k: Tensor, v: Tensor, stored_k: Tensor, stored_v: Tensor, window: int, scale: float
) -> Tensor:
    """``attention`` for some of the queries, the first of which is at ``start``; [B, Hq, n, D]."""
    end, first_exact = start + q.shape[2], max(start - window + 1, 0)
    q = (q * scale).unflatten(1, (k.shape[1], -1))
    age = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first_exact, end, device=q.device)
    scores = _by_group(q, stored_k[:, :, :end].mT)
    latest = scores[..., first_exact:]
    latest.copy_(torch.where(age < window, _by_group(q, k[:, :, first_exact:end].mT), latest))
    latest.masked_fill_(age < 0, float("-inf"))
    weights = scores.softmax(-1)
    latest = weights[..., first_exact:]
    exact = _by_group(latest * (age < window), v[:, :, first_exact:end])
    latest.masked_fill_(age < window, 0)
    return (exact + _by_group(weights, stored_v[:, :, :end])).flatten(1, 2)


def _by_group(x: Tensor, of_head: Tensor) -> Tensor:
    """x [B, H, G, n, a] @ of_head [B, H, a, b], one product for a KV head."""
    return (x.flatten(2, 3) @ of_head).unflatten(2, x.shape[2:4])


def attending(model: Any, attend: Attend) -> AbstractContextManager[None]:
    """Within it a Hugging Face model attends by this function, in a forward without a cache."""

    def followed(attention: Attention) -> Tensor:
        if attention.window is not None:
            raise NotImplementedError("a layer with a sliding window stays dense: it cannot be studied")
        return attend(attention.query, attention.key, attention.value, attention.scale)

    return hooked.attending(model, followed)


def storing(model: Any, keys: Storage, values: Storage, window: int) -> AbstractContextManager[None]:
    """Within it a model attends as if its cache were so stored."""
    return attending(model, lambda q, k, v, scale: attention(q, k, v, keys(k), values(v), window, scale))


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """What the model's head turns into logits: ids [T] -> [T, width]."""
    return model.base_model(ids[None], use_cache=False).last_hidden_state[0]


def log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    """Of the next token, [T, vocabulary], in float32."""
    return model.get_output_embeddings()(hidden).float().log_softmax(-1)


def losses(model: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """Nats for each token but the first, [T - 1]."""
    pairs = zip(hidden[:-1].split(_LOGITS), ids[1:].split(_LOGITS), strict=True)
    return torch.cat([-log_probabilities(model, x).gather(1, following[:, None])[:, 0] for x, following in pairs])
