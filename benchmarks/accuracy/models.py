"""The models of the accuracy study, and what they read."""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import quickstart
import smollm2

TEXTS = 4
TOKENS = 3072  # of a text


@dataclass
class Subject:
    """A model in float32, its tokenizer, texts [T] that it reads, and questions: ids of a prompt and of its right
    answer."""

    model: Any
    tokenizer: Any
    texts: list[Tensor]
    questions: list[tuple[Tensor, Tensor]]


def tiny_llama() -> Subject:
    """The demo's model, which reads a module that it was not trained on, byte by byte."""
    tokenizer, model = _loaded(str(quickstart.TINY_MODEL))
    ids = _ids(tokenizer, inspect.getsource(textwrap))
    return Subject(model, tokenizer, list(ids.split(TOKENS))[:TEXTS], _questions(tokenizer, quickstart.fact_prompts()))


def smollm2_135m() -> Subject:
    """SmolLM2-135M-Instruct, which reads what ``help()`` says on Python: prose, and examples in it."""
    tokenizer, model = _loaded(smollm2.NAME)
    ids = _ids(tokenizer, "\n\n".join(topics.topics[name] for name in sorted(topics.topics)))
    apart = len(ids) // TEXTS
    texts = [ids[i * apart : i * apart + TOKENS] for i in range(TEXTS)]
    return Subject(
        model, tokenizer, texts, _questions(tokenizer, quickstart.read_prompts(None, smollm2.NAME, tokenizer))
    )


def _loaded(name: str) -> tuple[Any, Any]:
    model, tokenizer = quickstart.load(name, "cpu", torch.float32)
    return tokenizer, model


def _ids(tokenizer: Any, text: str) -> Tensor:
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]


def _questions(tokenizer: Any, prompts: list[quickstart.Prompt]) -> list[tuple[Tensor, Tensor]]:
    return [(_ids(tokenizer, prompt.text), _ids(tokenizer, prompt.answer)) for prompt in prompts]


SUBJECTS = {"tiny_llama": tiny_llama, "smollm2": smollm2_135m}
