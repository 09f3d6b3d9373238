"""A model with shapes and no memory: PyTorch's fake tensors in place of weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import _compat
from ..lowering import native


@contextmanager
def without_memory() -> Iterator[None]:
    """Within it tensors are fake and nothing is computed."""
    with native.building_nothing(), _compat.FakeTensorMode(), torch.no_grad():
        yield


def fake_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model of transformers, in eval mode. For use within ``without_memory``.

    Raises ValueError for a config of another kind of model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; what is shared counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {id(x): x.untyped_storage() for x in tensors}
    return sum({s._cdata: s.nbytes() for s in storages.values()}.values())


def forward(model: Any, batch: int, tokens: int, cache: Any = None, of: Any = None) -> Any:
    """What ``generate`` calls for a prompt, or, given a cache, for a step: logits of the last token alone.

    of: what to call in place of the model, such as a compiled form of it.
    """
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device=model.device)
    accepted = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    past = {} if cache is None else {"past_key_values": cache}
    seen = tokens + (0 if cache is None else cache.get_seq_length())
    mask = torch.ones(batch, seen, dtype=torch.int64, device=model.device)
    return (model if of is None else of)(input_ids=ids, attention_mask=mask, use_cache=True, **last, **past)
