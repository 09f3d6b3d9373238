"""Calibration: what it measures against the oracle and against what really happens, and what becomes of a budget."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import mustafar_compile
from accuracy import teacher_forced
from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import Budget, cache_stats, calibrate
from mustafar_compile.calibration.attending import Attention
from mustafar_compile.calibration.budget import LayerBudget, Stored
from mustafar_compile.calibration.calibrate import measured
from mustafar_compile.calibration.errors import Reader
from mustafar_compile.settings import merged_options, read_options
from reference import kept_count, prune, reference_attention

WINDOW, HEAD_DIM = 4, 16


def tokens(length: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(1, 100, (length,), generator=torch.Generator().manual_seed(seed))


def budget_of(model, **how) -> Budget:
    how = {"bytes": 0.45, "window": WINDOW, "dtype": torch.bfloat16, "progress": False} | how
    return calibrate(model, [tokens()], **how)


@pytest.mark.parametrize("role", ["key", "value"])
def test_a_loss_is_half_the_square_of_the_error_along_the_gradient(role):
    length, heads, group = 24, 2, 2
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, heads, length, HEAD_DIM)
    q, gradient = torch.randn(2, 1, heads * group, length, HEAD_DIM)
    sparsity = {"key": 0.0, "value": 0.0, role: 0.5}
    expected = 0.0
    for t in range(length):
        past = q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]
        pruned = reference_attention(*past, sparsity["key"], sparsity["value"], WINDOW)
        error = (pruned - reference_attention(*past, 0.0, 0.0, WINDOW))[0, :, 0]
        expected += (gradient[0, :, t] * error).sum(-1).square().sum().item() / 2 / length
    reader = Reader(Attention(0, q, k, v, HEAD_DIM**-0.5, None), gradient, WINDOW)
    loss = {"key": reader.key_loss, "value": reader.value_loss}[role]
    dense = {"key": k, "value": v}[role]
    assert loss(prune(dense, kept_count(HEAD_DIM, 0.5))).sum().item() == pytest.approx(expected, rel=1e-4)
    assert loss(dense).sum().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("role", ["key", "value"])
def test_what_is_predicted_of_a_layer_happens(role):
    """The divergence of a model in which one layer alone stores its keys or values so."""
    model, ids = hf_model(num_hidden_layers=2, initializer_range=0.1), tokens(200)
    found = measured(model, [ids], None, ["none"], WINDOW, torch.float32, progress=False)
    said = model(ids[None]).logits[0].log_softmax(-1)
    for layer in range(2):
        calls = iter(range(2))

        def attend(q, k, v, scale, calls=calls, layer=layer):
            stores = next(calls) == layer
            stored_k, stored_v = (
                prune(x, kept_count(HEAD_DIM, 0.5)) if stores and role == name else x
                for name, x in (("key", k), ("value", v))
            )
            return teacher_forced.attention(q, k, v, stored_k, stored_v, WINDOW, scale)

        with torch.no_grad(), teacher_forced.attending(model, attend):
            now = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
        happened = (said.exp() * (said - now)).sum(-1).mean().item()
        assert 0.5 < found.losses[layer, role][Stored(0.5)].sum() / happened < 1.3


def test_a_budget_is_kept_and_used_well():
    model = hf_model(num_hidden_layers=2, initializer_range=0.1).train()
    budget = budget_of(model, codes=["none"], bytes=0.9)
    assert budget.bytes <= 0.9
    assert 0 < budget.loss < budget.uniform_loss
    assert sorted(budget.layers) == [0, 1]
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.inference_mode():
        assert budget_of(model, codes=["none"], bytes=0.9) == budget, "it is not deterministic"
    coded = budget_of(model, bytes=0.9)
    assert coded.loss < budget.loss
    assert "int8" in {x.code for layer in coded.layers.values() for x in (layer.key, layer.value)}


@torch.no_grad()
def test_a_compiled_model_stores_by_a_saved_budget(tmp_path):
    """Layers with a sliding window have no share in it, and it is calibrated as if nothing were compiled."""
    model = hf_model("gemma3_text")
    budget = budget_of(model)
    assert list(budget.layers) == [1]
    budget.save(tmp_path / "budget.json")
    assert Budget.load(tmp_path / "budget.json") == budget
    with without_compiler():
        mustafar_compile.prepare(model, budget=str(tmp_path / "budget.json"), strict=True)
        past = model(**prompt()).past_key_values
        assert budget_of(model) == budget
    (layer,) = budget.layers.values()
    formats = [x.format for x in (past.layers[1].keys, past.layers[1].values)]
    assert [f.kept for f in formats] == [kept_count(HEAD_DIM, x.sparsity) for x in (layer.key, layer.value)]
    assert [f.code for f in formats] == [layer.key.code, layer.value.code]
    assert [f.window for f in formats] == [WINDOW, WINDOW]
    assert cache_stats(past).compressed_tensors == 2
    assert sum(f.token_bytes(2) for f in formats) / (2 * 2 * HEAD_DIM) == budget.bytes


@torch.no_grad()
def test_a_budget_by_head_in_two_groups(tmp_path):
    """Of the same bytes it loses less, and a compiled model takes them."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    model = hf_model(num_hidden_layers=2, initializer_range=0.1, **heads)
    by_layer, budget = (budget_of(model, codes=["none"], bytes=0.75, by_head=by_head) for by_head in (False, True))
    assert budget.bytes <= 0.75
    assert budget.loss < by_layer.loss < by_layer.uniform_loss == budget.uniform_loss
    budget.save(tmp_path / "budget.json")
    assert Budget.load(tmp_path / "budget.json") == budget
    with without_compiler():
        model.compile(backend="mustafar", options={"budget": str(tmp_path / "budget.json"), "strict": True})
        past = model(**prompt()).past_key_values
    layouts = [x.format for layer in past.layers for x in (layer.keys, layer.values)]
    assert max(len(layout.parts) for layout in layouts) == 2
    parts = [[*zip(layout.groups or [range(4)], layout.parts, strict=True)] for layout in layouts]
    stored = sum(len(group) * part.token_bytes(2) for own in parts for group, part in own)
    assert stored / (2 * 2 * 4 * 2 * HEAD_DIM) == budget.bytes
    for number, layer in budget.layers.items():
        for wanted, own in zip((layer.key, layer.value), parts[2 * number : 2 * number + 2], strict=True):
            kept = {head: part.kept for group, part in own for head in group}
            each = wanted if isinstance(wanted, tuple) else (wanted,) * 4
            assert [kept[head] for head in range(4)] == [kept_count(HEAD_DIM, x.sparsity) for x in each]


