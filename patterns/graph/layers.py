"""Which layer of the model a node belongs to: its module path, and the number that tells the layers apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from mustafar_compile import _compat

_SCOPES = {"L": 1, "G": 1, "self": 1, "_orig_mod": 1, "fn": 1, "args": 2, "kwargs": 2}
"""What paths begin with that is not of the model, and how many parts belong to it."""

OWN_NUMBER = "layer_idx"  # what transformers calls it

_WINDOWS = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
"""What types of layers that keep only the latest tokens have in their names, and where their window stands. Both as in
configurations of transformers."""


def module_path(node: Node) -> str:
    """The path of the module that a node comes from, as the model would name it; "" where unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    return clean_path(next(reversed(stack.values()))[0]) if stack else ""


def clean_path(path: str) -> str:
    """``L['args'][0]._modules['model'].layers[3]`` -> ``model.layers.3``: without what Dynamo puts around it.

    A wrapper of ``forward`` (transformers has some) hands the model on as the first of its arguments.
    """
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    parts = [part for part in path.split(".") if part.isidentifier() or part.isdigit()]
    while parts and parts[0] in _SCOPES:
        parts = parts[_SCOPES[parts[0]] :]
    return ".".join(part for part in parts if part not in ("_modules", "_orig_mod"))


def layer_numbers(paths: Sequence[str]) -> list[int | None]:
    """The number of the layer that each path of a graph leads to, None where it has no number.

    A path may have several: ``decoder.block.3.layer.0`` or ``layers.2.experts.1``. Layers are what there is most of,
    so it is the number that takes the most values over all the paths; of equals the outermost. Two stacks of layers
    have the same numbers.
    """
    values: dict[tuple[str, ...], set[str]] = defaultdict(set)
    split = [path.split(".") for path in paths]
    for parts in split:
        for i, part in enumerate(parts):
            if part.isdigit():
                values[_place(parts, i)].add(part)
    numbers: list[int | None] = []
    for parts in split:
        at = [i for i, part in enumerate(parts) if part.isdigit()]
        numbers.append(int(parts[max(at, key=lambda i: len(values[_place(parts, i)]))]) if at else None)
    return numbers


def _place(parts: Sequence[str], i: int) -> tuple[str, ...]:
    """What stands before a number, whatever the numbers before it are."""
    return tuple("*" if part.isdigit() else part for part in parts[:i])


def numbered_modules(nodes: Sequence[Node]) -> list[Any]:
    """The module around each node that says which layer it is, where the graph is for that number alone; else None.

    So it is with caches that look the number up, also where each layer is compiled by itself.
    """
    guarded = {clean_path(path): module for path, module in _compat.dynamo.guarded_owners(OWN_NUMBER).items()}
    known = {path: module for path, module in guarded.items() if isinstance(getattr(module, OWN_NUMBER, None), int)}
    return [next((known[path] for path in _paths_around(node) if path in known), None) for node in nodes]


def own_number(module: Any) -> int | None:
    """The number that one of the modules above says; None for None."""
    return getattr(module, OWN_NUMBER, None)


def layers_of_model(module: Any, node: Node) -> int | None:
    """How many layers there are in the model that a node is of, None where that is unknown.

    Of layers that have a number of their own the configuration says it, as transformers has it; of those that are
    numbered by their paths the outermost list of modules. module: one of ``numbered_modules``.
    """
    if module is not None:
        config = getattr(module, "config", None)
        return None if getattr(config, "is_encoder_decoder", False) else getattr(config, "num_hidden_layers", None)
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    lists = (_compat.dynamo.object_at(path.rpartition(".")[0]) for path in paths if path.rpartition(".")[2].isdigit())
    return next((len(modules) for modules in lists if isinstance(modules, torch.nn.ModuleList)), None)


def stated_window(module: Any) -> int | None:
    """The sliding window of the layer of one of the modules above, by the configuration that it holds; None without.

    Where ``layer_types`` does not tell layers apart all of them are alike. transformers makes caches by the same.
    """
    config, number = getattr(module, "config", None), own_number(module)
    if config is None or number is None:
        return None
    types, layers = getattr(config, "layer_types", None) or (), getattr(config, "per_layer_config", ())
    kind = types[number] if number < len(types) else None
    config = layers[number] if number < len(layers) else config
    stated = (getattr(config, name, None) for word, name in _WINDOWS.items() if kind is None or word in kind)
    return next((window for window in stated if window is not None), None)


def _paths_around(node: Node) -> Iterator[str]:
    """Those of the modules that a node is in, innermost first; that of the compiled one is no call in the graph."""
    stack = node.meta.get("nn_module_stack") or {}
    yield from (clean_path(path) for path, _ in reversed(stack.values()))
    yield ""
