"""Layers that are alike need to be traced once: the others pass through what they get.

That is sound where nothing can tell such layers apart but their number. So layers are alike only if all that makes
them up is equal: classes, attributes, shapes and dtypes, what the config says of each by its place, and what the
settings do with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

log = logging.getLogger("mustafar_compile")

_NUMBERS = ("layer_idx", "layer_id")  # by which layers of transformers know their caches
_OF_MODULES = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Alike:
    """The layer at ``path`` stands for ``number``, which is alike. path: as in ``model.layers.0``."""

    path: str
    number: int

    @property
    def own_path(self) -> str:
        """The path of the layer that is stood for."""
        return f"{self.path.rpartition('.')[0]}.{self.number}"


class _PassingThrough(nn.Module):
    """In place of a layer, with its attributes. attend: what became of the first input where the layer itself ran."""

    def __init__(self, layer: nn.Module, rest: tuple[Any, ...] | None) -> None:
        super().__init__()
        own = {name: value for name, value in vars(layer).items() if name not in _OF_MODULES}
        self.__dict__.update(own)
        self.rest = rest

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if self.rest is None else (hidden_states, *self.rest)


def leave_out_alike(
    model: nn.Module, run: Callable[[], Any], settings_of: Callable[[int], Any], kept: int = 1
) -> list[Alike]:
    """Keep the first ``kept`` of each kind of layer in ``model`` and let the others pass through. Returns those.

    run: calls the model once; which layers may be passed through is seen from that, and none may where it fails.
    settings_of: what is set for a layer, by its number.
    """
    layers = list(_stacked_layers(model))
    try:
        results = _results([layer for _, _, layer in layers], run)
    except Exception as error:  # an op that fake tensors cannot do by themselves; traced with others it may go
        log.info("each layer is traced by itself: %s", error)
        return []
    left_out: list[Alike] = []
    seen: dict[str, Any] = {}  # kinds of the layers that are kept, by their paths
    for path, number, layer in layers:
        if layer not in results:
            continue
        stack, rest = path.rpartition(".")[0], results[layer]
        kind = (stack, settings_of(number), _of_place(model, number), _signature(layer, number))
        known = [p for p, k in seen.items() if k == kind]
        if len(known) < kept:
            seen[path] = kind
        else:
            model.get_submodule(stack)[number] = _PassingThrough(layer, rest)  # type: ignore[operator]
            left_out.append(Alike(known[0], number))
    return left_out


def _stacked_layers(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """(path, number, layer) of each module in a list of modules that is in no other one."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for path, layers in lists.items():
        if not any(path.startswith(f"{outer}.") for outer in lists):
            yield from ((f"{path}.{i}", i, layer) for i, layer in enumerate(layers))


def _results(layers: list[nn.Module], run: Callable[[], Any]) -> dict[nn.Module, tuple[Any, ...] | None]:
    """Of each layer that gives back a tensor like its first: what it returns beside it, None for the tensor alone."""
    results: dict[nn.Module, tuple[Any, ...] | None] = {}

    def note(layer: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        first, *rest = result if isinstance(result, tuple) else (result,)
        fits = given and isinstance(first, torch.Tensor) and first.shape == given[0].shape
        if fits and not any(isinstance(x, torch.Tensor) for x in rest):
            results[layer] = tuple(rest) if isinstance(result, tuple) else None

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return results


def _of_place(model: Any, number: int) -> list[Any]:
    """What the config says of the layer in lists with an entry for each."""
    config = model.config.get_text_config()
    lists = [value for value in config.to_dict().values() if isinstance(value, list)]
    return [value[number] for value in lists if len(value) == config.num_hidden_layers]


def _signature(module: nn.Module, number: int) -> tuple[Any, ...]:
    """All that makes up a module, but its number."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
    own = {name: value for name, value in own.items() if not (name in _NUMBERS and value == number)}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    shapes = [(name, x.shape, x.dtype) for name, x in tensors]
    children = [(name, _signature(child, number)) for name, child in module.named_children()]
    return type(module), own, shapes, children
