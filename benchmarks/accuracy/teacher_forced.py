"""What a model says of a text when its cache is stored in some way: all tokens in one forward.

Generation would have each token attend to the latest tokens exactly and to older ones as the cache stores them. Here
every query does so at once, since the text is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mustafar_compile.calibration import attending as hooked
from mustafar_compile.calibration.attending import Attention

from .window import Window

Storage = Callable[[Tensor], Tensor]
"""Keys (rotated) or values of one layer [B, H, T, D] -> what a query reads of them once they have left the window."""

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Queries [B, Hq, T, D], keys and values of one layer, scale -> the result of causal attention [B, Hq, T, D]."""

_QUERIES = 128  # at a time: all scores of a text at once would take gigabytes
_QUERIES_ON_GPU = 1024  # fewer kernels to launch
_LOGITS = 512  # tokens at a time


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stored_k: Tensor,
    stored_v: Tensor,
    window: int | Window,
    scale: float,
    value_window: Window | None = None,
) -> Tensor:
    """Causal attention in which a query reads the latest tokens exactly and older ones as they are stored.

    q: [B, Hq, T, D]; k, v and what is stored of them: [B, H, T, D], where H divides Hq. window: which tokens are exact;
    a number stands for the tokens after t - window of query t. value_window: that of values where it is another.
    Returns [B, Hq, T, D].
    """
    results = [
        attended(part, start, k, v, stored_k, stored_v, window, scale, value_window) for start, part in parts_of(q)
    ]
    return torch.cat(results, dim=2)


def parts_of(q: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Queries [B, Hq, T, D] in as many parts as memory asks for, each with the position of its first."""
    size = _QUERIES if q.device.type == "cpu" else _QUERIES_ON_GPU
    return zip(range(0, q.shape[2], size), q.split(size, dim=2), strict=True)


def attended(
    q: Tensor,
    start: int,
    k: Tensor,
    v: Tensor,
    stored_k: Tensor,
    stored_v: Tensor,
    window: int | Window,
    scale: float,
    value_window: Window | None = None,
) -> Tensor:
    """``attention`` for some of the queries, the first of which is at ``start``; [B, Hq, n, D]."""
    window = Window.of(window)
    weights = weights_of(q, start, k, stored_k, window, scale)
    return weighted_sum(weights, start, v, stored_v, value_window or window)


def weighted_sum(weights: Tensor, start: int, v: Tensor, stored_v: Tensor, window: Window) -> Tensor:
    """What queries read of values by weights [B, H, G, n, end], which it overwrites; [B, Hq, n, D]."""
    end = weights.shape[-1]
    first, exact = _exact_columns(window, start, end, weights.device)
    latest = weights[..., first:]
    results = _by_group(latest * exact, v[:, :, first:end])
    latest.masked_fill_(exact, 0)
    return (results + _by_group(weights, stored_v[:, :, :end])).flatten(1, 2)


def weights_of(q: Tensor, start: int, k: Tensor, stored_k: Tensor, window: Window, scale: float) -> Tensor:
    """Attention weights [B, H, Hq / H, n, start + n] of some of the queries [B, Hq, n, D], the first at ``start``."""
    return scores_of(q, start, k, stored_k, window, scale).softmax(-1)


def scores_of(q: Tensor, start: int, k: Tensor, stored_k: Tensor, window: Window, scale: float) -> Tensor:
    """What ``weights_of`` are the softmax of: minus infinity for later tokens."""
    end = start + q.shape[2]
    q = (q * scale).unflatten(1, (k.shape[1], -1))
    first, exact = _exact_columns(window, start, end, q.device)
    positions = torch.arange(end, device=q.device)
    scores = _by_group(q, stored_k[:, :, :end].mT)
    latest = scores[..., first:]
    latest.copy_(torch.where(exact, _by_group(q, k[:, :, first:end].mT), latest))
    return scores.masked_fill_(positions > positions[start:, None], float("-inf"))


def token_weights(
    q: Tensor, k: Tensor, stored_k: Tensor, window: Window, scale: float, pruning: Window, latest: int
) -> Tensor:
    """The weights that each token gets, [B, H, T], summed over heads and the ``latest`` queries when it is pruned.

    q, k, stored_k, window, scale: of ``attention``. pruning: the window of which it is asked when a token is pruned.
    """
    sums = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    pruned_at = pruning.pruned_at(torch.arange(k.shape[2], device=k.device))
    for start, part in parts_of(q):
        weights = weights_of(part, start, k, stored_k, window, scale)
        end = weights.shape[-1]
        age = pruned_at[:end] - torch.arange(start, end, device=k.device)[:, None]
        sums[:, :, :end] += (weights * ((age >= 0) & (age < latest))).sum((2, 3))
    return sums


def _exact_columns(window: Window, start: int, end: int, device: torch.device) -> tuple[int, Tensor]:
    """The first token that any of the queries from ``start`` to ``end`` reads exactly, and which of those from there
    on each does, [end - start, end - first]."""
    firsts = window.first_exact(torch.arange(start, end))
    first = int(firsts[0])
    return first, torch.arange(first, end, device=device) >= firsts.to(device)[:, None]


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
