"""Models to measure: of well-known shapes, with random weights, or a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from timing import DEVICE
from transformers import AutoConfig, AutoModelForCausalLM

DTYPE = torch.bfloat16

_LLAMA_3 = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "vocab_size": 128256}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # family, sizes
    "llama-2-7b": ("llama", {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
                             "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}),
    "llama-3-8b": ("llama", {**_LLAMA_3, "num_hidden_layers": 32, "intermediate_size": 14336}),
    "mistral-7b": ("mistral", {**_LLAMA_3, "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 32768,
                               "sliding_window": None}),
    "qwen-3-4b": ("qwen3", {"num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128,
                            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}),
    "smollm2-135m": ("llama", {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
                               "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                               "tie_word_embeddings": True}),
    "tiny": ("llama", {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100}),
}  # fmt: skip


def config_of(shape: str, positions: int, **changes: Any) -> Any:
    """The config of one of ``SHAPES`` for so many tokens, or of a checkpoint: a folder, or a name on the Hub.

    changes: of the config.
    """
    if shape not in SHAPES:
        return AutoConfig.from_pretrained(shape, **changes)
    family, sizes = SHAPES[shape]
    return AutoConfig.for_model(family, **sizes | changes, max_position_embeddings=positions)


def build(config: Any) -> Any:
    """The model in bfloat16: a checkpoint if the config is of one. Random weights are made on the device itself."""
    torch.manual_seed(0)
    if config.name_or_path:
        return AutoModelForCausalLM.from_pretrained(config.name_or_path, config=config, dtype=DTYPE).to(DEVICE).eval()
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
