"""The other way to measure: the compiled model, which is given one token after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import mustafar_compile
from mustafar_compile.settings import setting_names

from .budget import CODES
from .case import Case


def options(case: Case) -> dict[str, Any]:
    """A case as options of the backend. Raises ValueError for one that it does not have."""
    settings = case.described()
    if case.budget:
        return settings
    for role in ("key", "value"):
        code = settings.get(f"{role}_code", "none")
        settings[f"{role}_code"] = CODES.get(code, code)
        settings[f"{role}_sparsity"] = settings.get(f"{role}_sparsity", 0.0)
    unknown = settings.keys() - set(setting_names())
    if unknown:
        raise ValueError(f"the backend has no setting {', '.join(sorted(unknown))}: {case} is for one forward only")
    return settings


def token_by_token(model: Any, ids: Tensor, prompt: int, case: Case) -> Tensor:
    """What the compiled model makes of tokens [T], of which ``prompt`` come at once: [T, width].

    Raises RuntimeError where not all layers run over a compressed cache.
    """
    torch._dynamo.reset()
    step = torch.compile(model.base_model, backend="mustafar", options=options(case))
    past = DynamicCache(config=model.config)
    with mustafar_compile.explain() as report:
        parts = [ids[: max(prompt, 1)], *ids[max(prompt, 1) :].split(1)]
        hidden = [step(part[None], past_key_values=past, use_cache=True).last_hidden_state[0] for part in parts]
    if len(report.matched) != model.config.num_hidden_layers:
        raise RuntimeError(f"not all {model.config.num_hidden_layers} layers were compressed:\n{report}")
    return torch.cat(hidden)
