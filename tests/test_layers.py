"""Which layer an attention belongs to."""

from __future__ import annotations

import pytest
import torch

from compilers import without_compiler
from models import TupleModel, hf_model, prompt
from mustafar_compile import CompressedKV, explain
from mustafar_compile.patterns.graph.layers import clean_path, layer_numbers
from nightly import at_night


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].model.layers.3.self_attn", "model.layers.3.self_attn"),
        ("L['self']._modules['model']._modules['layers']._modules['3']", "model.layers.3"),
        ("L['self']._orig_mod.model.layers[3]", "model.layers.3"),
        ("L['args'][0].model.layers.3.self_attn", "model.layers.3.self_attn"),
        ("L['model'].transformer.h.0.attn", "model.transformer.h.0.attn"),
        ("G['model'].h.0", "model.h.0"),
        ("L['self']", ""),
    ],
)
def test_paths_are_those_of_the_model(path, name):
    assert clean_path(path) == name


NUMBERED = {
    "llama": ([f"model.layers.{i}.self_attn" for i in range(12)], list(range(12))),
    "one layer": (["model.layers.0.self_attn"], [0]),
    "a later one alone": (["decoder.block.3.layer.0.SelfAttention"], [3]),
    "T5": ([f"decoder.block.{i}.layer.0.SelfAttention" for i in range(4)], [0, 1, 2, 3]),
    "T5 with cross-attention": (
        [f"decoder.block.{i // 2}.layer.{i % 2}.attn" for i in range(8)], [0, 0, 1, 1, 2, 2, 3, 3]
    ),
    "wrapped": ([f"args.0.model.layers.{i}.self_attn" for i in range(3)], [0, 1, 2]),
    "inside another list": ([f"towers.1.model.language_model.layers.{i}" for i in range(3)], [0, 1, 2]),
    "two stacks": (
        [f"{stack}.layers.{i}.attn" for stack in ("encoder", "decoder") for i in range(2)], [0, 1, 0, 1]
    ),
    "two models in a list": ([f"models.{m}.layers.{i}" for m in range(2) for i in range(3)], [0, 1, 2, 0, 1, 2]),
    "experts": ([f"layers.{i}.experts.{e}.attn" for i in range(3) for e in range(2)], [0, 0, 1, 1, 2, 2]),
    "no numbers": (["attn", ""], [None, None]),
    "some": (["model.layers.0.attn", "model.layers.1.attn", "head.attn"], [0, 1, None]),
}  # fmt: skip


@pytest.mark.parametrize(("paths", "numbers"), NUMBERED.values(), ids=NUMBERED)
def test_the_number_is_what_tells_layers_apart(paths, numbers):
    assert layer_numbers(paths) == numbers


def compressed_layers(model):
    with torch.no_grad():
        out = model.generate(**prompt(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    return [isinstance(layer.keys, CompressedKV) for layer in out.past_key_values.layers]


COMPILED = {
    "module": lambda model, **how: model.compile(**how),
    "forward": lambda model, **how: setattr(model, "forward", torch.compile(model.forward, **how)),
    "backbone": lambda model, **how: model.model.compile(**how),
    "each layer": lambda model, **how: [layer.compile(**how) for layer in model.model.layers],
    "each attention": lambda model, **how: [layer.self_attn.compile(**how) for layer in model.model.layers],
}


@pytest.mark.parametrize("how", ["each attention", *at_night(["module", "forward", "backbone", "each layer"])])
def test_skipped_layers_are_those_that_are_listed(how):
    model = hf_model(num_hidden_layers=3)
    with without_compiler(), explain() as report:
        COMPILED[how](model, backend="mustafar", options={"skip_layers": [1]})
        assert compressed_layers(model) == [True, False, True]
    assert [entry.layer for entry in report.matched] == [0, 2]
    assert [entry.layer for entry in report.missed] == [1]


def test_the_recompile_limit_counts_for_each_layer():
    """All of them run one function: a prompt and a step of two layers are four versions of it."""
    model = hf_model()
    with without_compiler(), torch._dynamo.config.patch(recompile_limit=2), explain() as report:
        COMPILED["each layer"](model, backend="mustafar")
        assert compressed_layers(model) == [True, True]
        assert report.graphs == 4
        assert compressed_layers(model) == [True, True]
    assert [(entry.layer, entry.phases) for entry in report.matched] == [(i, ("prefill", "decode")) for i in range(2)]
    assert (report.graphs, report.missed, report.notices) == (4, [], [])


def test_a_single_layer_of_unknown_number_refuses_skip_layers():
    """Which layer of a model it is cannot be known, so nothing is skipped or compressed by guess."""
    model = TupleModel()
    with torch.no_grad(), without_compiler():
        step = torch.compile(model.step, backend="mustafar", options={"skip_layers": [0]})
        with pytest.raises(Exception, match=r"skip_layers=\[0\] is given, but a graph holds a single layer"):
            step(torch.randn(2, 8, 32), None)
        _, past = torch.compile(model.step, backend="mustafar")(torch.randn(2, 8, 32), None)
    assert isinstance(past[0], CompressedKV)


@pytest.mark.nightly
def test_one_layer_under_two_paths_is_one_row():
    model = hf_model(num_hidden_layers=1)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar")
        compressed_layers(model)
        torch._dynamo.reset()
        model.model.compile(backend="mustafar")
        model._compiled_call_impl = None
        compressed_layers(model)
    assert [entry.layer for entry in report.matched] == [0]
