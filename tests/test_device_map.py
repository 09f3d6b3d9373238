"""Models that accelerate spread over devices: pipelines of layers."""

from __future__ import annotations

import pytest
import torch

from compilers import without_compiler
from models import TupleModel, hf_model, prompt
from mustafar_compile import cache_stats, explain, prepare
from mustafar_compile.device_map import is_spread, move_in_graphs
from reference import pruned_generation

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BLOCKS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
OPTIONS = {"key_sparsity": 0.7, "value_sparsity": 0.7, "window": 4}
STEPS = [("prefill", "decode")]
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def spread(*devices):
    """A model of two layers with the hooks of accelerate: the first on the first device, the second on the second."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = hf_model()
    model.hf_device_map = {name: devices[i > 2] for i, name in enumerate(BLOCKS)}
    for name, device in model.hf_device_map.items():
        model.get_submodule(name).to(device)
    places = {name: torch.device(device) for name, device in {"": devices[0], **model.hf_device_map}.items()}
    hooks.attach_align_device_hook_on_blocks(model, execution_device=places, offload=dict.fromkeys(places, False))
    return model


def generated(model, cache, device="cpu"):
    how = prompt(padded=True) | {"max_new_tokens": 10, "do_sample": False}
    with pruned_generation(0.7, 0.7, 4):
        expected = hf_model().generate(**how)
    how |= {name: x.to(device) for name, x in how.items() if isinstance(x, torch.Tensor)}
    if cache == "static":
        how["cache_implementation"] = "static"
    out = model.generate(**how, return_dict_in_generate=True)
    assert torch.equal(out.sequences.cpu(), expected)
    return out.past_key_values


def test_which_models_are_spread():
    model = hf_model(num_hidden_layers=1)
    assert not is_spread(model)
    for devices, spread_out in ({0, 1}, True), ({0}, False), ({0, 1, "cpu"}, False), ({0, "disk"}, False):
        model.hf_device_map = {f"block {device}": device for device in devices}
        assert is_spread(model) == spread_out


@pytest.mark.nightly
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_moves_are_a_part_of_the_graph(cache):
    model = spread("cpu", "cpu")
    move_in_graphs(model)
    with without_compiler(), explain() as report:
        model.compile(backend="mustafar", fullgraph=True, options=OPTIONS)
        generated(model, cache)
    assert [entry.phases for entry in report.matched] == 2 * STEPS
    assert [entry.name for entry in report.matched] == [f"model.layers.{i}.self_attn" for i in range(2)]


@needs_two_gpus
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_layers_on_two_gpus(cache):
    model = prepare(spread("cuda:0", "cuda:1"), **OPTIONS)
    if cache == "dynamic":
        model.generation_config.cache_implementation = None
        model.compile(backend="mustafar", options=OPTIONS)
    with explain() as report:
        past = generated(model, cache, "cuda:0")
    assert len(report.matched) == 2
    assert [layer.keys.device for layer in past.layers] == [torch.device("cuda", i) for i in range(2)]
    assert cache_stats(past).compressed_tensors == 4
    assert report.launching == ["decode steps run without CUDA graphs: its inputs are on cuda:0 and cuda:1"]


@needs_two_gpus
def test_growing_caches_on_two_gpus_in_one_graph():
    layers = [TupleModel().to(f"cuda:{i}") for i in range(2)]

    def step(x, pasts):
        first, past = layers[0].step(x, pasts[0])
        second, other = layers[1].step(first.to("cuda:1"), pasts[1])
        return second, (past, other)

    compiled = torch.compile(step, backend="mustafar", options={"key_sparsity": 0.0, "value_sparsity": 0.0})
    pasts = eager = (None, None)
    for tokens in (6, *[1] * 80):  # longer than the first room
        x = torch.randn(2, tokens, 32, device="cuda:0")
        (out, pasts), (expected, eager) = compiled(x, pasts), step(x, eager)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    assert [past[0].device.index for past in pasts] == [0, 1]
