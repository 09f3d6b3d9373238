"""Tasks that a model can only do with what stands far back in its cache, after RULER (arXiv 2404.06654).

Everything is made here, by a seed: needles, chains of variables and lists of words in a text of the standard library.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train_tiny_llama import WORDS

from .dialects import Asked, Dialect

OTHER_KEYS = 7
VALUES = 4  # of one key, or keys that are asked for
HOPS = 4
COMMON_WORDS = 3
LISTED = 800  # times each common word; with two others each time, more than any prompt takes


@dataclass(frozen=True)
class Task:
    """facts: where in the text each line stands, from 0 to 1, in that order. pieces: the text, if not the usual one."""

    facts: list[tuple[float, str]]
    asked: Asked
    pieces: list[str] | None = None


Maker = Callable[[random.Random, Dialect, float], Task]
"""Makes a task; the first fact that is asked for stands at the depth given, further ones behind it."""


def needle(rng: random.Random, dialect: Dialect, depth: float) -> Task:
    """One key, one value."""
    return _needles(rng, dialect, [(depth, dialect.name(rng))])


def multi_key(rng: random.Random, dialect: Dialect, depth: float) -> Task:
    """One key of several."""
    key, *others = _names(rng, dialect, 1 + OTHER_KEYS)
    return _needles(rng, dialect, [(depth, key)], [(rng.random(), other) for other in others])


def multi_value(rng: random.Random, dialect: Dialect, depth: float) -> Task:
    """All values of one key, in order."""
    key = dialect.name(rng)
    return _needles(rng, dialect, [(place, key) for place in _places(rng, depth, VALUES)])


def multi_query(rng: random.Random, dialect: Dialect, depth: float) -> Task:
    """Several keys are asked for."""
    places = _places(rng, depth, VALUES)
    return _needles(rng, dialect, list(zip(places, _names(rng, dialect, VALUES), strict=True)))


def variable_tracking(rng: random.Random, dialect: Dialect, depth: float) -> Task:
    """All variables of a chain of assignments that begins with a number."""
    value, names = str(rng.randrange(10**4, 10**5)), _distinct(lambda: dialect.variable(rng), HOPS + 1)
    said = [value, *map(dialect.referred, names)]
    lines = [dialect.assigned(name, source) for name, source in zip(names, said, strict=False)]
    return Task(list(zip(_places(rng, depth, HOPS + 1), lines, strict=True)), dialect.asked_variables(value, names))


def common_words(rng: random.Random, dialect: Dialect, depth: float) -> Task:
    """The most frequent words of a list, in the order of the alphabet. Depth has no meaning here."""
    words = rng.sample(WORDS, len(WORDS))
    common, others = sorted(words[:COMMON_WORDS]), itertools.cycle(words[COMMON_WORDS:])
    groups = [rng.sample([*common, next(others), next(others)], COMMON_WORDS + 2) for _ in range(LISTED)]
    return Task([], dialect.asked_common(common), dialect.listed([word for group in groups for word in group]))


def _needles(
    rng: random.Random, dialect: Dialect, asked: list[tuple[float, str]], others: list[tuple[float, str]] | None = None
) -> Task:
    values = [dialect.value(rng) for _ in asked]
    facts = [(place, dialect.fact(key, value)) for (place, key), value in zip(asked, values, strict=True)]
    facts += [(place, dialect.fact(key, dialect.value(rng))) for place, key in others or []]
    keys = list(dict.fromkeys(key for _, key in asked))
    return Task(sorted(facts, key=lambda fact: fact[0]), dialect.asked(keys, values))


def _names(rng: random.Random, dialect: Dialect, count: int) -> list[str]:
    return _distinct(lambda: dialect.name(rng), count)


def _distinct(make: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def _places(rng: random.Random, depth: float, count: int) -> list[float]:
    return sorted([depth, *(rng.uniform(depth, 1) for _ in range(count - 1))])


TASKS: dict[str, Maker] = {
    "needle": needle,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variable tracking": variable_tracking,
    "common words": common_words,
}


@dataclass(frozen=True)
class Prompt:
    """Tokens of a text, of the question behind it, and of each part of the right answer; int64 [n] each."""

    text: Tensor
    question: Tensor
    answers: list[Tensor]

    @property
    def ids(self) -> Tensor:
        """All of them."""
        return torch.cat([self.text, self.question, *self.answers])


class Prompts:
    """Makes prompts of a given length for a model's tokenizer."""

    def __init__(self, tokenizer: Any, dialect: Dialect) -> None:
        self.tokenizer, self.dialect = tokenizer, dialect
        self.pieces = dialect.pieces()
        self.lengths = [len(self.encoded(piece)) for piece in self.pieces]

    def encoded(self, text: str) -> Tensor:
        """Tokens of a text, int64 [n]."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)

    def prompt(self, name: str, length: int, depth: float, seed: int) -> Prompt:
        """A task of up to so many tokens with its answer. The same arguments give the same prompt.

        depth: where the first fact stands, from 0 (the start of the text) to 1. Raises ValueError for an unknown task
        and where the question alone is longer.
        """
        if name not in TASKS:
            raise ValueError(f"task {name!r} is unknown; accepted are {', '.join(TASKS)}")
        rng = random.Random(f"{name} {length} {depth} {seed}")
        task = TASKS[name](rng, self.dialect, depth)
        before, after = self.dialect.framed(self.tokenizer, task.asked)
        question, answers = self.encoded(after), [self.encoded(answer) for answer in task.asked.answers]
        taken = len(question) + sum(map(len, answers)) + len(self.encoded(before))
        taken += sum(len(self.encoded(fact)) for _, fact in task.facts)
        if taken > length:
            raise ValueError(f"task {name!r} takes {taken} tokens without any text around it; {length} are given")
        text = before + "".join(_inserted(self._chosen(rng, task, length - taken), task.facts))
        return Prompt(self.encoded(text), question, answers)

    def _chosen(self, rng: random.Random, task: Task, room: int) -> list[str]:
        """Neighbouring pieces of the text that fit into so many tokens."""
        if task.pieces is not None:
            pieces, lengths, first = task.pieces, [len(self.encoded(piece)) for piece in task.pieces[:room]], 0
        else:
            pieces, lengths, first = self.pieces, self.lengths, rng.randrange(len(self.pieces))
        chosen = []
        for place in itertools.chain(range(first, len(lengths)), range(first)):
            room -= lengths[place]
            if room < 0:
                break
            chosen.append(pieces[place])
        return chosen


def _inserted(pieces: list[str], facts: list[tuple[float, str]]) -> list[str]:
    """Facts between pieces, each at its share of them."""
    inserted = list(pieces)
    for place, fact in reversed(facts):
        inserted.insert(round(place * len(pieces)), fact)
    return inserted
