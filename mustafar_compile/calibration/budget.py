"""What a calibration gives: how keys and values of each layer are to be stored."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_VERSION = 1


@dataclass(frozen=True)
class Stored:
    """How keys or values of a layer are stored: as ``Settings`` has it."""

    sparsity: float
    code: str = "none"

    def __str__(self) -> str:
        return f"{self.sparsity:g}" + (f" {self.code}" if self.code != "none" else "")


OfHeads = Stored | tuple[Stored, ...]
"""How all KV heads of a layer are stored, or each of them."""


@dataclass(frozen=True)
class LayerBudget:
    """How keys and values of a layer are stored."""

    key: OfHeads
    value: OfHeads


@dataclass(frozen=True)
class Budget:
    """Settings by layer, or by layer and KV head. Made by ``calibrate``; pass it, or the path of a saved one, as the
    setting ``budget``.

    layers: by number. window: of ``Settings``. bytes: stored over dense bytes of a pruned token, over all these layers;
    the window comes on top. loss: what was predicted for the texts, in nats a token of divergence (KL) from the dense
    model. uniform_loss: the same of the best that all layers can have alike, for keys and values and at no more bytes.
    """

    layers: Mapping[int, LayerBudget]
    window: int
    bytes: float
    loss: float
    uniform_loss: float

    @classmethod
    def of(cls, given: Budget | str | os.PathLike[str]) -> Budget:
        """A budget, or the one that was saved there."""
        if isinstance(given, str | os.PathLike):
            return cls.load(given)
        if not isinstance(given, Budget):
            raise ValueError(
                f"mustafar: budget={given!r} is not accepted; it must be a Budget or the path of a saved one"
            )
        return given

    def settings(self) -> dict[str, Any]:
        """The fields of ``Settings`` that it stands for."""
        by_layer = {
            f"{role}_{name}": {number: _field(getattr(layer, role), name) for number, layer in self.layers.items()}
            for role in ("key", "value")
            for name in ("sparsity", "code")
        }
        return {**by_layer, "window": self.window}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Budget:
        """Read what ``save`` wrote. Raises OSError, and ValueError for a file with anything else in it."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            content = json.loads(text)
            if content.pop("version") != _VERSION:
                raise ValueError(f"it is of another version than {_VERSION}")
            layers = {
                int(number): LayerBudget(**{role: _read(stored) for role, stored in layer.items()})
                for number, layer in content.pop("layers").items()
            }
            return cls(layers, **content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"mustafar: {os.fspath(path)!r} is no saved budget: {error}") from error

    def __str__(self) -> str:
        from ..reporting.text import table

        title = (
            f"mustafar: a budget of {self.bytes:.1%} of the dense bytes; predicted loss {self.loss:.4f} nats a token, "
            f"{self.uniform_loss:.4f} with all layers alike"
        )
        rows = [(str(number), _shown(layer.key), _shown(layer.value)) for number, layer in self.layers.items()]
        return f"{title}\n{table('', ('layer', 'keys', 'values'), rows).lstrip()}"


def _field(stored: OfHeads, name: str) -> Any:
    """What a setting has for a layer."""
    return getattr(stored, name) if isinstance(stored, Stored) else [getattr(head, name) for head in stored]


def _read(saved: Any) -> OfHeads:
    return tuple(Stored(**head) for head in saved) if isinstance(saved, list) else Stored(**saved)


def _shown(stored: OfHeads) -> str:
    if isinstance(stored, Stored):
        return str(stored)
    ways = {way: [str(head) for head, own in enumerate(stored) if own == way] for way in stored}
    return "; ".join(f"{', '.join(heads)}: {way}" for way, heads in ways.items())
