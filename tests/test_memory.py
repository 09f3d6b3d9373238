"""Dense memory is really gone: what lives after generation is what cache_stats says."""

from __future__ import annotations

import gc

import pytest
import torch

from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import cache_stats
from nightly import at_night


def live_bytes() -> int:
    """Bytes of all storages that plain tensors hold, each counted once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("how", [{}, *at_night([{"cache_implementation": "static"}])], ids=["dynamic", "static"])
def test_only_the_compressed_cache_stays(how):
    model, inputs = hf_model(max_position_embeddings=2048), prompt(length=900)
    with torch.no_grad(), without_compiler():
        model.compile(backend="mustafar", options={"key_sparsity": 0.7, "value_sparsity": 0.7})
        call = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
        model.generate(**inputs, **call, **how)
        before = live_bytes()
        cache = model.generate(**inputs, **call, **how).past_key_values
        added = live_bytes() - before
    stats = cache_stats(cache)
    assert stats.compressed_tensors == 4
    assert stats.ratio < 0.75
    assert added <= stats.stored_bytes + 20_000, "something dense is still alive"
    assert stats.dense_bytes - stats.stored_bytes > 20_000, "the case is too small to tell"
