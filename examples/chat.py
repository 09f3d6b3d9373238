# SPDX-License-Identifier: Apache-2.0
"""A chat over many turns with one compressed cache: each turn reads only what is new.

    python examples/chat.py

The tokens themselves are kept, not the text, so what the cache holds is exactly what they begin with. ``mustafar chat
MODEL`` is the same as a command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mustafar_compile

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # of SmolLM2, Qwen and other models with ChatML
QUESTIONS = "My name is Ada, and I have a boat.", "Where could I go with it?", "What is my name?"


def main(name: str | Path = MODEL, questions: Sequence[str] = QUESTIONS, new_tokens: int = 100) -> list[str]:
    """Ask one question after the other. Returns the answers."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    model.compile(backend="mustafar", options={"preset": "safe"})  # with a cache that grows, so that turns can go on

    said, cache, answers = torch.empty(1, 0, dtype=torch.int64), None, []
    for question in questions:
        turn = tokenizer(TURN.format(question), add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([said, turn], dim=1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
        )
        said, cache = out.sequences, out.past_key_values
        answers.append(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))
        print(f"> {question}\n{answers[-1]}\n({mustafar_compile.cache_stats(cache)})\n")
    return answers


if __name__ == "__main__":
    main()
