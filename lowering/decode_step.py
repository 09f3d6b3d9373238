"""One decode step of one layer: what ``decode_attention`` is given, as one object for whatever carries it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


def with_rows(x: Tensor) -> Tensor:
    """``x`` [..., D], copied if its channels do not lie side by side, as kernels want them."""
    return x if x.stride(-1) == 1 else x.contiguous()


class DecodeStep(NamedTuple):
    """The arguments of ``ops.decode_attention``, in the order of its schema; ``ops`` says what they are.

    key_format, value_format: a ``Format`` each, or ``HeadGroups`` in ``by_group``; their texts where the op is called.
    key_weights, value_weights: [B, H, L or 1, D], float32, by which the row ranks that leaves the window for each of
    the tokens (``strategies.strategy``); None: by its magnitude alone.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    key_format: Any
    value_format: Any
    position: Tensor | None
    mask: Tensor | None
    sinks: Tensor | None
    scale: float
    softcap: float = 0.0
    length: int | None = None
    key_weights: Tensor | None = None
    value_weights: Tensor | None = None

    @classmethod
    def of(cls, arguments: Sequence[Any], decode: Callable[[str], Any]) -> DecodeStep:
        """The step for the arguments of the op, the texts of its formats read by ``decode``."""
        read = list(arguments)
        read[5:7] = map(decode, read[5:7])
        return cls(*read)

    @property
    def query_tokens(self) -> int:
        """L, its tokens."""
        return self.query.shape[2]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[1] // self.key.shape[1]
