"""Eviction after a prompt as kvpress does it: a forward hook on each layer's attention drops tokens of its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class SmallestKeys:
    """Each KV head keeps those of its own tokens whose keys have the smallest norms, in order.

    keep: how many of a prompt. breaks: whether Dynamo cannot trace the hook, as that of a press which reads a value.
    """

    keep: int
    breaks: bool = False

    @contextmanager
    def __call__(self, model) -> Iterator[None]:
        hooks = [m.self_attn.register_forward_hook(self.hook, with_kwargs=True) for m in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def hook(self, module, args, kwargs, output):
        if self.breaks:
            torch._dynamo.graph_break()
        if kwargs["hidden_states"].shape[1] > 1:
            cache = kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]
            layer = cache.layers[module.layer_idx]
            kept = layer.keys.norm(dim=-1).topk(self.keep, largest=False).indices.sort().values.unsqueeze(-1)
            layer.keys, layer.values = (
                x.gather(2, kept.expand(-1, -1, -1, x.shape[3])) for x in (layer.keys, layer.values)
            )
        return output