BUDGET = Budget({0: LayerBudget(Stored(0.5, "int8"), Stored(0.75))}, 8, 0.4, 0.01, 0.02)


def test_a_budget_is_settings():
    settings, _ = read_options(None, {"budget": BUDGET, "value_code": "int4"})
    assert (settings.at("key_sparsity", 0), settings.at("key_code", 0)) == (0.5, "int8")
    assert (settings.at("value_sparsity", 0), settings.at("value_code", 0)) == (0.75, "int4")
    assert settings.window == 8
    options, read = merged_options("prepare", None, {"budget": BUDGET}, {"value_code": "int4"})
    assert read == read_options(None, options)[0] == settings
    with pytest.raises(ValueError, match="a preset and a budget are given; accepted is one of them"):
        read_options(None, {"budget": BUDGET, "preset": "safe"})
    with pytest.raises(ValueError, match="budget=3 is not accepted; it must be a Budget or the path of a saved one"):
        read_options(None, {"budget": 3})


def test_a_budget_is_a_table():
    assert str(BUDGET).splitlines()[0] == (
        "mustafar: a budget of 40.0% of the dense bytes; "
        "predicted loss 0.0100 nats a token, 0.0200 with all layers alike"
    )
    assert "0.5 int8   0.75" in str(BUDGET)
    key = Stored(0.5, "int8"), Stored(0.25), Stored(0.5, "int8")
    assert "0, 2: 0.5 int8; 1: 0.25   0.75" in str(Budget({0: LayerBudget(key, Stored(0.75))}, 8, 0.4, 0.01, 0.02))


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: "{",
        lambda saved: json.dumps([]),
        lambda saved: json.dumps(saved | {"version": 2}),
        lambda saved: json.dumps(saved | {"more": 1}),
        lambda saved: json.dumps(saved | {"layers": {"first": saved["layers"]["0"]}}),
        lambda saved: json.dumps(saved | {"layers": {"0": {"key": {"sparsity": 0.5}}}}),
        lambda saved: json.dumps(saved | {"layers": {"0": {"key": [0.5], "value": {"sparsity": 0.5}}}}),
    ],
)
def test_a_file_that_is_no_budget(tmp_path, change):
    BUDGET.save(tmp_path / "budget")
    (tmp_path / "budget").write_text(change(json.loads((tmp_path / "budget").read_text())))
    with pytest.raises(ValueError, match="budget' is no saved budget: "):
        Budget.load(tmp_path / "budget")


