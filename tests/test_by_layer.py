"""Settings that differ from layer to layer: what is accepted, and which layer gets what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CompileConfig, GenerationConfig

import mustafar_compile
from compilers import without_compiler
from models import TupleModel, hf_model, prompt
from mustafar_compile import Settings, UnknownLayerError, cache_stats, explain
from mustafar_compile.by_number import ByLayer
from mustafar_compile.settings import merged_options, read_options
from nightly import at_night
from reference import kept_count

MAPPING = {0: 0.25, "default": 0.5}


@pytest.mark.parametrize("given", [MAPPING, {"0": 0.25, "default": 0.5}, ByLayer(((0, 0.25),), 0.5)])
def test_a_mapping_has_a_value_for_each_layer(given):
    settings = Settings(key_sparsity=given)
    assert [settings.at("key_sparsity", layer) for layer in (0, 1, 99)] == [0.25, 0.5, 0.5]
    assert settings.at("value_sparsity", 0) == settings.at("value_sparsity") == 0.5
    with pytest.raises(UnknownLayerError, match="key_sparsity differs by layer, and no layer is named"):
        settings.at("key_sparsity")
    assert settings == Settings(key_sparsity=MAPPING)
    assert hash(settings) == hash(Settings(key_sparsity=MAPPING))
    assert settings != Settings(key_sparsity={**MAPPING, 1: 0.25})


@given(st.lists(st.sampled_from(["none", "int8", "int4"]), min_size=1))
def test_a_list_is_a_mapping_without_default(codes):
    settings = Settings(value_code=codes)
    assert [settings.at("value_code", layer) for layer in range(len(codes))] == codes
    assert settings == Settings(value_code=dict(enumerate(codes))) == Settings(value_code=tuple(codes))
    with pytest.raises(UnknownLayerError, match=f'value_code has values .* no "default".* a layer {len(codes)} '):
        settings.at("value_code", len(codes))


@pytest.mark.parametrize(
    "given", [[], {}, {-1: 0.5}, {"first": 0.5}, {1.0: 0.5}, {True: 0.5}, {0: 0.5, "0": 0.5}, {None: 0.5}, [0.5, None]]
)
def test_what_is_no_setting_by_layer(given):
    accepted = 'a list with an entry for each layer, or a mapping of layer numbers from 0 on and "default" to values'
    with pytest.raises(ValueError, match=rf"key_sparsity=.* is not accepted; by layer it must be {accepted}$") as error:
        Settings(key_sparsity=given)
    assert f"={given!r} " in str(error.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"key_sparsity": {3: 1.5, "default": 0.5}}, r"key_sparsity\[3\]=1.5 is not accepted; it must be a number in"),
        ({"value_sparsity": {0: 0.5, "default": "a"}}, r"value_sparsity\['default'\]='a' is not accepted"),
        ({"key_sparsity": [0.5, [[0.5]]]}, r"key_sparsity\[1\]\[0\]=\[0.5\] is not accepted"),
        ({"value_code": ["int8", "int2"]}, r"value_code\[1\]='int2' is not accepted; it must be one of 'none', 'int8'"),
    ],
)
def test_a_value_out_of_range_names_its_layer(setting, words):
    with pytest.raises(ValueError, match=words):
        Settings(**setting)


def test_a_config_of_transformers_takes_what_prepare_makes_of_it():
    """It is written as JSON with sorted keys wherever it is printed."""
    options, _ = merged_options("prepare", None, None, {"key_sparsity": MAPPING, "window": 8})
    assert read_options(None, options) == (Settings(key_sparsity=MAPPING, window=8), {})
    config = GenerationConfig(compile_config=CompileConfig(backend="mustafar", mode=None, options=options))
    assert '"default": 0.5' in repr(config)


WAYS = {
    "compile": lambda model, settings: model.compile(backend="mustafar", options=settings),
    "prepare": lambda model, settings: mustafar_compile.prepare(model, **settings),
    "layers": lambda model, settings: [x.compile(backend="mustafar", options=settings) for x in model.model.layers],
}


@pytest.mark.parametrize("way", ["prepare", *at_night(["compile", "layers"])])
@torch.no_grad()
def test_each_layer_gets_its_own(way):
    model = hf_model(num_hidden_layers=2)
    by_layer = {"key_sparsity": {1: 0.0, "default": 0.7}, "value_code": ["int4", "none"]}
    settings = {"preset": "safe", "value_sparsity": 0.7} | by_layer
    with without_compiler(), explain() as report:
        WAYS[way](model, settings)
        past = model(**prompt()).past_key_values
    head_dim = past.layers[0].keys.shape[-1]
    low, all_kept = kept_count(head_dim, 0.7), head_dim
    kept = [f"{low}/{head_dim} int8", f"{low}/{head_dim} int4", f"{all_kept}/{head_dim} int8", f"{low}/{head_dim}"]
    assert [entry.kept for entry in report.matched] == [tuple(kept[:2]), tuple(kept[2:])]
    stats = cache_stats(past)
    assert stats.kept == tuple(kept)
    assert f"1 x {kept[0]}, 1 x {kept[1]}, " in str(stats)
    assert not report.missed


@torch.no_grad()
def test_a_layer_that_a_list_does_not_have_is_an_error():
    model = hf_model(num_hidden_layers=1)
    with without_compiler():
        model.compile(backend="mustafar", options={"key_sparsity": {1: 0.5}})
        with pytest.raises(Exception, match=r'key_sparsity has values for the layers 1 and no "default", .* a layer 0'):
            model(**prompt())


@torch.no_grad()
def test_a_single_layer_of_unknown_number_refuses_them():
    model = TupleModel()
    with without_compiler():
        step = torch.compile(model.step, backend="mustafar", options={"value_sparsity": MAPPING})
        with pytest.raises(
            Exception, match="value_sparsity by layer is given, but a graph holds a single layer of unkn"
        ):
            step(torch.randn(2, 8, 32), None)


@torch.no_grad()
def test_a_default_alone_needs_no_number():
    """So heads of a single layer may differ, as in a model that is compiled layer by layer."""
    torch.manual_seed(0)
    with without_compiler(), explain() as report:
        step = torch.compile(TupleModel().step, backend="mustafar", options={"value_sparsity": {"default": [0.5, 0]}})
        _, (_, values) = step(torch.randn(2, 40, 32), None)
    assert [part.kept for part in values.format.parts] == [8, 16]
    assert len(report.matched) == 1


class OwnLayers(torch.nn.Module):
    """A model without a configuration."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([TupleModel(), TupleModel()])
        for layer in self.layers:
            layer.forward = layer.step

    def forward(self, x):
        return [layer(x, None) for layer in self.layers]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            {"key_sparsity": {0: 0.5, 7: 0.5, "default": 0.7}},
            "key_sparsity names layer 7, which the model does not have",
        ),
        ({"value_code": ["int8", "int4", "none"]}, "value_code names layer 2, which the model does not have"),
        ({"skip_layers": [1, 2, 3]}, "skip_layers names layer 2, 3, which the model does not have"),
    ],
)
@pytest.mark.parametrize("kind", ["own", "transformers", *at_night(["by layer"])])
@torch.no_grad()
def test_a_layer_that_the_model_does_not_have(setting, words, kind):
    if kind == "own":
        model, inputs = OwnLayers(), {"x": torch.randn(2, 8, 32)}
    else:
        model, inputs = hf_model(num_hidden_layers=2), prompt()
    for part in model.model.layers[:1] if kind == "by layer" else [model]:
        part.compile(backend="mustafar", options=setting)
    with without_compiler(), pytest.raises(Exception, match=f"{words}; accepted are layers from 0 to 1"):
        model(**inputs)


@torch.no_grad()
def test_all_layers_of_the_model_may_be_named():
    model = hf_model(num_hidden_layers=2)
    with without_compiler(), explain() as report:
        for layer in model.model.layers:  # each graph is of one of them
            layer.compile(backend="mustafar", options={"key_sparsity": [0.5, 0.7], "skip_layers": [1]})
        model(**prompt())
    assert [entry.layer for entry in report.matched] == [0]
