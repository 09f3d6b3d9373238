"""Random models, settings and prompts, of lengths that change: tokens equal dense ones, or the oracle at 0.5."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compilers import without_compiler
from composed import ByFunction, Halves, Scaled, quantize
from conftest import SHARDS, sharded
from models import hf_model, prompt
from mustafar_compile import explain
from reference import pruned_generation


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "family": draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "phi3"])),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(st.sampled_from([8, 16, 24])),
        "layers": draw(st.integers(1, 2)),
        "weights": draw(st.sampled_from([None, None, Scaled, ByFunction, Halves])),
        "batch": draw(st.integers(1, 3)),
        "lengths": draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)),
        "padded": draw(st.booleans()),
        "window": draw(st.integers(1, 12)),
        "sparsity": draw(st.sampled_from([0.0, 0.5])),
        "static": draw(st.booleans()),
        "new_tokens": draw(st.integers(2, 8)),
    }


def generated(model, prompts, **how):
    """The tokens of all ``prompts``, one after the other."""
    return torch.cat([model.generate(**inputs, **how).flatten() for inputs in prompts])


@pytest.mark.nightly
@pytest.mark.parametrize("shard", range(SHARDS))
@settings(
    max_examples=sharded(settings().max_examples // 2),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@example(
    case={
        "family": "llama", "kv_heads": 1, "heads": 3, "head_dim": 8, "layers": 1, "weights": None, "batch": 1,
        "lengths": [1], "padded": False, "window": 1, "sparsity": 0.5, "static": True, "new_tokens": 3,
    }
)  # fmt: skip
@given(case=cases())
def test_tokens_equal_the_oracle(shard, case):
    def build():
        model = hf_model(
            case["family"], hidden_size=case["heads"] * case["head_dim"], num_hidden_layers=case["layers"],
            num_attention_heads=case["heads"], num_key_value_heads=case["kv_heads"], head_dim=case["head_dim"],
        )  # fmt: skip
        return quantize(model, case["weights"]) if case["weights"] else model

    prompts = [prompt(case["batch"], length, case["padded"], seed=length) for length in case["lengths"]]
    how = {"max_new_tokens": case["new_tokens"], "do_sample": False}
    sparsity, window = case["sparsity"], case["window"]
    with torch.no_grad():
        with pruned_generation(sparsity, sparsity, window):
            expected = generated(build(), prompts, **how)
        if not sparsity:
            assert torch.equal(expected, generated(build(), prompts, **how))
        model = build()
        with without_compiler(), explain() as report:
            options = {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": window}
            model.compile(backend="mustafar", options=options)
            cache = {"cache_implementation": "static"} if case["static"] else {}
            assert torch.equal(generated(model, prompts, **how, **cache), expected)
    assert len(report.matched) == case["layers"], str(report)
    assert not report.missed, str(report)
