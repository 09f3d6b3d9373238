"""Finding the inputs of a rewritten graph at each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from ..cache.attached import AttachedState
from ..patterns.rewriting.plan import Argument, AttachedBuffer, Buffer, Input, Size


class Binding:
    """Binds a plan's inputs to the arguments of a call.

    A model has hundreds of inputs and every step binds them all, so what kind each is of is looked at once: a call lays
    out buffers, cache by cache, and sizes before the arguments, and picks from that by position.
    """

    def __init__(self, inputs: Sequence[Input]) -> None:
        buffers, attached = ([x for x in inputs if isinstance(x, kind)] for kind in (Buffer, AttachedBuffer))
        self.caches, self.attached = (sorted({source.index for source in x}) for x in (buffers, attached))
        self.sizes = [source for source in inputs if isinstance(source, Size)]
        ahead: list[Input] = [*sorted(buffers, key=_order), *sorted(attached, key=_order), *self.sizes]
        place = {source: i for i, source in enumerate(ahead)}
        places = [len(ahead) + source.index if isinstance(source, Argument) else place[source] for source in inputs]
        self.pick = itemgetter(*places) if len(places) > 1 else lambda laid_out: [laid_out[place] for place in places]

    def __call__(self, arguments: Sequence[Any], states: Mapping[int, AttachedState]) -> Sequence[Any]:
        """The inputs, in order. states: those of the attached caches, by argument."""
        laid_out: list[Any] = []
        for index in self.caches:
            cache = arguments[index]
            laid_out += cache.own_buffers() if cache.grows else cache.buffers
        for index in self.attached:
            laid_out += states[index].buffers
        laid_out += [arguments[size.index].shape[size.dim] for size in self.sizes]
        laid_out += arguments
        return self.pick(laid_out)


def _order(source: Buffer | AttachedBuffer) -> tuple[int, int]:
    return source.index, source.place
