"""What of a model takes memory: weights, caches, and what a prompt and a step need besides. Found without any."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from .. import _compat
from ..policy import layers_of
from . import fusion
from .fake import fake_model, forward, weight_bytes, without_memory
from .layers import explain_config
from .live_bytes import LiveBytes

log = logging.getLogger("mustafar_compile")

BATCH, CONTEXT = sympy.symbols("batch context", integer=True, positive=True)

_PROBES = (512, 1024)  # tokens of the prompts that are measured, unless a window is longer
_TRACED = {BATCH: 3, CONTEXT: 61}  # sizes of the prompt that is compiled
_LAYERS = 3  # of each kind, after which a residual stream was summed once
_CPU = torch.device("cpu")  # sizes are the same everywhere, and only there every build of torch has kernels to trace


@dataclass(frozen=True)
class CacheTensor:
    """K or V of one layer.

    role: "key" or "value". heads: KV heads. window: the most tokens that are kept, None where all are. compressible:
    whether its attention matches.
    """

    layer: int
    role: str
    heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None
    compressible: bool

    @property
    def token_bytes(self) -> int:
        """Bytes of a dense token."""
        return self.heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Footprint:
    """Memory of a model, in bytes.

    weights: parameters and buffers. tensors: those of the cache. prompt: activations and logits at the worst moment
    of a prompt, by ``BATCH`` and ``CONTEXT``; compiled_prompt: the same where the prompt is compiled. step: those of a
    decode step, by ``BATCH``. positions: the most tokens that the model was made for, None where unknown. layers: of
    all kinds.
    """

    weights: int
    tensors: tuple[CacheTensor, ...]
    prompt: sympy.Expr
    compiled_prompt: sympy.Expr
    step: sympy.Expr
    positions: int | None
    layers: int


def measure(config: Any, dtype: torch.dtype) -> Footprint:
    """The footprint of a causal language model of transformers with such a config.

    The model runs over fake tensors, op by op, and what is alive is counted. Memory is linear in the batch and of the
    second degree in the tokens: a mask has their square. Of a prompt that is compiled its graph is asked (``fusion``),
    if it is one. Raises as ``explain_config`` does, and AttributeError for a model without a cache.
    """
    graphs: list[sympy.Expr | None] = []
    squares: list[bool] = []

    def look(gm: GraphModule, inputs: Any) -> GraphModule:
        graphs.append(None if graphs else _of_graph(gm, inputs))
        squares.append(_holds_square(gm))
        return gm

    batch, context = _TRACED.values()
    entries, _ = explain_config(
        config, {}, batch=batch, context=context, dtype=dtype, kept=_LAYERS, symbolic=True, inner=look
    )
    compressible = {entry.layer for entry in entries if not entry.reason}
    with without_memory():
        model = fake_model(config, dtype, _CPU)
        cache = forward(model, 1, 2).past_key_values
        tensors = tuple(_cache_tensors(cache, compressible))
        window = min((x.window for x in tensors if x.window is not None), default=0)
        short, prompt = _uncompiled_prompts(model, window)
        compiled = graphs[0] if len(graphs) == 2 else None  # of the prompt, and of a step
        if compiled is None:
            masked = any(squares)
            compiled = _prompt(model, _PROBES, masked=True) if masked else short - short.coeff(CONTEXT, 2) * CONTEXT**2
        return Footprint(
            weight_bytes(model),
            tensors,
            prompt,
            compiled,
            _step(model),
            getattr(config.get_text_config(), "max_position_embeddings", None),
            layers_of(config),
        )


def _of_graph(gm: GraphModule, inputs: Any) -> sympy.Expr | None:
    """Bytes that a graph needs, None where only a run of the model tells."""
    try:
        needed = fusion.peak(gm, inputs, {number: symbol for symbol, number in _TRACED.items()})
    except Exception as error:  # whatever an op raises that wants to know a size, and sympy where it is no polynomial
        log.info("a compiled prompt is counted like one that is not: %s", str(error).partition("\n")[0])
        return None
    return needed if needed.free_symbols == _TRACED.keys() else None


def _cache_tensors(cache: Any, compressible: Collection[int | None]) -> Iterator[CacheTensor]:
    for i, layer in enumerate(getattr(cache, "layers", ())):
        for role, x in (("key", getattr(layer, "keys", None)), ("value", getattr(layer, "values", None))):
            if isinstance(x, torch.Tensor) and x.dim() == 4:
                window = getattr(layer, "sliding_window", None)
                yield CacheTensor(i, role, x.shape[1], x.shape[3], x.dtype, window, i in compressible)


def _holds_square(gm: GraphModule) -> bool:
    """Whether a graph of the traced prompt makes a tensor of the square of its length, such as a mask."""
    values = (node.meta.get("val", node.meta.get("example_value")) for node in gm.graph.nodes)
    ends = ([_compat.symbols.hint(size) for size in x.shape[-2:]] for x in values if isinstance(x, torch.Tensor))
    return [_TRACED[CONTEXT]] * 2 in ends


def _uncompiled_prompts(model: Any, window: int) -> tuple[sympy.Expr, sympy.Expr]:
    """Activations of a prompt that is shorter than a window, if there is one, and of any prompt.

    transformers masks the layers that slide in no shorter prompt than their window.
    """
    if window <= _PROBES[0]:
        prompt = _prompt(model, _PROBES, masked=False)
        return prompt, prompt
    short = _prompt(model, (window // 4, window // 2), masked=False)
    long = _prompt(model, (window, 2 * window), masked=False)
    return short, sympy.Piecewise((short, sympy.Lt(CONTEXT, window)), (long, True))


def _prompt(model: Any, probes: tuple[int, int], masked: bool) -> sympy.Expr:
    """Activations of a prompt, from those of two lengths."""
    one, two = (
        sympy.interpolate([(0, 0), *((n, _peak(model, batch, n, masked=masked)) for n in probes)], CONTEXT)
        for batch in (1, 2)
    )
    return sympy.expand(one + (BATCH - 1) * (two - one))  # some of it, such as rotary angles, is for all rows


def _step(model: Any) -> sympy.Expr:
    one, two = (_peak(model, batch, 1, past=_PROBES[0]) for batch in (1, 2))
    return one + (BATCH - 1) * (two - one)


def _peak(model: Any, batch: int, tokens: int, past: int = 0, masked: bool = False) -> int:
    """Bytes that stand at the worst moment of a forward, without the cache that it leaves behind."""
    cache = forward(model, batch, past).past_key_values if past else None
    with LiveBytes() as meter:
        result = forward(model, batch, tokens, cache, masked=masked)
    left = result.past_key_values
    return meter.peak - sum(x.untyped_storage().nbytes() for x in _tensors(left))


def _tensors(cache: Any) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        yield from (x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None)
