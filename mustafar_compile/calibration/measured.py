"""What was measured of a model, and the best budgets by it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from .allocation import Choice, allocated
from .budget import Budget, LayerBudget, Stored
from .candidates import candidates, format_of, read_back
from .errors import Reader

ROLES = ("key", "value")

Place = tuple[int, str]
"""A layer's number, and "key" or "value"."""

Shape = tuple[int, int]
"""KV heads, and channels of a row."""


class Measured:
    """Losses of all candidates, in nats a token, summed over the texts."""

    def __init__(self, window: int, codes: Sequence[str], dtype: torch.dtype) -> None:
        self.window, self.codes, self.dtype = window, codes, dtype
        self.texts = 0
        self.shapes: dict[Place, Shape] = {}
        self.losses: dict[Place, dict[Stored, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, reader: Reader, layer: int) -> None:
        """Measure a layer over a text."""
        for role, x, loss in (("key", reader.key, reader.key_loss), ("value", reader.value, reader.value_loss)):
            head_dim = x.shape[-1]
            self.shapes[layer, role] = x.shape[1], head_dim
            for stored in candidates(head_dim, self.codes):
                format = format_of(stored, head_dim, self.window)
                self.losses[layer, role][stored] += loss(read_back(x, format, self.dtype))

    def budget(self, share: float, codes: Sequence[str]) -> Budget:
        """The best budget of a share of the dense bytes with these of the codes.

        Raises ValueError where the least that can be stored is more.
        """
        limit = math.floor(share * self._dense_bytes)
        losses = {
            place: {stored: loss for stored, loss in of_place.items() if stored.code in codes}
            for place, of_place in self.losses.items()
        }
        try:
            choice = self._best(losses, limit)
        except ValueError as error:
            raise ValueError(
                f"mustafar: {share!r} of {self._dense_bytes} bytes a token is too little: {error}"
            ) from None
        spent, loss = self._total(choice)
        numbers = sorted({layer for layer, _ in choice})
        layers = {number: LayerBudget(*(choice[number, role] for role in ROLES)) for number in numbers}
        uniform = self._uniform_loss(losses, limit)
        return Budget(layers, self.window, spent / self._dense_bytes, loss / self.texts, uniform / self.texts)

    def _bytes(self, place: Place, stored: Stored) -> int:
        """Bytes of a pruned token."""
        heads, head_dim = self.shapes[place]
        return heads * format_of(stored, head_dim, self.window).token_bytes(self.dtype.itemsize)

    @property
    def _dense_bytes(self) -> int:
        """Bytes of a dense token, over all places."""
        return sum(heads * head_dim for heads, head_dim in self.shapes.values()) * self.dtype.itemsize

    def _total(self, choice: Mapping[Place, Stored]) -> tuple[int, float]:
        """(bytes, loss) of a choice for each place."""
        spent = sum(self._bytes(place, stored) for place, stored in choice.items())
        return spent, sum(self.losses[place][stored] for place, stored in choice.items())

    def _best(self, losses: Mapping[Place, Mapping[Stored, float]], limit: int) -> dict[Place, Stored]:
        """What loses least in at most ``limit`` bytes."""
        items = [
            [Choice(self._bytes(place, stored), loss) for stored, loss in of_place.items()]
            for place, of_place in losses.items()
        ]
        chosen = allocated(items, limit)
        return {place: [*of_place][i] for (place, of_place), i in zip(losses.items(), chosen, strict=True)}

    def _uniform_loss(self, losses: Mapping[Place, Mapping[Stored, float]], limit: int) -> float:
        """The least loss in so many bytes where all places have the same; infinite where nothing fits."""
        common = set.intersection(*(set(of_place) for of_place in losses.values()))
        totals = [self._total(dict.fromkeys(losses, stored)) for stored in common]
        return min((loss for spent, loss in totals if spent <= limit), default=math.inf)
