"""The runner of transformers' own tests, over a small source tree that stands in for theirs."""

from __future__ import annotations

import pytest
import transformers

import peers

OF_GENERATION = """
import torch
from models import hf_model, prompt


class GenerationTesterMixin:
    def test_greedy(self):
        assert hf_model().generate(**prompt(), max_new_tokens=4, do_sample=False).shape == (2, 13)

    def test_runs_eagerly(self):
        model, compiling = hf_model(), []
        model.register_forward_pre_hook(lambda *_: compiling.append(torch.compiler.is_compiling()))
        model.generate(**prompt(), max_new_tokens=4)
        assert not any(compiling)
"""
OF_A_MODEL = """
import unittest

from ...generation.test_utils import GenerationTesterMixin


class LlamaTest(GenerationTesterMixin, unittest.TestCase):
    def test_of_something_else(self):
        raise AssertionError
"""


@pytest.fixture
def source(tmp_path):
    files = {
        "src/transformers/__init__.py": f'__version__ = "{transformers.__version__}"\n',
        "tests/generation/test_utils.py": OF_GENERATION,
        "tests/models/llama/test_modeling_llama.py": OF_A_MODEL,
        "tests/generation/test_shapes.py": "def test_nothing():\n    pass\n",
    }
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for folder in ("", "generation", "models", "models/llama"):
        (tmp_path / "tests" / folder / "__init__.py").touch()
    return tmp_path


@pytest.mark.nightly
def test_what_differs_is_named(source, capsys):
    assert peers.main(["--source", str(source), "--models", "llama"]) == 1
    name = "tests.models.llama.test_modeling_llama.LlamaTest"
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row == f"| {name}.test_runs_eagerly | passed | failure |"
    assert last == "1 of 3 tests differ; compiled: {'passed': 2, 'failure': 1}, with a compressed cache 2"


@pytest.mark.parametrize("version", ["4.0.0", None])
def test_another_source_is_refused(version, source, capsys):
    init = source / "src" / "transformers" / "__init__.py"
    init.write_text(f'__version__ = "{version}"\n') if version else init.unlink()
    with pytest.raises(SystemExit):
        peers.main(["--source", str(source)])
    accepted = f"is transformers {version}; accepted is {transformers.__version__}" if version else "as a source of"
    assert accepted in capsys.readouterr().err
