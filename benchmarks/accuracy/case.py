"""How keys and values are stored in one case of the study, what a model says then, and what it takes."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from study_files import StudyCase
from torch import Tensor

from . import budget, eviction, teacher_forced
from .codes import CODES
from .strategies import ALONG_CHANNELS, KEYS, QUERIES, VALUES, Choice, Seen
from .window import Window

ROWS = torch.bfloat16
"""The dtype of a cache, in which rows are pruned and stored."""

EXACT_BYTES = 2  # of an element that is not pruned
EVICTED_EVERY = 32  # steps: a text then has so many parts fewer
_SPARE_ROWS = 16  # exact rows behind the window, as the product keeps them


@dataclass(frozen=True)
class Case(StudyCase):
    """Settings by the names that the backend has for them, and what only the study knows.

    key_code, value_code: names of ``codes.CODES``. Sparsity 0 without a code leaves keys or values as they are. sinks:
    so many first tokens stay exact. rounding: see ``Choice``; 8 is the product's. group: tokens in which one channel
    is pruned, for the strategies along channels. token_share: share of a text's tokens that stay, half the latest and
    half heavy hitters (``eviction``), not for the strategies along channels; the others leave every ``EVICTED_EVERY``
    steps. budget: a file that a calibration saved; what it says of a layer goes before sparsities and codes. Raises
    ValueError for a name or a number that is not accepted.
    """

    key_strategy: str = "magnitude"
    value_strategy: str = "magnitude"
    key_sparsity: float = 0.0
    value_sparsity: float = 0.0
    key_code: str = "none"
    value_code: str = "none"
    window: int = 32
    sinks: int = 0
    rounding: int = 8
    group: int = 32
    token_share: float = 1.0
    budget: str = ""

    def __post_init__(self) -> None:
        for role, strategies in (("key", KEYS), ("value", VALUES)):
            self._check(f"{role}_strategy", self.side(role).strategy in strategies, "one of " + ", ".join(strategies))
            self._check(f"{role}_code", self.side(role).code in CODES, "one of " + ", ".join(CODES))
            self._check(f"{role}_sparsity", 0 <= self.side(role).choice.sparsity < 1, "in [0, 1)")
            without_code = self.side(role).strategy not in ALONG_CHANNELS or self.side(role).code == "none"
            self._check(f"{role}_code", without_code, "none along channels, where rows keep different numbers")
        whole = self.value_strategy not in ALONG_CHANNELS and 0 < self.token_share < 1
        self._check("token_share", whole or self.token_share == 1, "in (0, 1], and 1 along channels")
        for name in ("window", "rounding", "group"):
            self._check(name, getattr(self, name) >= 1, "at least 1")

    @property
    def label(self) -> str:
        """What a table calls it."""
        keys, values = self.side("key"), self.side("value")
        sides = [f"K and V {keys.label}"] if keys.label == values.label else [f"K {keys.label}", f"V {values.label}"]
        others = {"window": "window {}", "sinks": "{} sinks exact", "rounding": "kept to a multiple of {}"}
        others |= {"group": "groups of {}", "token_share": "{:.0%} of tokens"}
        given = self.described()
        sides = [f"budget {Path(self.budget).stem}"] if self.budget else sides
        return ", ".join([*sides, *(text.format(given[name]) for name, text in others.items() if name in given)])

    def side(self, role: str) -> Side:
        """How "key" or "value" is stored."""
        given = asdict(self)
        choice = Choice(given[f"{role}_sparsity"], self.rounding, self.group)
        return Side(role, given[f"{role}_strategy"], given[f"{role}_code"], choice, self.window, self.sinks)

    def attending(self, model: Any, prompt: int = 0, rows: torch.dtype = ROWS) -> AbstractContextManager[None]:
        """Within it a model attends over such a cache. prompt: so many first tokens come at once."""
        layers = itertools.cycle(self.by_layer(model.config.num_hidden_layers))

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return next(layers).attend(q, k, v, scale, prompt, rows)

        return teacher_forced.attending(model, attend)

    def by_layer(self, layers: int | None = None) -> list[Case]:
        """The case of each layer, of so many (default: of as many as the budget has). Raises ValueError where the
        budget is one for other layers."""
        if not self.budget:
            return [self] * (layers or 1)
        return [replace(self, budget="", **settings) for settings in budget.by_layer(self.budget, layers)]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int = 0, rows: torch.dtype = ROWS
    ) -> Tensor:
        """The attention of one layer: q [B, Hq, T, D], k and v [B, H, T, D] -> [B, Hq, T, D]."""
        stored = self.stored(q, k, v, scale, prompt, rows)
        windows = self.side("key").window(prompt), self.side("value").window(prompt)
        if self.token_share < 1:
            hitters = self.heavy_hitters(k.shape[2], prompt)
            return eviction.attention(q, k, v, *stored, windows[0], scale, hitters)
        return teacher_forced.attention(q, k, v, *stored, windows[0], scale, windows[1])

    def heavy_hitters(self, tokens: int, prompt: int = 0) -> eviction.HeavyHitters:
        """Who stays of so many tokens."""
        staying = max(round(self.token_share * tokens), 2)
        return eviction.HeavyHitters(staying, staying - staying // 2, EVICTED_EVERY, prompt)

    def stored(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, prompt: int = 0, rows: torch.dtype = ROWS
    ) -> tuple[Tensor, Tensor]:
        """What is read back of keys and values [B, H, T, D] of a layer once they have left the window.

        q: [B, Hq, T, D]. scale: of attention. prompt, rows: see ``attending``.
        """
        keys, values = self.side("key"), self.side("value")
        key_window, value_window = keys.window(prompt), values.window(prompt)

        def token_weights() -> Tensor:
            return teacher_forced.token_weights(q, k, stored_k, key_window, scale, value_window, QUERIES)

        stored_k = keys.stored(k, Seen(q, key_window, token_weights), rows)
        return stored_k, values.stored(v, Seen(q, value_window, token_weights), rows)

    def hidden_states(self, model: Any, ids: Tensor, prompt: int = 0, rows: torch.dtype = ROWS) -> Tensor:
        """What the model makes of tokens [T] with such a cache, all in one forward: [T, width]."""
        with self.attending(model, prompt, rows):
            return teacher_forced.hidden_states(model, ids)

    def row_share(self, head_dim: int) -> float:
        """Bytes of a pruned token over those that it takes dense."""
        sides = [case.side(role) for case in self.by_layer() for role in ("key", "value")]
        return sum(side.row_bytes(head_dim) for side in sides) / (len(sides) * EXACT_BYTES * head_dim)

    def stored_share(self, head_dim: int, tokens: int) -> float:
        """Bytes of a cache of so many tokens, with its exact ones, over those that it takes dense."""
        share, held = self.row_share(head_dim), self.token_share * tokens
        exact = min(held, self.window + self.sinks + _SPARE_ROWS) if share < 1 else 0
        return (share * (held - exact) + exact) / tokens


@dataclass(frozen=True)
class Side:
    """Keys or values of a case."""

    role: str
    strategy: str
    code: str
    choice: Choice
    exact: int
    sinks: int

    @property
    def label(self) -> str:
        """What a table calls it."""
        if self.untouched:
            return "dense"
        parts = [f"{self.choice.sparsity:g}", self.strategy, self.code]
        return " ".join(part for part in parts if part not in ("0", "magnitude", "none"))

    @property
    def untouched(self) -> bool:
        """Whether they are stored as they are."""
        return self.code == "none" and not self.choice.sparsity

    def window(self, prompt: int) -> Window:
        """Which of them are exact."""
        return Window(self.exact, self.choice.group if self.strategy in ALONG_CHANNELS else 1, prompt)

    def stored(self, x: Tensor, seen: Seen, rows: torch.dtype) -> Tensor:
        """What is read back of keys or values [B, H, T, D] of a layer."""
        if self.untouched:
            return x
        cached = x.to(rows)
        keep = (KEYS if self.role == "key" else VALUES)[self.strategy](cached, seen, self.choice)
        decoded = cached.where(keep, 0) if self.code == "none" else CODES[self.code].function(cached, keep)
        return torch.cat([x[:, :, : self.sinks], decoded[:, :, self.sinks :].to(x.dtype)], dim=2)

    def row_bytes(self, head_dim: int) -> float:
        """Bytes of a pruned token of one head: kept elements, what a code adds, a bit for each channel."""
        if self.untouched:
            return EXACT_BYTES * head_dim
        if self.strategy in ALONG_CHANNELS:
            share = self.choice.of(self.choice.group) / self.choice.group
            return share * head_dim * EXACT_BYTES + (head_dim / 8 if share < 1 else 0)
        kept = self.choice.of(head_dim)
        shared = self.strategy == "think"  # one list of channels for all tokens, which takes next to nothing
        return CODES[self.code].row_bytes(kept if shared else head_dim, kept)