REFUSED = {
    "a text": (TypeError, "prompts must be a list of texts or of ids", {"prompts": "text"}),
    "none": (TypeError, "prompts must be a list of texts or of ids", {"prompts": []}),
    "no tokenizer": (TypeError, "needs a tokenizer for prompts that are texts", {"prompts": ["text"]}),
    "no ids": (TypeError, r"must be integers .*; given are \[60\] torch.float32", {"prompts": [torch.rand(60)]}),
    "a short one": (ValueError, "a prompt of 4 tokens has none outside the window of 4", {"prompts": [[1, 2, 3, 4]]}),
    "bytes": (ValueError, r"bytes=0 is not accepted; it must be a number in \(0, 1\]", {"bytes": 0}),
    "codes": (ValueError, "codes=.'int2'. is not accepted; it must be some of 'none', 'int8'", {"codes": ["int2"]}),
    "window": (ValueError, "window=0 is not accepted", {"window": 0}),
    "by head": (ValueError, "by_head=1 is not accepted; it must be True or False", {"by_head": 1}),
    "dtype": (ValueError, "dtype=torch.int8 is not accepted", {"dtype": torch.int8}),
    "too little": (ValueError, "0.01 of 128 bytes a token is too little: the budget is 1, and", {"bytes": 0.01}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    error, words, given = REFUSED[case]
    how = {"prompts": [tokens()], "bytes": 0.45, "window": WINDOW, "dtype": torch.bfloat16, "progress": False} | given
    with pytest.raises(error, match=words):
        calibrate(hf_model(num_hidden_layers=1), **how)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (
            lambda: hf_model("gemma2", attention="eager"),
            NotImplementedError,
            "Gemma2Attention attends with a softcap, which cannot be followed",
        ),
        (
            lambda: hf_model("gpt_oss", attention="eager"),
            NotImplementedError,
            "GptOssAttention attends with sinks, which cannot be followed",
        ),
        (lambda: hf_model("mistral", sliding_window=6), ValueError, "nothing of MistralForCausalLM can be stored"),
    ],
)
def test_models_that_are_refused(model, error, words):
    with pytest.raises(error, match=words):
        budget_of(model())


def test_texts_are_for_the_tokenizer():
    model = hf_model(num_hidden_layers=1)
    by_text = calibrate(
        model, ["text"], tokenizer=lambda text: {"input_ids": tokens().tolist()}, window=WINDOW, progress=False
    )
    assert by_text == calibrate(model, [tokens()[None]], window=WINDOW, progress=False)
