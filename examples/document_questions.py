# SPDX-License-Identifier: Apache-2.0
"""Questions about a long document: it is read once, and each question goes on from a copy of its compressed cache.

python examples/document_questions.py      # SmolLM2-135M-Instruct; smollm2.py says how to install it
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pydoc_data import topics
from typing import Any

import torch

import mustafar_compile
import smollm2

PAGES = [topics.topics[name] for name in ("compound", "objects")]  # English prose of the standard library
FACT = "The parcel from Oslo contains an umbrella."
QUESTIONS = "What does the parcel from Oslo contain?", "Where is the parcel from?"


@torch.no_grad()
def main(model: Any, tokenizer: Any, document: str, questions: Sequence[str], new_tokens: int = 24) -> list[str]:
    """Print the answer to each question about ``document``, and what its cache takes. Returns the answers."""
    model.compile(backend="mustafar", options={"preset": "balanced"})
    message = {"role": "user", "content": f"{document}\n\n{{question}}"}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    before, after = prompt.split("{question}")

    def ids_of(text: str) -> torch.Tensor:
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    read = ids_of(before)
    cache = model(read).past_key_values
    print(mustafar_compile.cache_stats(cache))

    answers = []
    for question in questions:
        ids = torch.cat([read, ids_of(question + after)], dim=1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(cache),  # a growing cache can be continued once
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        print(f"> {question}\n{answers[-1]}")
    return answers


if __name__ == "__main__":
    text = "\n\n".join(PAGES)[:6000]
    main(*smollm2.load(torch.float32), f"{text[:500]}\n\n{FACT}\n\n{text[500:]}", QUESTIONS)
