"""Teacher-forced evaluation against generation token by token, and what tools that are missing say."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch
from transformers import DynamicCache

from models import hf_model
from mustafar_compile.integrations import teacher_forced
from mustafar_compile.settings import Settings
from nightly import at_night
from reference import pruned_generation

SPARSITIES, WINDOW, TOKENS = (0.25, 0.7), 8, 40


def settings(**changes) -> Settings:
    return Settings(key_sparsity=SPARSITIES[0], value_sparsity=SPARSITIES[1], window=WINDOW, **changes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("llama", {}, None),
        ("gemma3_text", {}, None),
        *at_night([("llama", {"skip_layers": [1]}, [0]), ("llama", {"key_code": "int8", "value_code": "int4"}, None)]),
    ],
)
def test_a_text_is_read_as_token_by_token(family, changes, layers, monkeypatch):
    monkeypatch.setattr(teacher_forced, "_QUERIES", 16)
    model, ids = hf_model(family, head_dim=32), torch.randint(1, 100, (2, TOKENS))
    dense = model(ids).logits
    codes = changes.get("key_code", "none"), changes.get("value_code", "none")
    with pruned_generation(*SPARSITIES, WINDOW, layers, codes):
        past = DynamicCache(config=model.config)
        expected = torch.cat([model(ids[:, i : i + 1], past_key_values=past).logits for i in range(TOKENS)], 1)
    with teacher_forced.teacher_forced(model, settings(**changes)):
        padded = torch.nn.functional.pad(ids, (0, 3))
        actual = model(padded, use_cache=False).logits[:, :TOKENS]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(actual, dense, rtol=1e-3, atol=1e-4)
    assert torch.equal(model(ids).logits, dense)  # it attends as before


def test_attention_that_is_not_plain_is_refused():
    model = hf_model("gpt_oss", attention="eager", num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(NotImplementedError, match="s_aux"), teacher_forced.teacher_forced(model, Settings()):
        model(torch.ones(1, 4, dtype=torch.int64), use_cache=False)


@pytest.mark.parametrize("tool", ["kvpress", "lm_eval"])
def test_a_missing_tool_is_named_with_its_command(tool, monkeypatch):
    module = f"mustafar_compile.integrations.{tool}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(ImportError, match=f"{module} needs .*pip install"):
        import_module(module)
