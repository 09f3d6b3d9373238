"""Each Python block of the README and of docs/ runs, in the order in which a page has them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compilers import without_compiler

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL) for page in PAGES}


@pytest.fixture
def what_a_reader_has() -> dict:
    """What blocks take from elsewhere: a model, its inputs, and a step of the reader's own."""
    name = "examples/tiny_llama"
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32", num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer("x = ", add_special_tokens=False, return_tensors="pt")
    import mustafar_compile

    known = {"model": model, "tokenizer": tokenizer, "texts": [Path(__file__).read_text()[:200]], "inputs": inputs}
    return {"torch": torch, "mustafar_compile": mustafar_compile, "step": torch.sin} | known


def runs_here(block: str) -> bool:
    """Whether what a block imports is installed: some show other people's tools."""
    return all(importlib.util.find_spec(name) for name in re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE))


def shortened(block: str, folder: Path) -> str:
    """A block with one layer and few tokens, that writes into ``folder``."""
    block = block.replace('dtype="float32")', 'dtype="float32", num_hidden_layers=1)')
    block = block.replace("max_new_tokens=100", "max_new_tokens=4")
    return re.sub(r'"(cache.pt|budget.json)"', lambda file: repr(str(folder / file[1])), block)


@pytest.mark.parametrize(
    "page",
    [  # those of the README stand in docs/, too
        pytest.param(page, id=page.name, marks=[pytest.mark.nightly] if page.name == "README.md" else [])
        for page in PAGES
        if BLOCKS[page]
    ],
)
def test_blocks_run(page, what_a_reader_has, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with without_compiler():
        for block in filter(runs_here, BLOCKS[page]):
            exec(compile(shortened(block, tmp_path), page.name, "exec"), what_a_reader_has)
