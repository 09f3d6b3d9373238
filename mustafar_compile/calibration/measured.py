"""What was measured of a model, and the best budgets by it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .allocation import Choice, allocated
from .budget import Budget, LayerBudget, OfHeads, Stored
from .candidates import candidates, format_of, read_back
from .errors import Reader
from .grouping import Heads, grouped, price_of_bytes

ROLES = ("key", "value")

Place = tuple[int, str]
"""A layer's number, and "key" or "value"."""

Shape = tuple[int, int]
"""KV heads, and channels of a row."""


class Part(NamedTuple):
    """What is stored in one way: keys or values of some KV heads of a layer."""

    layer: int
    role: str
    heads: Heads


class Measured:
    """Losses of all candidates, in nats a token of each KV head, summed over the texts."""

    def __init__(self, window: int, codes: Sequence[str], dtype: torch.dtype) -> None:
        self.window, self.codes, self.dtype = window, codes, dtype
        self.texts = 0
        self.shapes: dict[Place, Shape] = {}
        self.losses: dict[Place, dict[Stored, np.ndarray]] = defaultdict(dict)

    def add(self, reader: Reader, layer: int) -> None:
        """Measure a layer over a text."""
        for role, x, loss in (("key", reader.key, reader.key_loss), ("value", reader.value, reader.value_loss)):
            head_dim, found = x.shape[-1], self.losses[layer, role]
            self.shapes[layer, role] = x.shape[1], head_dim
            for stored in candidates(head_dim, self.codes):
                format = format_of(stored, head_dim, self.window)
                found[stored] = found.get(stored, 0.0) + loss(read_back(x, format, self.dtype)).double().cpu().numpy()

    def budget(self, share: float, codes: Sequence[str], by_head: bool = False) -> Budget:
        """The best budget of a share of the dense bytes with these of the codes. by_head: see ``calibrate``.

        Raises ValueError where the least that can be stored is more.
        """
        limit = math.floor(share * self._dense_bytes)
        choices = {place: [x for x in of_place if x.code in codes] for place, of_place in self.losses.items()}
        whole = {layer: [tuple(range(heads))] for (layer, _), (heads, _) in self.shapes.items()}
        try:
            choice = self._best(choices, self._groups(choices, limit) if by_head else whole, limit)
        except ValueError as error:
            raise ValueError(
                f"mustafar: {share!r} of {self._dense_bytes} bytes a token is too little: {error}"
            ) from None
        spent, loss = self._total(choice)
        layers = {layer: LayerBudget(*(_of_heads(choice, layer, role) for role in ROLES)) for layer in sorted(whole)}
        uniform = self._uniform_loss(choices, limit)
        return Budget(layers, self.window, spent / self._dense_bytes, loss / self.texts, uniform / self.texts)

    def _head_bytes(self, place: Place, stored: Stored) -> int:
        """Bytes of a pruned token of one KV head."""
        return format_of(stored, self.shapes[place][1], self.window).token_bytes(self.dtype.itemsize)

    @property
    def _dense_bytes(self) -> int:
        """Bytes of a dense token, over all places."""
        return sum(heads * head_dim for heads, head_dim in self.shapes.values()) * self.dtype.itemsize

    def _cost_and_loss(self, part: Part, stored: Stored) -> Choice:
        place, heads = (part.layer, part.role), list(part.heads)
        return Choice(len(heads) * self._head_bytes(place, stored), float(self.losses[place][stored][heads].sum()))

    def _total(self, choice: Mapping[Part, Stored]) -> tuple[int, float]:
        """(bytes, loss) of a choice for each part."""
        chosen = [self._cost_and_loss(part, stored) for part, stored in choice.items()]
        return sum(x.cost for x in chosen), sum(x.loss for x in chosen)

    def _best(
        self, choices: Mapping[Place, Sequence[Stored]], groups: Mapping[int, Sequence[Heads]], limit: int
    ) -> dict[Part, Stored]:
        """What loses least in at most ``limit`` bytes, where the heads of a layer are stored by these groups."""
        parts = [Part(*place, heads) for place in choices for heads in groups[place[0]]]
        items = [[self._cost_and_loss(part, stored) for stored in choices[part.layer, part.role]] for part in parts]
        chosen = allocated(items, limit)
        return {part: choices[part.layer, part.role][i] for part, i in zip(parts, chosen, strict=True)}

    def _groups(self, choices: Mapping[Place, Sequence[Stored]], limit: int) -> dict[int, list[Heads]]:
        """The heads of each layer in one group or two."""
        losses = {place: np.stack([self.losses[place][x] for x in of_place], 1) for place, of_place in choices.items()}
        costs = {place: np.array([self._head_bytes(place, x) for x in of_place]) for place, of_place in choices.items()}
        price = price_of_bytes([*losses.values()], [*costs.values()], limit)
        priced = {place: loss + price * costs[place] for place, loss in losses.items()}
        return {layer: grouped([priced[layer, role] for role in ROLES]) for layer in {layer for layer, _ in choices}}

    def _uniform_loss(self, choices: Mapping[Place, Sequence[Stored]], limit: int) -> float:
        """The least loss in so many bytes where all places have the same; infinite where nothing fits."""
        everything = [Part(*place, tuple(range(heads))) for place, (heads, _) in self.shapes.items()]
        totals = [self._total(dict.fromkeys(everything, stored)) for stored in _common(choices.values())]
        return min((loss for spent, loss in totals if spent <= limit), default=math.inf)


def _common(choices: Iterable[Sequence[Stored]]) -> set[Stored]:
    """Those that all places have."""
    return set.intersection(*map(set, choices))


def _of_heads(choice: Mapping[Part, Stored], layer: int, role: str) -> OfHeads:
    """How keys or values of a layer are stored."""
    of_heads = {head: stored for part, stored in choice.items() if part[:2] == (layer, role) for head in part.heads}
    ways = tuple(of_heads[head] for head in sorted(of_heads))
    return ways[0] if len(set(ways)) == 1 else ways
