"""A model with shapes and no memory: PyTorch's fake tensors in place of weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from .. import _compat
from ..lowering import builds


@contextmanager
def without_memory() -> Iterator[None]:
    """Within it tensors are fake and nothing is computed."""
    with builds.building_nothing(), _compat.tracing.FakeTensorMode(), torch.no_grad():
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
    return sum({_compat.memory.storage_number(x): x.untyped_storage().nbytes() for x in tensors}.values())


def forward(
    model: Any,
    batch: int,
    tokens: int,
    cache: Any = None,
    *,
    of: Any = None,
    masked: bool = True,
    symbolic: bool = False,
) -> Any:
    """What ``generate`` calls for a prompt, or, given a cache, for a step: logits of the last token alone.

    of: what to call in place of the model, such as a compiled form of it. masked: whether attention is given a mask.
    A prompt without padding has one only where it is compiled: else transformers looks at it and leaves it out.
    symbolic: whether Dynamo makes symbols of batch and tokens.
    """
    given: dict[str, Any] = {"dtype": torch.int64, "device": model.device}
    inputs: dict[str, Any] = {"input_ids": torch.zeros(batch, tokens, **given)}
    if masked:
        seen = tokens if cache is None else tokens + cache.get_seq_length()
        inputs["attention_mask"] = torch.ones(batch, seen, **given)
    for x, dim in product(inputs.values(), (0, 1) if symbolic else ()):
        _compat.dynamo.maybe_mark_dynamic(x, dim)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    if cache is not None:
        inputs["past_key_values"] = cache
    return (model if of is None else of)(**inputs, use_cache=True)
