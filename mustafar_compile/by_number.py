"""Settings that differ from layer to layer, and within a layer from KV head to KV head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .errors import UnknownHeadError, UnknownLayerError

DEFAULT = "default"
"""The key of the value for all that a mapping does not name."""


@dataclass(frozen=True)
class ByNumber:
    """A value for each of some numbered things. Compares by value, whatever it was made of.

    numbered: numbers and their values, in order. default: the value of all others, None where they have none.
    """

    numbered: tuple[tuple[int, Any], ...]
    default: Any = None

    KIND: ClassVar[str]
    """What is numbered."""

    @classmethod
    def of(cls, given: Mapping[Any, Any] | list[Any] | tuple[Any, ...]) -> ByNumber:
        """Of a list with an entry for each, or a mapping such as ``{0: 0.3, "default": 0.7}``.

        Keys may be the decimal text of a number, as JSON has them. Raises ValueError for another key, for a number that
        is there twice, for None, and where there is no value at all.
        """
        values = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
        default = values.pop(DEFAULT, None)
        numbered = {int(key): value for key, value in values.items() if _is_number(key)}
        all_distinct = len(numbered) == len(values)
        if not all_distinct or None in numbered.values() or (not values and default is None):
            raise ValueError(
                f"{given!r} is not accepted; by {cls.KIND} it must be a list with an entry for each {cls.KIND}, or a "
                f'mapping of {cls.KIND} numbers from 0 on and "{DEFAULT}" to values'
            )
        return cls(tuple(sorted(numbered.items())), default)

    def items(self) -> list[tuple[int | str, Any]]:
        """As a mapping has them."""
        return [*self.numbered, *([] if self.default is None else [(DEFAULT, self.default)])]

    def plain(self) -> dict[str, Any]:
        """A mapping that JSON takes, with sorted keys, too."""
        return {str(key): value.plain() if isinstance(value, ByNumber) else value for key, value in self.items()}

    @property
    def named(self) -> str:
        """The numbers, for people."""
        return ", ".join(str(number) for number, _ in self.numbered)


class ByLayer(ByNumber):
    """A value for each layer, which may be a ``ByHead``."""

    KIND = "layer"

    def at(self, layer: int | None, name: str) -> Any:
        """The value of a layer. name: of the setting. Raises UnknownLayerError where the layer has no value."""
        value = dict[int | None, Any](self.numbered).get(layer, self.default)
        if value is None:
            raise UnknownLayerError(
                f'{name} has values for the layers {self.named} and no "{DEFAULT}", but the model has a layer {layer} '
                "with a cache to compress. Give it a value, or leave it dense by skip_layers"
            )
        return value


class ByHead(ByNumber):
    """A value for each KV head of a layer."""

    KIND = "KV head"

    def of_each(self, heads: int, name: str) -> list[Any]:
        """The values of all KV heads of a layer. name: of the setting, with the layer.

        Raises UnknownHeadError where there is a head without a value, or a value for one that is not there.
        """
        values = dict(self.numbered)
        found = [values.pop(head, self.default) for head in range(heads)]
        if values or None in found:
            others = "" if self.default is None else f' and "{DEFAULT}"'
            raise UnknownHeadError(
                f"{name} has values for the KV heads {self.named}{others}, but the layer has {heads} KV heads. "
                f'Accepted is a value for each of 0 to {heads - 1}, by its number or by "{DEFAULT}", and for no other'
            )
        return found


def read(name: str, given: Any, *kinds: type[ByNumber]) -> Any:
    """What is given for a setting, with lists and mappings, one within the other, as these kinds.

    Raises ValueError for a list or a mapping that is none.
    """
    if not kinds or not isinstance(given, Mapping | list | tuple):
        return given
    try:
        outer = kinds[0].of(given)
    except ValueError as error:
        raise ValueError(f"mustafar: {name}={error}") from None
    values = [(key, read(f"{name}[{key!r}]", value, *kinds[1:])) for key, value in outer.items()]
    return kinds[0].of(dict(values))


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """All values of a setting, each with its name, such as "key_sparsity[0]['default']"."""
    if not isinstance(value, ByNumber):
        yield name, value
        return
    for key, each in value.items():
        yield from leaves(f"{name}[{key!r}]", each)


def _is_number(key: Any) -> bool:
    """Whether a key of a mapping stands for a layer or a head."""
    return key.isdecimal() if isinstance(key, str) else isinstance(key, int) and not isinstance(key, bool) and key >= 0
