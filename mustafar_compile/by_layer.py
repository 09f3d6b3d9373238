"""Settings that differ from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UnknownLayerError

DEFAULT = "default"
"""The key of the value for all layers that a mapping does not name."""

ACCEPTED = f'a list with an entry for each layer, or a mapping of layer numbers from 0 on and "{DEFAULT}" to values'


@dataclass(frozen=True)
class ByLayer:
    """A value for each layer. Compares by value, whatever it was made of.

    layers: numbers and their values, in order. default: the value of all others, None where they have none.
    """

    layers: tuple[tuple[int, Any], ...]
    default: Any = None

    @classmethod
    def of(cls, given: Mapping[Any, Any] | list[Any] | tuple[Any, ...]) -> ByLayer:
        """Of a list with an entry for each layer, or a mapping such as ``{0: 0.3, "default": 0.7}``.

        Keys may be the decimal text of a number, as JSON has them. Raises ValueError for another key, for a layer that
        is named twice, for None, and where there is no value at all.
        """
        values = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
        default = values.pop(DEFAULT, None)
        numbered = {int(key): value for key, value in values.items() if _is_number(key)}
        all_distinct = len(numbered) == len(values)
        if not all_distinct or None in numbered.values() or (not values and default is None):
            raise ValueError(f"{given!r} is not accepted; by layer it must be {ACCEPTED}")
        return cls(tuple(sorted(numbered.items())), default)

    def items(self) -> list[tuple[int | str, Any]]:
        """As a mapping has them."""
        return [*self.layers, *([] if self.default is None else [(DEFAULT, self.default)])]

    def plain(self) -> dict[str, Any]:
        """A mapping that JSON takes, with sorted keys, too."""
        return {str(key): value for key, value in self.items()}

    def at(self, layer: int, name: str) -> Any:
        """The value of a layer. name: of the setting. Raises UnknownLayerError where the layer has no value."""
        value = dict(self.layers).get(layer, self.default)
        if value is None:
            named = ", ".join(str(number) for number, _ in self.layers)
            raise UnknownLayerError(
                f'{name} has values for the layers {named} and no "{DEFAULT}", but the model has a layer {layer} with '
                "a cache to compress. Give it a value, or leave it dense by skip_layers"
            )
        return value


def _is_number(key: Any) -> bool:
    """Whether a key of a mapping stands for a layer."""
    return key.isdecimal() if isinstance(key, str) else isinstance(key, int) and not isinstance(key, bool) and key >= 0
