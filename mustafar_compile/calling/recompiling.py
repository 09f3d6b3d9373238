"""What Dynamo is told of our compilations: where by default it would compile ever anew, and where not when it must."""

from __future__ import annotations

from collections.abc import Sequence

from .. import _compat
from ..cache.tensor import CompressedKV
from ..patterns.graph.layers import OWN_NUMBER
from ..patterns.match import Match, NoMatch
from ..patterns.rewriting.plan import Compressed, Extended, Plan

_SHARED_LIMIT = 32  # four times what Dynamo has by default


def count_for_each_layer(found: Sequence[Match | NoMatch]) -> None:
    """Let the recompile limit count for each module where a graph is of one layer of known number.

    Layers that are compiled by themselves run one function. Each finds its cache by its number, so each needs graphs of
    its own.
    """
    layers = {m.attention.layer for m in found}
    if len(layers) == 1 and None not in layers:
        _compat.dynamo.bind_to_module()


def heed_hooks() -> None:
    """Compile anew where layers get forward hooks, or lose them: by default Dynamo does not notice the first.

    A hook may evict tokens from the cache of a prompt, as presses of kvpress do.
    """
    _compat.dynamo.guard_on_hooks(OWN_NUMBER)


def let_models_share_a_function() -> None:
    """Let a function have more versions that is a wrapper around ``forward``, as models of transformers have one.

    They count for all models together, and each way of generating takes some for its prompts and some for its steps:
    with an assistant beside the model, or after prompt lookup, the limit would be reached. It is raised for models that
    were called before others reached it.
    """
    if _compat.dynamo.runs_in_a_wrapper():
        _compat.dynamo.patch_config(recompile_limit=max(_SHARED_LIMIT, _compat.dynamo.config.recompile_limit))


def let_buffers_grow(plan: Plan) -> None:
    """Let growing caches be of any length where modules hold them as buffers, whose shapes Dynamo takes for fixed.

    Before the first token such a buffer is None.
    """
    grows = any(isinstance(x, Extended) or (isinstance(x, Compressed) and x.grows) for x in plan.outputs)
    if grows and any(x is None or isinstance(x, CompressedKV) for x in _compat.dynamo.buffers_read()):
        _compat.dynamo.patch_config(force_parameter_static_shapes=False)
