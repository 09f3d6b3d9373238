"""``prepare``: a Hugging Face model on its best path, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from . import _compat
from .device_map import is_spread, move_in_graphs
from .lowering.strategies import STRATEGIES
from .settings import merged_options

Model = TypeVar("Model", bound=torch.nn.Module)


def prepare(
    model: Model, *, mode: str | None = None, options: Mapping[str, Any] | None = None, **settings: Any
) -> Model:
    """Let ``model.generate()`` run over a compressed cache, the fastest way that there is, and return ``model``.

    On a GPU: prompts as they are, into a static cache; decode steps compiled, as CUDA graphs; the dense cache is freed
    after the prompt. It sets ``cache_implementation`` and ``compile_config`` of ``model.generation_config``, which
    arguments of ``generate`` override. Elsewhere, and for a model that takes no static cache: ``model.compile``, with
    the cache that the model has by default. So it is with strategies that look at queries, for which prompts are
    compiled, too.

    Where accelerate spread the model over several GPUs, tensors move between them within the compiled graphs.

    Of a PEFT model the model inside is prepared, which is what its ``generate()`` calls.

    settings: fields of ``Settings``. mode, options: those of torch.compile. Raises TypeError for what is no model of
    transformers that generates, ValueError for an unknown setting or a value out of range.
    """
    from transformers import CompileConfig, GenerationMixin

    generating: torch.nn.Module = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(generating, GenerationMixin):
        raise TypeError(
            f"mustafar: prepare takes a model of transformers that generates; given is {type(model).__name__}. For "
            "others use torch.compile(model, backend='mustafar') or mustafar_compile.compile_loop"
        )
    options, chosen = merged_options("prepare", mode, options, settings)
    if is_spread(generating):
        move_in_graphs(generating)
    by_queries = any(STRATEGIES[name].wants_queries for name in chosen.strategies("key"))
    by_queries = by_queries or any(STRATEGIES[name].wants_attention for name in chosen.strategies("value"))
    if generating.device.type == "cuda" and _compat.takes_static_cache(generating) and not by_queries:
        options.setdefault("release_dense", True)
        generating.generation_config.cache_implementation = "static"
        compiled: Any = CompileConfig(backend="mustafar", mode=None, options=options)  # type: ignore[arg-type]
        generating.generation_config.compile_config = compiled
    else:
        generating.compile(backend="mustafar", options=options)
    return model
