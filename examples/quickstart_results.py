# SPDX-License-Identifier: Apache-2.0
"""What the ways of generating gave, side by side: the tables of ``quickstart.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import mustafar_compile

SAVES = "The compressed cache saves memory, and with long contexts time: see benchmarks/RESULTS.md."


@dataclass
class Prompt:
    """A prompt, how the right continuation begins ("" where nobody knows), what is asked (default: the last line)."""

    text: str
    answer: str = ""
    question: str = ""

    def __post_init__(self) -> None:
        self.question = self.question or self.text.rsplit("\n", 1)[-1]


@dataclass
class Result:
    """What one way of generating gave: for each prompt the new tokens and the text, then sizes and times."""

    label: str
    tokens: list[list[int]]
    texts: list[str]
    cache: mustafar_compile.CacheStats
    token_seconds: float
    first_call_seconds: float


def equal_tokens(result: Result, dense: Result) -> tuple[int, int, int | None]:
    """(tokens equal to the dense ones, all tokens, earliest place in a prompt's answer where one differs)."""
    pairs = [list(zip(mine, theirs, strict=True)) for mine, theirs in zip(result.tokens, dense.tokens, strict=True)]
    equal = [[a == b for a, b in row] for row in pairs]
    first = min((row.index(False) for row in equal if False in row), default=None)
    return sum(map(sum, equal)), sum(map(len, equal)), first


def text_table(prompts: Sequence[Prompt], results: Sequence[Result]) -> Table:
    """The continuations of the first prompt, side by side; what differs from the dense one is coloured."""
    table = Table(title="How the first prompt goes on", title_justify="left", box=box.SIMPLE_HEAD)
    for result in results:
        table.add_column(result.label, overflow="fold", ratio=1)
    dense, question = results[0].texts[0], prompts[0].question
    cells = []
    for result in results:
        text = result.texts[0]
        same = next((i for i, (a, b) in enumerate(zip(text, dense, strict=False)) if a != b), len(text))
        cells.append(Text.assemble((question, "dim"), " ", text[:same], (text[same:], "yellow")))
    table.add_row(*cells)
    return table


def fact_table(prompts: Sequence[Prompt], results: Sequence[Result]) -> Table:
    """What each way of generating answers to each question."""
    table = Table(title="Facts recalled from the start of the prompt", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("question", "right answer", *(result.label for result in results)):
        table.add_column(name)
    for i, prompt in enumerate(prompts):
        cells = []
        for result in results:
            answer = result.texts[i][: len(prompt.answer)]
            right = answer == prompt.answer
            cells.append(Text("right" if right else f"wrong: {answer!r}", "green" if right else "red"))
        table.add_row(Text(prompt.question), prompt.answer, *cells)
    return table


def summary_table(results: Sequence[Result]) -> Table:
    """Agreement, memory and time of each way of generating."""
    table = Table(title="Summary", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "as dense", "differs from", "KV cache", "of dense", "per token", "first call"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for result in results:
        equal, total, first = equal_tokens(result, results[0])
        table.add_row(
            result.label,
            f"{equal}/{total} {equal / total:.0%}",
            "-" if first is None else f"token {first + 1}",
            f"{result.cache.stored_bytes / 2**20:.2f} MiB",
            f"{result.cache.ratio:.1%}",
            f"{result.token_seconds * 1e3:.1f} ms",
            f"{result.first_call_seconds:.1f} s",
        )
    return table


def show(console: Console, prompts: Sequence[Prompt], results: Sequence[Result]) -> None:
    """All tables, and what to make of them."""
    console.print(text_table(prompts, results))
    if prompts[0].answer:
        console.print(fact_table(prompts, results))
    console.print(summary_table(results))
    for result in results:
        console.print(f"{result.label} cache: {result.cache}", highlight=False)
    console.print(f"\n{SAVES} The first call includes compiling.", highlight=False)
