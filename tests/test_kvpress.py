"""Presses of kvpress before this compression, and this compression as a press: against eager eviction and pruning."""

from __future__ import annotations

import pytest
import torch

from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import CompressedKV, explain
from reference import pruned_cache, pruned_generation

kvpress = pytest.importorskip("kvpress", reason="needs kvpress: see the extra `integrations` and `make nightly`")

from mustafar_compile.integrations.kvpress import MustafarPress, pressing  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_grad")
WINDOW, PROMPT, NEW_TOKENS = 4, 40, 8
PRESSES = {
    "snap": lambda: kvpress.SnapKVPress(0.5, window_size=8),
    "streaming": lambda: kvpress.StreamingLLMPress(0.5),
    "knorm": lambda: kvpress.KnormPress(0.6),
    "composed": lambda: kvpress.ComposedPress([kvpress.KnormPress(0.3), kvpress.ThinKPress(0.5, window_size=8)]),
    "rerotated": lambda: kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(0.5)),
}


def options(sparsity: float) -> dict:
    return {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW}


def generate(model, press, length: int = PROMPT, **how):
    with pressing(model, press):
        return model.generate(
            **prompt(batch=1, length=length),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            **how,
        )


def expected(press, sparsity: float, length: int = PROMPT):
    with pruned_generation(sparsity, sparsity, WINDOW):
        return generate(hf_model(num_hidden_layers=2), press, length)


@pytest.mark.nightly
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("name", PRESSES)
def test_a_press_before_ours(name, sparsity):
    press, model = PRESSES[name](), hf_model(num_hidden_layers=2)
    with without_compiler():
        model.compile(backend="mustafar", options=options(sparsity))
        for length in (PROMPT, PROMPT + 2):
            wanted = expected(press, sparsity, length)
            with explain() as report:
                result = generate(model, press, length)
            assert torch.equal(result.sequences, wanted.sequences)
            assert len(report.matched) == 2 or not report.graphs
            assert not report.missed
            assert not report.notices
            for layer, dense in zip(result.past_key_values.layers, wanted.past_key_values.layers, strict=True):
                assert isinstance(layer.keys, CompressedKV)
                assert layer.keys.shape == dense.keys.shape
                assert layer.keys.shape[2] < length + NEW_TOKENS - 1


@pytest.mark.nightly
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("name", ["snap", "streaming", "knorm"])
def test_a_static_cache_after_an_eager_prompt(name, sparsity):
    """As a ``CompileConfig`` has it on a GPU."""
    from transformers import CompileConfig

    press, model = PRESSES[name](), hf_model(num_hidden_layers=2)
    config = CompileConfig(backend="mustafar", options=options(sparsity), mode=None)
    config._compile_all_devices = True
    with without_compiler():
        for length in (PROMPT, PROMPT + 2):
            wanted = expected(press, sparsity, length)
            with explain() as report:
                result = generate(model, press, length, cache_implementation="static", compile_config=config)
            assert torch.equal(result.sequences, wanted.sequences)
            assert report.calls
            assert not report.missed
            left = wanted.past_key_values.layers[0].keys.shape[2]
            assert [int(layer.get_seq_length()) for layer in result.past_key_values.layers] == [left, left]


def test_presses_that_mask_are_refused():
    with pytest.raises(ValueError, match="masks tokens"):
        generate(hf_model(num_hidden_layers=1), kvpress.AdaKVPress(kvpress.KnormPress(0.5)))


def test_presses_that_act_elsewhere_are_refused():
    model = hf_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="DecodingPress is not accepted"):
        generate(model, kvpress.DecodingPress(kvpress.KnormPress(0.5)))
    assert not model.model.layers[0].self_attn._forward_hooks


def test_a_padded_prompt_is_refused():
    model = hf_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="padded prompt"), pressing(model, kvpress.KnormPress(0.5)):
        model.generate(**prompt(padded=True, length=PROMPT), max_new_tokens=2)


def test_presses_that_leave_layers_different_numbers_of_tokens_are_refused():
    with pytest.raises(ValueError, match="different numbers of tokens"):
        generate(hf_model(num_hidden_layers=2), kvpress.PyramidKVPress(0.5, window_size=8))


@pytest.mark.parametrize("codes", [("none", "none"), ("int8", "int4")])
def test_our_press_leaves_what_the_oracle_keeps(codes):
    model, sparsities = hf_model(num_hidden_layers=1), (0.5, 0.7)
    inputs = prompt(length=PROMPT)
    dense = model(**inputs).past_key_values.layers[0]
    press = MustafarPress(*sparsities, *codes, window=WINDOW)
    with pressing(model, press):
        pressed = model(**inputs).past_key_values.layers[0]
    assert torch.equal(pressed.keys, pruned_cache(dense.keys, sparsities[0], WINDOW, codes[0]))
    assert torch.equal(pressed.values, pruned_cache(dense.values, sparsities[1], WINDOW, codes[1]))
    assert press.compression_ratio == pytest.approx(0.6)


def test_our_press_checks_its_fields():
    with pytest.raises(ValueError, match="key_sparsity=1 is not accepted"):
        MustafarPress(key_sparsity=1)
    with pytest.raises(ValueError, match="given key_sparsity by layer; accepted is one value"):
        MustafarPress(key_sparsity={"default": 0.5})
    with pytest.raises(AttributeError, match="cannot be set"):
        MustafarPress().compression_ratio = 0.5
