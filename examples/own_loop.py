# SPDX-License-Identifier: Apache-2.0
"""A decode loop of your own: the decorator compiles the model calls in it, and the loop stays plain Python.

python examples/own_loop.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mustafar_compile

MODEL = Path(__file__).parent / "tiny_llama"  # or a name on the Hub


@mustafar_compile.compile_loop(preset="balanced")
@torch.no_grad()
def generate(model, ids, new_tokens, stop=None):
    """Greedy decoding of ids [1, L]: the new tokens, up to ``stop`` where it comes, and the cache."""
    cache, tokens = None, []
    for _ in range(new_tokens):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        tokens.append(ids.item())
        if tokens[-1] == stop:
            break
    return tokens, cache


def main(name: str | Path = MODEL, new_tokens: int = 64) -> str:
    """Continue a function."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    ids = tokenizer("def area(width, height):\n    ", add_special_tokens=False, return_tensors="pt").input_ids
    tokens, cache = generate(model, ids, new_tokens, tokenizer.eos_token_id)
    text = tokenizer.decode(tokens)
    print(text, mustafar_compile.cache_stats(cache), sep="\n")
    return text


if __name__ == "__main__":
    main()
