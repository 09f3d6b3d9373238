"""Inputs that are tensors made of others, such as quantized weights: their parts are inputs of the rewritten graph."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from compilers import without_compiler, without_inductor
from composed import ByFunction, Halves, Scaled, Shifted, quantize
from models import BufferModel, SliceModel, TupleModel, hf_model, prompt, run_steps
from mustafar_compile import explain
from mustafar_compile.calling.recordable import Places
from nightly import mostly_at_night
from reference import pruned_generation
from stand_in_graphs import record_on_a_cpu
from test_own_loops import assert_close, embeddings, options, oracle

pytestmark = pytest.mark.usefixtures("new_notices", "seeded", "no_grad")
CASES = [(ByFunction, BufferModel), (Halves, TupleModel), (Scaled, SliceModel)]


@pytest.mark.parametrize(("kind", "form"), mostly_at_night(CASES, 2))
def test_outputs_equal_the_oracle(kind, form):
    model, inputs = quantize(form(), kind), embeddings(steps=6)
    with without_compiler(), explain() as report, warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = run_steps(model, inputs, torch.compile(model.step, backend="mustafar", options=options(0.5)))
    assert_close(outputs, oracle(model, inputs, 0.5))
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")]


def test_weights_that_differ_in_what_is_not_a_tensor_do_not_share_a_graph():
    model, (x, *_) = TupleModel(), embeddings(steps=0)
    with without_compiler(), explain() as report:
        step = torch.compile(model.step, backend="mustafar", options=options(0.5))
        for bias in (0.0, 0.5, 0.0):
            model.o.weight = torch.nn.Parameter(Shifted.of(torch.randn(32, 64), bias), requires_grad=False)
            assert_close(step(x, None)[:1], model.step(x, None)[:1])
    assert report.graphs == 2


class Counting(TupleModel):
    """It writes into a weight at each step."""

    def step(self, x, past):
        self.o.weight.mul_(2)
        return super().step(x, past)


def test_a_part_that_the_graph_writes():
    inputs = embeddings(steps=3)
    mine = quantize(Counting(), Scaled)
    other = copy.deepcopy(mine)
    with without_compiler(), explain() as report:
        outputs = run_steps(mine, inputs, torch.compile(mine.step, backend="mustafar", options=options(0.0)))
    assert_close(outputs, run_steps(other, inputs))
    assert torch.equal(mine.o.weight.scales, other.o.weight.scales)
    assert report.matched


class Reading(TupleModel):
    """It takes a part of a weight beside the weight."""

    def step(self, x, past):
        out, past = super().step(x, past)
        return out * self.o.weight.scales.mean(), past


def test_a_part_that_the_graph_takes_by_itself_too():
    model, (x, *_) = quantize(Reading(), Scaled), embeddings(steps=0)
    with without_inductor(), explain() as report:
        out, _ = torch.compile(model.step, backend="mustafar", options=options(0.0))(x, None)
    assert_close([out], [model.step(x, None)[0]])
    assert report.matched


def refused(model, inputs, step=None):
    """The reason why a model is not compressed; its outputs are right and one warning says so."""
    expected = run_steps(model, inputs, step)
    with without_compiler(), explain() as report, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = torch.compile(step or model.step, backend="mustafar", options=options(0.5))
        assert_close(run_steps(model, inputs, step), expected)
    (entry,) = report.missed
    assert [str(w.message) for w in caught] == [f"mustafar: a graph runs as it is: {entry.reason}"]
    return entry.reason


def test_a_result_that_is_made_of_others():
    model, weight = TupleModel(), Scaled.of(torch.randn(64, 32))

    def step(x, past):
        out, past = model.step(x, past)
        y = weight.t()
        torch._dynamo.graph_break()
        return out @ y, past

    reason = refused(model, embeddings(steps=0), step)
    assert "a result is a Scaled, a tensor that is made of other tensors" in reason


class Whole(Scaled):
    """Any op works on its values."""

    @classmethod
    def rule(cls, func, args, kwargs):
        return cls.on_values(func, args, kwargs)


def test_attention_that_takes_a_tensor_made_of_others():
    """It would become one of its kernels before anybody could see it."""
    model, mask = TupleModel(), Whole.of(torch.randn(7, 7))

    def step(x, past):
        q, k, v = (t.transpose(1, 2) for t in model.project(x))
        return model.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)), (k, v)

    assert "attention takes a Whole" in refused(model, embeddings(steps=0), step)


def test_rules_under_autocast():
    """They compute as they are told to, and a graph would apply autocast to that."""
    model = quantize(TupleModel(), Scaled)

    def step(x, past):
        with torch.autocast("cpu"):
            return model.step(x, past)

    reason = refused(model, embeddings(steps=0), step)
    assert reason.endswith("convert the model to the dtype instead")


def test_a_recording_is_bound_to_parts_of_weights(monkeypatch):
    """There are many, and as small as scales are; what a call brings is copied."""
    record_on_a_cpu(monkeypatch)
    made, places_of = [], Places.of
    monkeypatch.setattr(Places, "of", lambda *given: made.append(places_of(*given)) or made[-1])
    model, inputs = quantize(BufferModel(), Scaled), embeddings(steps=4)
    with without_compiler():
        outputs = run_steps(model, inputs, torch.compile(model.step, backend="mustafar", options=options(0.0)))
    assert_close(outputs, oracle(model, inputs, 0.0))
    (places,) = made
    assert len(places.copied) == 5, "embeddings, positions, a mask and two small caches"


TORCHAO = ["Int8WeightOnly", "Int8DynamicActivationInt8Weight", "Float8WeightOnly", "IntxWeightOnly"]


@pytest.mark.nightly
@pytest.mark.parametrize("config", TORCHAO)
def test_torchao(config):
    quantization = pytest.importorskip("torchao.quantization")

    def build():
        model = hf_model(num_hidden_layers=1)
        quantization.quantize_(model, getattr(quantization, f"{config}Config")())
        return model

    how = prompt(padded=True) | {"max_new_tokens": 5, "do_sample": False}
    with pruned_generation(0.5, 0.5, 4):
        expected = build().generate(**how)
    with without_compiler(), explain() as report:
        model = build()
        model.compile(backend="mustafar", options=options(0.5))
        assert torch.equal(model.generate(**how), expected)
    assert [entry.phases for entry in report.matched] == [("prefill", "decode")]


@pytest.mark.nightly
def test_tensor_parallelism():
    """Weights are DTensors; what goes between the layers is plain."""
    parallel = pytest.importorskip("torch.distributed.tensor.parallel")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model, inputs = TupleModel(), embeddings(steps=6)
        expected = oracle(model, inputs, 0.5)
        styles = {name: parallel.ColwiseParallel() for name in "qkv"} | {"o": parallel.RowwiseParallel()}
        parallel.parallelize_module(model, mesh, styles)
        with without_compiler(), explain() as report:
            outputs = run_steps(model, inputs, torch.compile(model.step, backend="mustafar", options=options(0.5)))
        assert_close(outputs, expected)
        assert [entry.phases for entry in report.matched] == [("prefill", "decode")]
    finally:
        torch.distributed.destroy_process_group()
