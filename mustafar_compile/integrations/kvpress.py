"""kvpress and this package: tokens evicted by a press, then pruned by the backend; and the pruning as a press.

kvpress 0.5.5 asks for transformers before 5.3, as attention got ``cache_position`` and ``past_key_values`` there.
``pressing`` gives its presses these names, so they run with the versions that this package supports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .. import _compat
from ..cache.tensor import CompressedKV
from ..settings import Settings

try:
    from kvpress import BasePress
except ImportError as error:
    raise ImportError(
        "mustafar_compile.integrations.kvpress needs kvpress: pip install 'cachetools<6' datasets fire, then "
        "pip install --no-deps kvpress, which otherwise asks for an older transformers"
    ) from error


@contextmanager
def pressing(model: Any, press: BasePress) -> Iterator[None]:
    """Within it ``press`` evicts tokens at the end of each prompt, and the backend compresses what is left.

    As ``with press(model)``, for models of transformers that are compiled by this backend, prepared, or neither. A
    prompt runs dense, and as it is where the model was compiled by ``model.compile``. Caches may be dynamic or static.
    Layers with a sliding window keep theirs. Positions go on from the prompt's length, not from what is left of it.

    Raises ValueError for a press that does not act at the end of a prompt (DecodingPress), that masks tokens instead of
    dropping them (AdaKVPress) or leaves layers different numbers of tokens (PyramidKVPress), and for a padded prompt.
    """
    if not isinstance(press, BasePress) or type(press).__call__ is not BasePress.__call__:
        raise ValueError(
            f"pressing: {type(press).__name__} is not accepted; it must be a press of kvpress that acts at the end of "
            "the prompt, by the forward hook of BasePress"
        )
    press.forward_hook = _for_this_transformers(press.forward_hook)
    try:
        with _compat.models.compiled_calls(model, lambda call: _in_prompts(press, model, call)) as replaced:
            if replaced:
                yield
            else:
                with press(model):
                    yield
    finally:
        del press.forward_hook


def _in_prompts(press: BasePress, model: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` of a compiled model, but prompts run as they are, within the press: it may do what nothing can trace."""

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        cache = _cache_in(kwargs)
        if cache is not None and cache.get_seq_length():
            return call(*args, **kwargs)
        with press(model), torch.compiler.set_stance("force_eager"):
            return call(*args, **kwargs)

    return dispatch


def _for_this_transformers(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The forward hook of a press for attention of transformers as it is now."""

    def adapted(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        cache, tokens = _cache_in(kwargs), kwargs["hidden_states"].shape[1]
        if cache is None or tokens == 1:
            return output
        layer = cache.layers[module.layer_idx]
        if layer.is_sliding or int(layer.get_seq_length()) != tokens:
            return output
        _check_unpadded(kwargs.get("attention_mask"), tokens)
        named = {**kwargs, "past_key_values": cache, "cache_position": torch.arange(tokens)}
        with _written_alone(layer, tokens):
            output = hook(module, args, named, output)
        _check_evicted(module, cache)
        return output

    return adapted


def _cache_in(kwargs: dict[str, Any]) -> Any:
    return kwargs["cache"] if "cache" in kwargs else kwargs.get("past_key_values")


@contextmanager
def _written_alone(layer: Any, tokens: int) -> Iterator[None]:
    """Within it the layer of a static cache holds the written tokens alone, as that of a dynamic one.

    Those that it holds in the end come to the front of its buffers.
    """
    if not hasattr(layer, "max_cache_len"):
        yield
        return
    buffers = layer.keys, layer.values
    layer.keys, layer.values = (buffer[:, :, :tokens] for buffer in buffers)
    yield
    left = layer.keys.clone(), layer.values.clone()
    for buffer, kept in zip(buffers, left, strict=True):
        buffer.zero_()[:, :, : kept.shape[2]] = kept
    layer.keys, layer.values = buffers
    layer.cumulative_length.fill_(left[0].shape[2])  # in place: graphs hold its address


def _check_unpadded(mask: Any, tokens: int) -> None:
    """Padding is told by the columns of a mask, and tokens do not stay in theirs."""
    if not isinstance(mask, torch.Tensor):
        return
    last = (mask if mask.dim() == 2 else mask[..., -1, :])[..., :tokens]
    if not (last if last.dtype == torch.bool or mask.dim() == 2 else last == 0).all():
        raise ValueError("pressing: a padded prompt is not accepted; give prompts of one length, or one at a time")


def _check_evicted(module: Any, cache: Any) -> None:
    """What is left can be a cache."""
    if getattr(module, "masked_key_indices", None) is not None:
        module.masked_key_indices = None
        raise ValueError(
            "pressing: this press masks tokens, other numbers of them in each KV head, and its cache stays as large; "
            "accepted are presses that leave all heads of a layer as many tokens, such as SnapKVPress"
        )
    lengths = {int(layer.get_seq_length()) for layer in (cache.layers[0], cache.layers[module.layer_idx])}
    if not cache.layers[0].is_sliding and len(lengths) > 1:
        raise ValueError(
            "pressing: this press leaves layers different numbers of tokens, and compiled steps have one mask for all "
            "layers; accepted are presses that leave all layers as many"
        )


@dataclass
class MustafarPress(BasePress):
    """This package's compression as a press: what it would drop of the prompt's keys and values is zero.

    For kvpress's own evaluation, which takes presses. The shape of the cache stays, as that of ThinKPress does, and so
    do tokens generated later; for less memory use the backend. Fields are those of ``Settings``.

    Raises ValueError for a field that is out of range, or differs by layer.
    """

    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    key_code: str = "none"
    value_code: str = "none"
    window: int = 32

    def __post_init__(self) -> None:
        by_layer = [f"{name} by layer" for name in Settings(**vars(self)).given_by_layer()]
        if by_layer:
            raise ValueError(f"MustafarPress was given {' and '.join(by_layer)}; accepted is one value for all layers")

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        """Keys and values [B, H, T, D] as a cache of this package gives them back."""
        stored = ((keys, self.key_sparsity, self.key_code), (values, self.value_sparsity, self.value_code))
        keys, values = (
            CompressedKV.from_dense(x, sparsity, self.window, code=code).dense() for x, sparsity, code in stored
        )
        return keys, values

    @property
    def compression_ratio(self) -> float:
        """Share of the elements that is dropped. Bytes are another thing: see ``cache_stats``."""
        return (self.key_sparsity + self.value_sparsity) / 2

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        raise AttributeError("compression_ratio of MustafarPress cannot be set; set key_sparsity and value_sparsity")
