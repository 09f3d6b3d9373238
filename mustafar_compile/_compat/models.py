"""Modules, and models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .probe import SUPPORTED, probe

probe("torch.nn", "Module")._compiled_call_impl  # noqa: B018


@contextmanager
def compiled_calls(model: torch.nn.Module, replaced: Callable[[Callable], Callable]) -> Iterator[bool]:
    """Within it, calls of a module that ``model.compile`` compiled go to ``replaced(call)``. False where it did not."""
    call = model._compiled_call_impl
    if call is None:
        yield False
        return
    model._compiled_call_impl = replaced(call)
    try:
        yield True
    finally:
        model._compiled_call_impl = call


def takes_static_cache(model: Any) -> bool:
    """Whether a model of transformers can generate over a static cache."""
    flag = "_can_compile_fullgraph"
    if not hasattr(probe("transformers", "PreTrainedModel"), flag):
        raise ImportError(f"mustafar_compile needs transformers' PreTrainedModel.{flag}; supported: {SUPPORTED}")
    return getattr(model, flag)


def attention_implementation(model: Any) -> str:
    """By what name a model of transformers attends."""
    name = "_attn_implementation"
    if not hasattr(model.config, name):
        raise ImportError(f"mustafar_compile needs a transformers config's {name}; supported: {SUPPORTED}")
    return getattr(model.config, name)


def has_hook_on_arguments(module: Any) -> bool:
    """Whether a forward hook of a module is given the keyword arguments of its forward."""
    return bool(getattr(module, "_forward_hooks_with_kwargs", None))
