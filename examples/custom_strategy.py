# SPDX-License-Identifier: Apache-2.0
"""A way of choosing what is kept of keys, of your own: Wanda's rule for weights, used on a KV cache.

    python examples/custom_strategy.py

Wanda prunes a weight by its magnitude times the norm of what it is multiplied with (arXiv 2306.11695). Keys are
multiplied with queries, so here a channel counts for |K| times the norm of that channel of the prompt's queries.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mustafar_compile
from mustafar_compile import Settings
from mustafar_compile.integrations.teacher_forced import teacher_forced
from mustafar_compile.strategies import Buffer, Strategy, register_strategy

MODEL = Path(__file__).parent / "tiny_llama"


class Wanda(Strategy):
    """Ranks ``|K| * ||Q||``, the norm over the tokens of the prompt and the query heads of the KV head."""

    roles = ("key",)
    wants_queries = True

    def buffers(self, format):
        """What the cache remembers: one number for each channel of a KV head."""
        return (Buffer("norms", ("batch", "heads", 1, format.head_dim), torch.float32),)

    def of_prompt(self, dense, tokens, format, queries, past):
        """The weights of a prompt [B, H, 1, D], and what to remember."""
        if queries is None:  # an eager prompt filled the cache: zeros, by which rows rank by magnitude
            norms = dense.new_zeros(*dense.shape[:2], 1, format.head_dim, dtype=torch.float32)
        else:
            grouped = queries.unflatten(1, (dense.shape[1], -1)).float()  # [B, H, G, n, D]
            norms = grouped.square().sum((2, 3)).sqrt().unsqueeze(2)
        return norms, [norms]

    def of_step(self, query, position, format, state):
        """The weights of a token that leaves the window later: as the prompt had them."""
        return state[0]


register_strategy("wanda", Wanda())


def main(new_tokens: int = 16) -> dict[str, float]:
    """Print what each strategy loses on a text, in nats a token, and generate with this one. Returns the losses."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    text = inspect.getsource(textwrap)[:2000]  # which the model never saw
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    losses = {}
    for strategy in ("magnitude", "wanda"):
        settings = Settings(key_strategy=strategy, key_sparsity=0.7, value_sparsity=0.0)
        with torch.no_grad(), teacher_forced(model, settings):
            losses[strategy] = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.item()
        print(f"{strategy}: {losses[strategy]:.4f} nats a token")

    mustafar_compile.prepare(model, key_strategy="wanda", key_sparsity=0.7, value_sparsity=0.0)
    with mustafar_compile.explain() as report:
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]), report, sep="\n")
    return losses


if __name__ == "__main__":
    main()
