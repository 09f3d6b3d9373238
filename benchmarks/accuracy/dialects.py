"""The two ways in which tasks are put to a model: as English for a chat model, or as Python for a byte model."""

from __future__ import annotations

import inspect
import random
import re
import string
from dataclasses import dataclass
from importlib import import_module
from pydoc_data import topics
from typing import Any

from train_tiny_llama import HELD_OUT, TABLES, VALUE_ALPHABET, VALUE_LENGTH, WORDS

_TEXT = "[text]"  # where it goes in a chat


@dataclass(frozen=True)
class Asked:
    """A question at the end of a text, how the answer begins, and its right parts."""

    question: str
    said: str
    answers: tuple[str, ...]


def prose() -> str:
    """What ``help()`` says on Python: English, and examples in it."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def source() -> str:
    """Modules of the standard library that the byte models were not trained on."""
    return "\n".join(inspect.getsource(import_module(name)) for name in HELD_OUT)


class English:
    """Facts much as RULER states them (arXiv 2404.06654), questions as a message to a chat model."""

    def pieces(self) -> list[str]:
        """What the text between facts is made of: sentences and paragraphs."""
        return [piece for piece in re.split(r"(?<=[.:]\s)|(?<=\n\n)", prose()) if piece]

    def name(self, rng: random.Random) -> str:
        return rng.choice(WORDS).capitalize()

    def value(self, rng: random.Random) -> str:
        word = rng.choice(WORDS)
        return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"

    def fact(self, key: str, value: str) -> str:
        return f"The parcel from {key} contains {value}. "

    def asked(self, keys: list[str], values: list[str]) -> Asked:
        """All values of the keys."""
        names = ", ".join(keys)
        if len(values) == 1:
            return self._asked(
                f"What does the parcel from {names} contain?", f"The parcel from {names} contains", values
            )
        return self._asked(f"What do the parcels from {names} contain?", f"The parcels from {names} contain", values)

    def variable(self, rng: random.Random) -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=5))

    def assigned(self, name: str, value: str) -> str:
        return f"VAR {name} = {value}. "

    def referred(self, name: str) -> str:
        return f"VAR {name}"

    def asked_variables(self, value: str, names: list[str]) -> Asked:
        question = f"Find all variables that are assigned the value {value} in the text above."
        return self._asked(question, f"The variables that are assigned the value {value} are:", names)

    def listed(self, words: list[str]) -> list[str]:
        """Pieces that list words."""
        return [f"{place}. {word}\n" for place, word in enumerate(words, 1)]

    def asked_common(self, words: list[str]) -> Asked:
        question = f"What are the {len(words)} most common words in the above list?"
        return self._asked(question, "The most common words, in the order of the alphabet, are:", words)

    def _asked(self, question: str, said: str, answers: list[str]) -> Asked:
        return Asked(question, said, (f" {answers[0]}", *(f", {answer}" for answer in answers[1:])))

    def framed(self, tokenizer: Any, asked: Asked) -> tuple[str, str]:
        """What comes before the text, and what after it."""
        end = f"\n\n{asked.question}"
        if not tokenizer.chat_template:
            return "", f"{end} {asked.said}"
        message = {"role": "user", "content": f"{_TEXT}{end}"}
        whole = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        before, after = whole.split(_TEXT)
        return before, after + asked.said


class Code:
    """Facts as the demo's model knows them, and further ones in their style."""

    def pieces(self) -> list[str]:
        return source().splitlines(keepends=True)

    def name(self, rng: random.Random) -> str:
        return f'{rng.choice(TABLES)}["{rng.choice(WORDS)}"]'

    def value(self, rng: random.Random) -> str:
        return "".join(rng.choices(VALUE_ALPHABET, k=VALUE_LENGTH))

    def fact(self, key: str, value: str) -> str:
        return f'{key} = "{value}"\n'

    def asked(self, keys: list[str], values: list[str]) -> Asked:
        if len(keys) == len(values) == 1:
            return self._asked(f'assert {keys[0]} == "', values)
        names = ", ".join(keys) if len(keys) > 1 else f"*history({keys[0]})"
        return self._asked(f'assert [{names}] == ["', values)

    def variable(self, rng: random.Random) -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=5))

    def assigned(self, name: str, value: str) -> str:
        return f"{name} = {value}\n"

    def referred(self, name: str) -> str:
        return name

    def asked_variables(self, value: str, names: list[str]) -> Asked:
        return self._asked(f'assert names_of({value}) == ["', names)

    def listed(self, words: list[str]) -> list[str]:
        return [f'words.append("{word}")\n' for word in words]

    def asked_common(self, words: list[str]) -> Asked:
        return self._asked(f'assert most_common(words, {len(words)}) == ["', words)

    def _asked(self, question: str, answers: list[str]) -> Asked:
        return Asked("", question, (answers[0], *(f'", "{answer}' for answer in answers[1:])))

    def end(self, asked: Asked) -> str:
        """What comes after the answer."""
        return '"]\n' if asked.said.endswith('["') else '"\n'

    def framed(self, tokenizer: Any, asked: Asked) -> tuple[str, str]:
        return "", asked.said


Dialect = English | Code
