"""The accuracy study: its attention against generation token by token, its codes against what they promise."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from accuracy import teacher_forced
from accuracy.codes import CODES, kept_mask
from models import hf_model
from reference import kept_count, prune, pruned_generation

WINDOW, TOKENS, HEAD_DIM = 8, 40, 32


@pytest.fixture
def model():
    return hf_model(head_dim=HEAD_DIM)


@pytest.fixture
def ids():
    return torch.randint(1, 100, (TOKENS,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _parts(monkeypatch) -> None:
    """Several parts of the queries and of the logits, the last of them shorter."""
    monkeypatch.setattr(teacher_forced, "_QUERIES", 16)
    monkeypatch.setattr(teacher_forced, "_LOGITS", 16)


@torch.no_grad()
def test_nothing_stored_differently_is_dense_attention(model, ids):
    dense = model(ids[None], labels=ids[None], use_cache=False)
    with teacher_forced.storing(model, lambda k: k, lambda v: v, WINDOW):
        hidden = teacher_forced.hidden_states(model, ids)
    torch.testing.assert_close(teacher_forced.log_probabilities(model, hidden), dense.logits[0].log_softmax(-1))
    torch.testing.assert_close(teacher_forced.losses(model, ids, hidden).mean(), dense.loss)


@torch.no_grad()
def test_pruned_text_is_what_the_oracle_generates_token_by_token(model, ids):
    sparsities = 0.25, 0.7
    kept_keys, kept_values = (kept_count(HEAD_DIM, sparsity) for sparsity in sparsities)
    assert kept_keys != kept_values
    with pruned_generation(*sparsities, WINDOW):
        past = DynamicCache(config=model.config)
        expected = torch.cat([model(x.view(1, 1), past_key_values=past).logits[0] for x in ids])
    with teacher_forced.storing(model, lambda k: prune(k, kept_keys), lambda v: prune(v, kept_values), WINDOW):
        hidden = teacher_forced.hidden_states(model, ids)
    actual = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (actual - model(ids[None]).logits[0]).abs().max() > 1e-3  # pruning matters here


@torch.no_grad()
def test_afterwards_the_model_attends_as_before(model, ids):
    dense = model(ids[None]).logits
    with teacher_forced.storing(model, torch.zeros_like, torch.zeros_like, WINDOW):
        assert not torch.equal(model(ids[None], use_cache=False).logits, dense)
    assert torch.equal(model(ids[None]).logits, dense)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("kept", [40, 64])
def test_a_code_keeps_what_is_kept(name, kept):
    """Nothing elsewhere, the right signs, and an error that its bits allow for."""
    x = torch.randn(2, 3, 70, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    keep = kept_mask(x, kept)
    decoded = CODES[name].function(x, keep)
    assert decoded.dtype == x.dtype
    assert not decoded[~keep].any()
    bound = {16: 0, 8: 1 / 16, 4: 1 / 5, 3: 1 / 4, 2: 1 / 2}[CODES[name].bits]
    largest = x.abs().amax(-1, keepdim=True).float()
    error = ((decoded.float() - x.float()).abs() / largest)[keep].max()
    assert error <= bound
    assert (decoded * x >= 0)[x.abs() > bound * largest].all()


@pytest.mark.parametrize("name", [name for name in CODES if any(kind in name for kind in ("log", "uniform", "odd"))])
def test_codes_between_two_magnitudes_store_the_largest_exactly(name):
    x = torch.randn(1, 1, 70, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    decoded = CODES[name].function(x, kept_mask(x, 64))
    assert torch.equal(decoded.abs().amax(-1), x.abs().amax(-1))
