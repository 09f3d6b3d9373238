"""What a setting costs a real model, by the teacher-forced reading of the accuracy study."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from timing import DEVICE
from torch import Tensor
from transformers import DynamicCache

import accuracy.case
from accuracy.budget import CODES
from accuracy.intervals import half_width
from accuracy.models import subject
from accuracy.readings import Text, Way, in_one_forward
from mustafar_compile.settings import read_options

from .case import Case

_LIKE_QUANTO = {"key_code": "int4 asymmetric, groups", "value_code": "int4 asymmetric, groups", "window": 128}
"""The study's code that is nearest: even levels, in groups of 32 channels where quanto's are of 64."""

Row = dict[str, Any]


def measured(case: Case, options: Row) -> Row:
    """Nats a token over a dense cache: ``case.batch`` texts, of which the first ``case.context`` tokens come at once
    and the ``case.new_tokens`` behind them are judged. shape: a model of the accuracy study.

    Tokens are pruned as they leave the window; a press evicts once, after the prompt.
    """
    reader = subject(case.shape, str(DEVICE), torch.float32)
    stored, way, note = _stored(case, options, reader.head_dim)
    texts = reader.texts_of(reader.text, int(case.batch), case.context + case.new_tokens)
    rows = [Text(reader.model, ids, case.context).row(stored, way) for ids in texts]
    means = {name: statistics.fmean(row[name] for row in rows) for name in ("over_dense", "kl")}
    return means | {"+-": half_width([block for row in rows for block in row["blocks"]]), "note": note}


def _stored(case: Case, options: Row, head_dim: int) -> tuple[accuracy.case.Case, Way, str]:
    if case.way == "quantized":
        return accuracy.case.Case(**_LIKE_QUANTO), in_one_forward, "by even levels in groups of 32 channels"
    settings = read_options(None, options)[0]
    codes = {product: code for code, product in CODES.items()}
    names = [f"{role}_{what}" for role in ("key", "value") for what in ("sparsity", "code")]
    given = {name: getattr(settings, name) for name in names}
    stored = accuracy.case.Case(**{name: codes.get(value, value) for name, value in given.items()})
    if case.way == "snapkv":
        return accuracy.case.Case(), _evicting(stored.stored_share(head_dim, case.context)), ""
    return stored, in_one_forward, ""


def _evicting(share: float) -> Way:
    """SnapKV evicts all but ``share`` of the prompt's tokens."""
    from kvpress import SnapKVPress

    from mustafar_compile.integrations.kvpress import pressing

    def way(model: Any, ids: Tensor, prompt: int, case: accuracy.case.Case) -> Tensor:
        cache, positions = DynamicCache(config=model.config), torch.arange(len(ids), device=ids.device)
        with pressing(model, SnapKVPress(compression_ratio=1 - share)):
            hidden = [
                model.base_model(part[None], past_key_values=cache, position_ids=place[None]).last_hidden_state[0]
                for part, place in zip(_parts(ids, prompt), _parts(positions, prompt), strict=True)
            ]
        return torch.cat(hidden)

    return way


def _parts(x: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    return x[:prompt], x[prompt:]
