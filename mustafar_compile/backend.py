"""The backend, on one page: normalise -> match -> rewrite -> compile_fx."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import _compat
from .cache.attached import is_watchable
from .cache.memory import written_twice
from .cache.release import check_releasable
from .cache.tensor import CompressedKV
from .calling.compiled_call import CompiledCall
from .calling.cuda_graphs import CudaGraphs
from .calling.example_inputs import add_calling_convention
from .calling.in_pieces import compile_in_pieces
from .calling.plain_inputs import PlainInputs
from .calling.recompiling import count_for_each_layer, heed_hooks, let_buffers_grow, let_models_share_a_function
from .calling.recordable import Places, graph_device, is_step, watch_over, why_not
from .digest import code_digest
from .errors import NothingMatchedError
from .lowering import ops
from .lowering.buffers import CACHE_DTYPES
from .lowering.format import MAX_QUERY_TOKENS, grown_capacity
from .lowering.strategies import all_packaged
from .patterns.cache.conditions import CacheInput, Context
from .patterns.graph.nodes import drop_meta, may_be_attention
from .patterns.graph.normalise import Functional, normalise
from .patterns.match import Match, NoMatch, find_matches
from .patterns.rewriting.lengths import free_of_lengths, lengths_of
from .patterns.rewriting.plan import Plan
from .patterns.rewriting.rewriter import Rewriter
from .patterns.rewriting.rounded_sizes import LengthError
from .policy import check_found_layers, policy
from .ranks import Statement, agreeing, check_heads, of_attention, of_options
from .reporting.record import (
    record_decompression,
    record_failure,
    record_graph,
    record_launching,
    record_loss,
    record_untouched,
)
from .settings import Settings, read_options
from .stages import StageError, stage

Rewritten = tuple[Plan, list[Any], PlainInputs]
"""A plan, the example inputs of its graph, and what the original graph is given."""


def mustafar(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    inner: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its KV caches compressed. Use it as ``torch.compile(model, backend="mustafar")``.

    mode: a mode of Inductor. options: fields of ``Settings`` and keys of Inductor's config. inner: what compiles graphs
    once they are rewritten, Inductor's ``compile_fx`` by default. What does not match is compiled by it as it is;
    ``mustafar_compile.explain()`` tells why. So is, with a warning, a graph on which a stage fails. Raises ValueError
    for an unknown mode or option or a value out of range, UnknownLayerError and UnknownHeadError for settings of layers
    and KV heads that are not there, NothingMatchedError under ``strict``, what a stage fails with
    under ``raise_errors``, RanksDisagreeError where ranks that wait for each other compile different graphs.
    """
    compile_fx = _compat.inductor.compile_fx if inner is None else inner
    _compat.dynamo.note_recompile_limit()
    with agreeing(gm, example_inputs) as said:
        settings, inductor = read_options(mode, options)
        said.update(of_options(settings, inductor))
        check_heads(settings, gm, example_inputs)
        rewritten = _rewritten(gm, example_inputs, settings, said)
    with _compat.inductor.configured(inductor, code_digest(), traces_are_cached=all_packaged()):
        if rewritten is None and any(isinstance(x, CompressedKV) for x in example_inputs):
            return gm  # op by op, which decompresses: Inductor would need plain tensors
        if rewritten is None:
            return compile_fx(gm, example_inputs)
        plan, inputs, given = rewritten
        wrap = _launching(plan, inputs, given) if inductor.get("triton.cudagraphs", True) else None
        loops = _compat.inductor.loops_of_cpus() if graph_device(inputs) is None else {}
        changes = {"triton.cudagraphs": False, **loops}
        with _compat.inductor.config.patch(changes), torch.set_grad_enabled(_gives_gradients(gm)):
            compiled = compile_in_pieces(plan.module, inputs) if inner is None else inner(plan.module, inputs)
        drop_meta(plan.module.graph)  # AOTAutograd keeps the module
        growing = [i for i, cache in given.caches.items() if cache.grows]
        return given.taking_parts(CompiledCall(plan, compiled if wrap is None else wrap(compiled), growing))


def _launching(
    plan: Plan, inputs: list[Any], given: PlainInputs
) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """What makes CUDA graphs of the calls of a plan, None where it runs as it is. The report says which.

    inputs: its example inputs, which get one more where the step has lengths.
    """
    device = graph_device(inputs)
    if device is None or not is_step(plan):
        return None
    lengths, reason = lengths_of(plan, inputs), why_not(plan, inputs)
    places = Places.of(plan, inputs, lengths, given.parameters)
    if lengths and not reason:
        try:
            inputs.append(free_of_lengths(plan, lengths, device))
        except LengthError as error:
            reason = str(error)
    record_launching(reason)
    watch = None if reason else watch_over(plan)
    return None if reason else lambda compiled: CudaGraphs(compiled, places, device, watch)


