"""Models of the shape of Llama 3 with random weights, and their caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timing import DEVICE, operations
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from mustafar_compile import CompressedKV
from mustafar_compile.policy import policy
from mustafar_compile.settings import read_options

WINDOW = 32
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
SHAPE_70B = SHAPE | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
TINY = {  # to try the scripts out
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 100,
}


def build(layers: int, positions: int, tiny: bool) -> Any:
    """The model, in bfloat16, made on the device itself: the weights are random and need not be loaded."""
    torch.manual_seed(0)
    with DEVICE:
        return model_of(TINY if tiny else SHAPE, layers, positions)


def model_of(shape: dict[str, int], layers: int, positions: int) -> Any:
    """A model in bfloat16, on the current device."""
    config = AutoConfig.for_model(
        "llama",
        **shape,
        num_hidden_layers=layers,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def heads_here(model: Any) -> tuple[int, int]:
    """Query heads and KV heads of a layer that this process holds: all, unless ranks share the model."""
    ranks = model.tp_size or 1
    return model.config.num_attention_heads // ranks, model.config.num_key_value_heads // ranks


def fill(cache: StaticCache, model: Any, batch: int, change: Callable[[Tensor, int, str], Tensor]) -> None:
    """Random keys and values in all slots but the last, which is the next to be written.

    change: the dense tensor of a layer, its number, "key" or "value" -> what it is to hold. One layer after the other,
    so that the dense tensors of all layers need not exist at the same time.
    """
    config = model.config
    like = torch.empty(batch, heads_here(model)[1], 0, config.head_dim, dtype=torch.bfloat16, device=DEVICE)
    for i, layer in enumerate(cache.layers):
        layer.lazy_initialization(like, like)
        layer.keys, layer.values = change(layer.keys.normal_(), i, "key"), change(layer.values.normal_(), i, "value")
        layer.cumulative_length.fill_(layer.max_cache_len - 1)


def dense_cache(model: Any, batch: int, context: int) -> StaticCache:
    """A static cache that one more token fills."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    fill(cache, model, batch, lambda dense, layer, role: dense)
    return cache


def compressed_cache(model: Any, batch: int, context: int, options: Mapping[str, Any]) -> StaticCache:
    """The same, compressed as the backend leaves it behind with such options.

    All rows of the batch hold the same, as one alone is compressed: so a batch may be larger than what one dense layer
    of it leaves room for.
    """
    format_of = policy(read_options(None, options)[0])
    written = torch.tensor([context - 1], device=DEVICE)

    def compress(dense: Tensor, layer: int, role: str) -> CompressedKV:
        form = format_of(layer, role, dense.shape[1], model.config.head_dim, dense.dtype, DEVICE)
        of_one = operations().compress(dense, written, form, context)
        buffers = [x.repeat(batch, *[1] * (x.dim() - 1)) for x in of_one]
        return CompressedKV.from_buffers(form, buffers, context, grows=False)

    cache = StaticCache(config=model.config, max_cache_len=context)
    fill(cache, model, 1, compress)
    return cache


def growing_cache(model: Any, batch: int, context: int, sparsity: float | None) -> DynamicCache:
    """A dynamic cache of random keys and values, compressed if a sparsity is given."""
    config = model.config
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = batch, config.num_key_value_heads, context, config.head_dim
        cache.update(*torch.randn(2, *shape, dtype=torch.bfloat16, device=DEVICE), layer)
        filled = cache.layers[layer]
        if sparsity is not None:
            filled.keys, filled.values = (
                CompressedKV.from_dense(x, sparsity, WINDOW) for x in (filled.keys, filled.values)
            )
    return cache


def rewinder(cache: StaticCache) -> Callable[[], None]:
    """A function that makes the last slot the next to be written again, in one or two kernels for all layers."""
    lengths = [layer.cumulative_length for layer in cache.layers]
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    counts = [x.buffers[x.format.place("counts")] for x in tensors if isinstance(x, CompressedKV)]
    if not counts:
        return lambda: torch._foreach_sub_(lengths, 1)
    start = [x.clone() for x in counts]

    def rewind() -> None:
        torch._foreach_sub_(lengths, 1)
        torch._foreach_copy_(counts, start)

    return rewind
