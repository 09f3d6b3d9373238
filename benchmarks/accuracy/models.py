"""The models of the accuracy study, what they read, and how they are asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import quickstart
import smollm2

from .dialects import Code, Dialect, English, prose, source
from .tasks import Prompt, Prompts

TEXTS = 4
TOKENS = 3072  # of a text


@dataclass
class Subject:
    """A model, and what it reads: ``text`` unless another one is named. demo: prompts of the demo, with answers."""

    model: Any
    tokenizer: Any
    dialect: Dialect
    text: str
    demo: list[quickstart.Prompt]

    @functools.cached_property
    def prompts(self) -> Prompts:
        """Makes prompts."""
        return Prompts(self.tokenizer, self.dialect)

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def texts(self) -> list[Tensor]:
        """``TEXTS`` texts of ``TOKENS`` tokens."""
        return self.texts_of(self.text, TEXTS, TOKENS)

    def texts_of(self, text: str, count: int, tokens: int) -> list[Tensor]:
        """Parts of a text, evenly apart: int64 [tokens] each. Raises ValueError where it is too short."""
        ids = self.prompts.encoded(text)
        if len(ids) < count * tokens:
            raise ValueError(f"{count} texts of {tokens} tokens are wanted; the whole text has {len(ids)}")
        apart = len(ids) // count
        return [ids[i * apart : i * apart + tokens].to(self.model.device) for i in range(count)]

    @property
    def questions(self) -> list[Prompt]:
        """The demo's: facts in a text, asked for at its end."""
        encoded = self.prompts.encoded
        found = []
        for prompt in self.demo:
            start = prompt.text.rindex(prompt.question)
            parts = encoded(prompt.text[:start]), encoded(prompt.text[start:])
            found.append(Prompt(*parts, [encoded(prompt.answer)]))
        return found


def tiny_llama(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
    """The demo's model, which reads modules that it was not trained on, byte by byte."""
    return named(str(quickstart.TINY_MODEL), device, dtype)


def smollm2_135m(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
    """SmolLM2-135M-Instruct, which reads what ``help()`` says on Python."""
    return named(smollm2.NAME, device, dtype)


def named(name: str, device: str, dtype: torch.dtype) -> Subject:
    """A folder or a name on the Hugging Face Hub. Models of bytes are asked in Python, others in English."""
    model, tokenizer = quickstart.load(name, device, dtype)
    if isinstance(tokenizer, quickstart.ByT5Tokenizer):
        return Subject(model, tokenizer, Code(), source(), quickstart.fact_prompts())
    chat = smollm2.NAME if tokenizer.chat_template else None
    demo = quickstart.read_prompts(None, smollm2.NAME, tokenizer) if chat else []
    return Subject(model, tokenizer, English(), prose(), demo)


SUBJECTS: dict[str, Callable[..., Subject]] = {"tiny_llama": tiny_llama, "smollm2": smollm2_135m}


def subject(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
    """One of ``SUBJECTS``, or any checkpoint."""
    return SUBJECTS[name](device, dtype) if name in SUBJECTS else named(name, device, dtype)
