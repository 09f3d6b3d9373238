"""Tensor subclasses and dispatch modes, and ops on many tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .probe import probe

TorchDispatchMode: Any = probe("torch.utils._python_dispatch", "TorchDispatchMode")
return_and_correct_aliasing: Callable = probe("torch.utils._python_dispatch", "return_and_correct_aliasing")
holds_tensors: Callable[[Any], bool] = probe("torch.utils._python_dispatch", "is_traceable_wrapper_subclass")
tree_map: Callable = probe("torch.utils._pytree", "tree_map")
tree_leaves: Callable = probe("torch.utils._pytree", "tree_leaves")
foreach_copy: Callable = probe("torch", "_foreach_copy_")


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Of the arguments of a call those that it writes, those in lists one by one. Of what is no op: none."""
    for place, argument in enumerate(getattr(getattr(func, "_schema", None), "arguments", ())):
        if argument.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from given if isinstance(given, list | tuple) else [given]