def _rewritten(gm: GraphModule, example_inputs: Sequence[Any], settings: Settings, said: Statement) -> Rewritten | None:
    """What becomes of a graph with something to rewrite, None for a graph that runs as it is.

    said: gets what other ranks must say, too.
    """
    holds_cache = any(isinstance(x, CompressedKV) for x in example_inputs)
    if not holds_cache and not _may_hold_attention(gm):
        if settings.strict and any(isinstance(x, torch.nn.Parameter) for x in example_inputs):
            raise NothingMatchedError("mustafar: strict is set and this graph holds no attention")
        record_untouched()
        return None
    try:
        return _through_stages(gm, example_inputs, settings, said)
    except StageError as error:  # the stages work on a trace, so the graph itself still runs as it is
        said["stages"] = str(error)
        record_failure(gm, error)
        _require_match(settings, [], str(error))
        return None


def _through_stages(
    gm: GraphModule, example_inputs: Sequence[Any], settings: Settings, said: Statement
) -> Rewritten | None:
    """As ``_rewritten``, of a graph that may hold attention. Raises StageError."""
    with stage("traced", settings.raise_errors):
        given = PlainInputs(gm, example_inputs)
        caches = given.caches
        stand_ins = {i: _dense_stand_in(given.placeholders[i]) for i in caches}
        functional = normalise(gm, given.values, lambda i, x: stand_ins.get(i), given.composed)
        if written_twice(given.values, [functional.placeholders.index(node) for node in functional.mutated]):
            raise RuntimeError("it writes an input that shares memory with another one")
    compressed = {functional.placeholders[i]: CacheInput(x.format, x.tokens_dim) for i, x in caches.items()}
    context = _context(functional, given, compressed, settings)
    with stage("matched", settings.raise_errors):
        found = find_matches(functional, context)
        check_found_layers(settings, found)
    count_for_each_layer(found)
    heed_hooks()
    let_models_share_a_function()
    if _gives_gradients(gm):
        reason = "gradients are enabled; compile and run under torch.no_grad()"
        found = [NoMatch(m.attention, reason, m.key, m.value, lost=isinstance(m, Match)) for m in found]
    said.update(of_attention(found))
    matches = [m for m in found if isinstance(m, Match)]
    rewritten = None
    if matches or caches:
        with stage("rewritten", settings.raise_errors):
            plan = Rewriter(functional, compressed, grown_capacity, settings.release_dense).run(matches)
            rewritten = plan, add_calling_convention(plan, gm, given), given
        let_buffers_grow(plan)
    record_graph(found, context)
    _require_match(settings, found, "no attention was found")
    if rewritten is not None:
        _check_releasable(plan, given.values)
    if rewritten is not None and any(node.target is ops.decompress for node in plan.module.graph.nodes):
        record_decompression(found)
    else:
        record_loss(found)
    return rewritten


def _check_releasable(plan: Plan, inputs: Sequence[Any]) -> None:
    """Check that what the plan releases can be released."""
    for attached in plan.attached:
        if attached.releases:
            check_releasable(inputs[attached.index])


def _gives_gradients(gm: GraphModule) -> bool:
    """Whether gradients can flow out of a graph. Not where it turns them off for all that it gives and writes."""
    results = [node.meta.get("example_value") for node in gm.graph.output_node().all_input_nodes]
    inputs = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    written = [x for x in inputs if not isinstance(x, torch.nn.Parameter)]
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in results + written)


def _may_hold_attention(gm: GraphModule) -> bool:
    return any(map(may_be_attention, gm.graph.nodes))


def _dense_stand_in(placeholder: Node) -> Callable[[], torch.Tensor]:
    """Makes the dense tensor that a compressed input stands for, with Dynamo's symbolic sizes."""
    logical = placeholder.meta["example_value"]
    return lambda: torch.empty(tuple(logical.shape), dtype=logical.dtype, device=logical.device)


def _context(
    functional: Functional,
    given: PlainInputs,
    compressed: Mapping[Node, CacheInput],
    settings: Settings,
) -> Context:
    inputs = list(zip(functional.placeholders, given.values, strict=True))
    return Context(
        caches=compressed,
        format_of=policy(settings),
        parameters={functional.placeholders[i] for i in given.parameters},
        unwatchable={
            n for n, x in inputs if isinstance(x, torch.Tensor) and n not in compressed and not is_watchable(x)
        },
        dtypes=CACHE_DTYPES,
        max_query_tokens=MAX_QUERY_TOKENS,
        release_dense=settings.release_dense,
    )


def _require_match(settings: Settings, found: Sequence[Match | NoMatch], otherwise: str) -> None:
    """Raise NothingMatchedError under ``strict`` where nothing matched. otherwise: the reason where none is found."""
    if settings.strict and not any(isinstance(m, Match) for m in found):
        reasons = "; ".join(dict.fromkeys(m.reason for m in found if isinstance(m, NoMatch))) or otherwise
        raise NothingMatchedError(f"mustafar: strict is set and nothing in this graph matched: {reasons}")
