"""Teacher-forced evaluation against generation token by token, and what tools that are missing say."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch
from transformers import DynamicCache

from models import hf_model
from mustafar_compile.errors import UnknownLayerError
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


def forward_of_one_layer(family, settings, **how):
    model = hf_model(family, num_hidden_layers=1, **how)
    with teacher_forced.teacher_forced(model, settings):
        model(torch.ones(1, 4, dtype=torch.int64), use_cache=False)


def test_attention_that_is_not_plain_is_refused():
    with pytest.raises(NotImplementedError, match="attends with sinks"):
        forward_of_one_layer("gpt_oss", Settings(), attention="eager", layer_types=["full_attention"])


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(UnknownLayerError, match="skip_layers names layer 1, which the model does not"):
        forward_of_one_layer("llama", Settings(skip_layers=[0, 1]))


@pytest.mark.parametrize("tool", ["kvpress", "lm_eval"])
def test_a_missing_tool_is_named_with_its_command(tool, monkeypatch):
    module = f"mustafar_compile.integrations.{tool}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(ImportError, match=f"{module} needs .*pip install"):
        import_module(module)
