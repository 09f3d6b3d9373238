"""What Dynamo is told of our compilations, where by default it would compile ever anew until it gives up."""

from __future__ import annotations

from collections.abc import Sequence

from .. import _compat
from ..cache.tensor import CompressedKV
from ..patterns.match import Match, NoMatch
from ..patterns.rewriting.plan import Compressed, Extended, Plan


def count_for_each_layer(found: Sequence[Match | NoMatch]) -> None:
    """Let the recompile limit count for each module where a graph is of one layer of known number.

    Layers that are compiled by themselves run one function. Each finds its cache by its number, so each needs graphs of
    its own.
    """
    layers = {m.attention.layer for m in found}
    if len(layers) == 1 and None not in layers:
        _compat.bind_to_module()


def let_buffers_grow(plan: Plan) -> None:
    """Let growing caches be of any length where modules hold them as buffers, whose shapes Dynamo takes for fixed.

    Before the first token such a buffer is None.
    """
    grows = any(isinstance(x, Extended) or (isinstance(x, Compressed) and x.grows) for x in plan.outputs)
    if grows and any(x is None or isinstance(x, CompressedKV) for x in _compat.buffers_read()):
        _compat.patch_dynamo(force_parameter_static_shapes=False)
