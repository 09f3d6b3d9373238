"""How a rewritten graph is called: where its inputs come from and what its results become.

Rewriting writes a plan and the runtime carries it out; neither knows the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from ...lowering.layout import Layout


@dataclass(frozen=True)
class Argument:
    """Argument ``index`` of the original graph."""

    index: int


@dataclass(frozen=True)
class Buffer:
    """The ``place``-th buffer of the compressed cache that is argument ``index``."""

    index: int
    place: int


@dataclass(frozen=True)
class AttachedBuffer:
    """The ``place``-th buffer of the compressed state attached to the dense cache that is argument ``index``."""

    index: int
    place: int


@dataclass(frozen=True)
class Size:
    """The logical size of dimension ``dim`` of the compressed cache that is argument ``index``."""

    index: int
    dim: int


@dataclass(frozen=True)
class Result:
    """Result ``index`` of the rewritten graph, as it is."""

    index: int


@dataclass(frozen=True)
class Extended:
    """The compressed cache that is argument ``index``, ``count`` tokens longer."""

    index: int
    count: int | Argument = 1


@dataclass(frozen=True)
class Compressed:
    """A new compressed cache of a format: its buffers are the results from ``index`` on.

    tokens: its logical number of tokens, itself a result where it is not fixed. grows: whether by concatenation.
    tokens_dim: 2 in [B, H, S, D], 1 in [B, S, H, D].
    """

    index: int
    format: Layout
    tokens: int | Result
    grows: bool
    tokens_dim: int


@dataclass(frozen=True)
class Attached:
    """A dense cache of the caller that gets compressed state attached.

    index: its argument. tokens_dim: 2 in [B, H, S, D], 1 in [B, S, H, D]. shape: [B, H, S, D] as the graph sees it,
    sizes may be symbolic. format: of the state. batch: the rows in use. position: maps the original arguments to
    the position of the new token. releases: whether its dense memory is given back, since the graph does not use it.
    blind: whether its strategy wants queries of the tokens that are in it before the graph runs.
    """

    index: int
    tokens_dim: int
    shape: tuple[Any, ...]
    format: Layout
    batch: int | Argument
    position: GraphModule
    releases: bool
    blind: bool = False


Input = Argument | Buffer | AttachedBuffer | Size
Output = Argument | Result | Extended | Compressed


@dataclass(frozen=True)
class Plan:
    """A rewritten graph and its calling convention."""

    module: GraphModule
    inputs: list[Input]
    outputs: list[Output]
    attached: list[Attached]
