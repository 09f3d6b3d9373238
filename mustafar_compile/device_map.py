"""Models that accelerate spread over several devices, as ``from_pretrained(..., device_map="auto")`` does.

Its hooks stand around each module and Dynamo does not enter them, so each piece between two of them would be a graph of
its own, and Dynamo would give up on their many versions. Here torch's own hooks move what comes into a block of the
map, and those are part of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_spread(model: torch.nn.Module) -> bool:
    """Whether accelerate put the parts of ``model`` on several devices, and moves no weights between calls."""
    devices = set(getattr(model, "hf_device_map", {}).values())
    return len(devices) > 1 and not devices & {"cpu", "disk"}


def move_in_graphs(model: torch.nn.Module) -> None:
    """Let what moves tensors to the device of each block of ``model.hf_device_map`` be in the graph of the model."""
    from accelerate.hooks import remove_hook_from_submodules

    blocks: dict[str, Any] = model.hf_device_map  # type: ignore[assignment]
    remove_hook_from_submodules(model)
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__self__", None) is module:
            del module.forward  # accelerate leaves it there, in the way of what the class has
    for name, device in blocks.items():
        model.get_submodule(name).register_forward_pre_hook(_Move(torch.device(device)), with_kwargs=True)


class _Move:
    """Moves the arguments of a module to ``device``. Caches stay: each layer of one is where its keys come from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return self.moved(args), {name: self.moved(x) for name, x in kwargs.items()}

    def moved(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(self.moved, x))
        return x.to(self.device) if isinstance(x, Tensor) else x
