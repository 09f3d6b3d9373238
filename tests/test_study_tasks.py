"""Tasks of the accuracy study: made by a seed, with their answers in the text where they should be."""

from __future__ import annotations

import random
import re

import pytest
import torch
from transformers import ByT5Tokenizer

from accuracy.dialects import Code, English
from accuracy.tasks import COMMON_WORDS, HOPS, TASKS, VALUES, Prompts

LENGTH = 2500
DEPTHS = 0.0, 0.3, 1.0


class Bytes(ByT5Tokenizer):
    """A tokenizer of bytes that knows a chat."""

    chat_template = "<user>{{ messages[0]['content'] | trim }}</user><assistant>"


@pytest.fixture(scope="module", params=[English, Code])
def prompts(request):
    return Prompts(Bytes(extra_ids=0), request.param())


def decoded(ids) -> str:
    return bytes((ids - 3).tolist()).decode()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_prompt_and_others_another(prompts, name, depth):
    prompt = prompts.prompt(name, LENGTH, depth, seed=0)
    assert torch.equal(prompt.ids, prompts.prompt(name, LENGTH, depth, seed=0).ids)
    assert not torch.equal(prompt.ids, prompts.prompt(name, LENGTH, depth, seed=1).ids)
    longest = max(prompts.lengths) if name != "common words" else 40
    assert LENGTH - longest < len(prompt.ids) <= LENGTH


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", [name for name in TASKS if name != "common words"])
def test_what_is_asked_stands_at_its_depth(prompts, name, depth):
    """Within a piece of the text, up to the longest of them; further facts behind it."""
    prompt = prompts.prompt(name, LENGTH, depth, seed=3)
    text = decoded(prompt.text)
    places = [text.index(decoded(answer).strip(' ,"')) for answer in prompt.answers]
    assert len(places) == {"multi-value": VALUES, "multi-query": VALUES, "variable tracking": HOPS + 1}.get(name, 1)
    assert places == sorted(places)
    room = max(prompts.lengths) + 60 * (len(places) + 7)
    assert abs(places[0] / len(text) - depth) < room / len(text)
    assert (places[0] < len(text) / 2) == (depth < 0.5)


def test_answers_are_those_of_the_question(prompts):
    """Each value stands behind the key that is asked for, and other keys have others."""
    prompt = prompts.prompt("multi-key", LENGTH, 0.5, seed=5)
    rng = random.Random(f"multi-key {LENGTH} 0.5 5")
    task = TASKS["multi-key"](rng, prompts.dialect, 0.5)
    value = decoded(prompt.answers[0]).strip()
    key = next(word for word in decoded(prompt.question).split() if word in str(task.facts) and len(word) > 3)
    right = [fact for _, fact in task.facts if value in fact]
    assert len(right) == 1
    assert len(task.facts) == 8
    assert all(fact in decoded(prompt.text) for _, fact in task.facts)
    assert task.asked.answers[0].strip() == value
    assert key.split("[")[0] in right[0] or "magic" in right[0]


def test_variables_follow_one_from_another():
    task = TASKS["variable tracking"](random.Random(0), Code(), 0.2)
    lines = [line.strip().split(" = ") for _, line in task.facts]
    value = task.asked.said.split("(")[1].split(")")[0]
    assert [source for _, source in lines] == [value, *(name for name, _ in lines[:-1])]
    assert [answer.removeprefix('", "') for answer in task.asked.answers] == [name for name, _ in lines]


@pytest.mark.parametrize("dialect", [English(), Code()])
def test_common_words_are_the_most_common(dialect):
    task = TASKS["common words"](random.Random(0), dialect, 0.0)
    words = [re.findall("[a-z]+", piece)[-1] for piece in task.pieces[:100]]
    most = sorted(set(words), key=words.count)[-COMMON_WORDS:]
    assert [answer.strip(' ,"') for answer in task.asked.answers] == sorted(most)
    assert words.count(most[0]) == 20


def test_what_is_refused(prompts):
    with pytest.raises(ValueError, match="task 'haystack' is unknown; accepted are needle, multi-key"):
        prompts.prompt("haystack", LENGTH, 0.5, 0)
    with pytest.raises(ValueError, match=r"'multi-query' takes \d+ tokens.*; 100 are given"):
        prompts.prompt("multi-query", 100, 0.5, 0)
