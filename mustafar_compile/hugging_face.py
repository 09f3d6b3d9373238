"""``prepare``: a Hugging Face model on its best path, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from . import _compat
from .device_map import is_spread, move_in_graphs
from .settings import merged_options

Model = TypeVar("Model", bound=torch.nn.Module)

_MASKS = "create_masks_for_generate"  # a method that models of transformers may have for ``generate``
_ATTENTION = frozenset(("full_attention", "sliding_attention"))  # layers that take padding as a mask of slots


def prepare(
    model: Model, *, mode: str | None = None, options: Mapping[str, Any] | None = None, **settings: Any
) -> Model:
    """Let ``model.generate()`` run over a compressed cache, the fastest way that there is, and return ``model``.

    It is ``model.compile(backend="mustafar")``: prompts and decode steps are compiled. On a GPU ``generate`` then takes
    a static cache by default, if the model can, and leaves masks to the graphs.

    Where accelerate spread the model over several GPUs, tensors move between them within the compiled graphs.

    Of a PEFT model the model inside is prepared, which is what its ``generate()`` calls.

    settings: fields of ``Settings``. mode, options: those of torch.compile. Raises TypeError for what is no model of
    transformers that generates, ValueError for an unknown setting or a value out of range.
    """
    from transformers import GenerationMixin

    generating: torch.nn.Module = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(generating, GenerationMixin):
        raise TypeError(
            f"mustafar: prepare takes a model of transformers that generates; given is {type(model).__name__}. For "
            "others use torch.compile(model, backend='mustafar') or mustafar_compile.compile_loop"
        )
    options, _ = merged_options("prepare", mode, options, settings)
    if is_spread(generating):
        move_in_graphs(generating)
    if generating.device.type == "cuda" and _compat.models.takes_static_cache(generating):
        options.setdefault("release_dense", True)
        generate_over_static_caches(generating)
    generating.compile(backend="mustafar", options=options)
    return model


def generate_over_static_caches(model: Any) -> None:
    """Let ``model.generate()`` have a static cache, whose masks are made in the compiled graphs.

    Else transformers makes them ahead of each prompt and step, op by op, and the graph does not show what they say.
    """
    config = model.generation_config
    config.cache_implementation, config.disable_compile = "static", True  # by transformers: the model is compiled
    if not hasattr(model, _MASKS):  # as those have that attend to images in both directions
        setattr(model, _MASKS, _padding)


def _padding(**given: Any) -> Any:
    """In place of ``create_masks_for_generate`` of transformers: what a model needs to know to make its masks itself.

    Of what is given: attention_mask, [B, tokens up to the last] or None; inputs_embeds, [B, L, ...]; the cache, which
    counts its tokens on the device. None where nothing is padded, else a mask [B, S] of all slots, so that its shape
    is that of every step. The loop of ``generate`` waits for each step anyway, so that waiting here costs little.
    """
    from transformers.masking_utils import create_masks_for_generate

    mask, cache = given["attention_mask"], given["cache"] if "cache" in given else given["past_key_values"]
    if mask is None:
        return None
    known = cache.get_seq_length() + given["inputs_embeds"].shape[1] <= mask.shape[1]
    if bool(mask.all() & known):
        return None
    if not _ATTENTION.issuperset(getattr(given["config"].get_text_config(), "layer_types", None) or ()):
        return create_masks_for_generate(**given)
    return F.pad(mask.bool(), (0, max(cache.get_max_length() - mask.shape[1], 0)))
