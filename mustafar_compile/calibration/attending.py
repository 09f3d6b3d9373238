"""Attention of a Hugging Face model, seen from outside: in a forward without a cache a function takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import _compat
from ..patterns.graph.layers import stated_window

_NAME = "mustafar_attending"
_NOT_PLAIN = {"softcap": "a softcap", "s_aux": "sinks"}  # arguments of attention that change it


@dataclass(frozen=True, eq=False)
class Attention:
    """One causal attention over a text.

    layer: its number. query [B, Hq, T, D]; key, value [B, H, T, D], where H divides Hq. window: latest tokens that are
    attended to, None where all are.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None


Attend = Callable[[Attention], Tensor]
"""An attention -> its result [B, Hq, T, D]."""


@contextmanager
def attending(model: Any, attend: Attend) -> Iterator[None]:
    """Within it the model attends by this function, in a forward without a cache and without padding.

    Raises NotImplementedError, in the forward, for attention that is not causal, and for one with a softcap, with sinks
    or in chunks.
    """
    from transformers import AttentionInterface

    def interface(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **more: Any) -> Any:
        _check_plain(module, more)
        attention = Attention(module.layer_idx, q, k, v, scaling, more.get("sliding_window"))
        return attend(attention).transpose(1, 2), None

    before = _compat.models.attention_implementation(model)
    AttentionInterface.register(_NAME, interface)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _check_plain(module: Any, more: dict[str, Any]) -> None:
    """Check that an attention is what ``Attention`` says. more: its arguments by name."""
    unknown = [text for name, text in _NOT_PLAIN.items() if more.get(name) is not None]
    if more.get("sliding_window") != stated_window(module):
        unknown.append("chunks")
    if not getattr(module, "is_causal", True):
        unknown.append("later tokens")
    if unknown:
        raise NotImplementedError(
            f"mustafar: {type(module).__name__} attends with {' and '.join(unknown)}, which cannot be followed over a "
            "whole text at once; accepted is causal attention without them, to all tokens or in a sliding window"
        )
