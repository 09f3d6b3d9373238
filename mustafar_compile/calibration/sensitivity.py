"""How much the output of each attention matters for what a model says of a text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attending import Attention, attending

_SEED = 0


def attentions_and_gradients(model: Any, ids: Tensor) -> list[tuple[Attention, Tensor]]:
    """Each attention over all of a text in a dense forward, and the gradient for its result, [1, Hq, T, D].

    ids: int64 [T]. The gradient is that of the sum over tokens of log p(y), for y drawn from what the model says.
    Layers with a sliding window are left out.
    """
    found: list[tuple[Attention, Tensor]] = []

    def attend(attention: Attention) -> Tensor:
        result = _dense(attention)
        if not result.requires_grad:
            result.requires_grad_()
        if attention.window is None:
            found.append((attention, result))
        return result

    with attending(model, attend):
        logits = model(input_ids=ids[None], use_cache=False).logits
    results = [result for _, result in found]
    gradients = torch.autograd.grad(logits, results, _gradient_of_a_draw(logits.detach())) if found else ()
    return [(_detached(attention), gradient) for (attention, _), gradient in zip(found, gradients, strict=True)]


def _dense(attention: Attention) -> Tensor:
    """Causal attention, over the latest tokens where there is a window."""
    q, k, v = attention.query, attention.key, attention.value
    how: dict[str, Any] = {"is_causal": True}
    if attention.window is not None:
        position = torch.arange(q.shape[2], device=q.device)
        age = position.unsqueeze(-1) - position
        how = {"attn_mask": (age >= 0) & (age < attention.window)}
    return F.scaled_dot_product_attention(q, k, v, scale=attention.scale, enable_gqa=True, **how)


def _gradient_of_a_draw(logits: Tensor) -> Tensor:
    """The gradient of log p(y) for the logits [1, T, V], with one y drawn for each token, always the same."""
    probabilities = logits[0].float().softmax(-1)
    generator = torch.Generator(logits.device).manual_seed(_SEED)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    of_drawn = torch.ones_like(drawn, dtype=torch.float32)
    return probabilities.neg_().scatter_add_(-1, drawn, of_drawn).to(logits.dtype)[None]


def _detached(attention: Attention) -> Attention:
    parts = {name: getattr(attention, name).detach() for name in ("query", "key", "value")}
    return Attention(attention.layer, **parts, scale=attention.scale, window=attention.window)
