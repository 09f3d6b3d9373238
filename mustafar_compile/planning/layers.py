"""What becomes of each layer of a model, traced without memory and without a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..backend import mustafar
from ..policy import check_layers, layers_of
from ..reporting.explain import explain
from ..reporting.report import Entry, Report
from ..settings import read_options
from .alike import Alike, leave_out_alike
from .fake import fake_model, forward, without_memory


def _as_it_is(gm: Any, example_inputs: Any) -> Any:
    return gm


def explain_config(
    config: Any,
    options: Mapping[str, Any],
    *,
    batch: int = 1,
    context: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    every_layer: bool = False,
    kept: int = 1,
    symbolic: bool = False,
    inner: Callable[..., Any] = _as_it_is,
) -> tuple[list[Entry], Report]:
    """What the backend does with a model of transformers: an entry for each attention layer, and the whole report.

    A prompt of ``context`` tokens and a decode step are traced with a growing cache, as ``model.compile`` would have
    it; the sizes of the entries are those after both. options: of the backend. every_layer: trace also those that are
    like another one. kept: else, so many of those that are alike. symbolic: batch and tokens of the prompt are symbols
    in its graph. inner: gets each graph, with its example inputs, and gives what is called. Raises ValueError for
    unknown options and for a config of no causal language model, UnknownLayerError for options that name a layer which
    it does not have, and what the model raises where it cannot be traced without its weights.
    """
    settings, _ = read_options(None, options)
    device = torch.device(device)
    backend = functools.partial(mustafar, options=dict(options), inner=inner)
    torch._dynamo.reset()
    with without_memory(), explain() as report:
        model = fake_model(config, dtype, device)
        check_layers(settings, layers_of(config))
        alike = [] if every_layer else leave_out_alike(model, lambda: forward(model, 1, 2), settings.of_layer, kept)
        compiled = torch.compile(model, backend=backend)
        past = getattr(forward(model, batch, context, of=compiled, symbolic=symbolic), "past_key_values", None)
        if past is not None:
            forward(model, batch, 1, past, of=compiled)
    torch._dynamo.reset()
    entries = [*report.matched, *report.missed]
    entries += [_repeated(entry, layer) for layer in alike for entry in entries if _is_in(entry, layer)]
    return sorted(entries, key=lambda entry: (-1 if entry.layer is None else entry.layer, entry.name)), report


def _is_in(entry: Entry, layer: Alike) -> bool:
    return f"{entry.name}.".startswith(f"{layer.path}.")


def _repeated(entry: Entry, layer: Alike) -> Entry:
    return replace(entry, layer=layer.number, name=entry.name.replace(layer.path, layer.own_path, 1))
