"""How a row is measured. Each process measures one, so that its memory is its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import decode_step
import torch
from shapes import build, config_of
from timing import DEVICE, ON_GPU, cold

import mustafar_compile
import turns
from mustafar_compile.policy import policy
from mustafar_compile.settings import read_options

from . import generating, losses
from .case import Case, options
from .fp8 import Fp8Decoder

Row = dict[str, Any]

_HAND_BUILT = "dense", "snapkv", "flashinfer fp8", "op"
_COMPILED = "ours", "compile", "prepared"
_PREFILLS = {"eager": "eager", "inductor": "hf", "compile": "ours"}
_FAMILIES = "llama", "mistral"
_WHOLE = 16  # tokens: a multiple of it leaves kernels their aligned loads


@torch.no_grad()
def figures(case: Case) -> Row:
    """The figures of a row; seconds: what measuring it took, of which so many waited or alone, and for the model.

    Raises what measuring raises, and RuntimeError where not all layers ran compressed.
    """
    cold()  # its buffer is there from now on, and no row's memory
    with turns.timed("all"):
        measured = _MEASURES[case.measure](case, options(case.setting) if case.setting else {})
    taken = {name: round(value, 1) for name, value in turns.seconds.items()}
    return measured | {"device": torch.cuda.get_device_name() if ON_GPU else "CPU", "seconds": taken}


def _fp8(model: Any, given: SimpleNamespace, _: Row) -> decode_step.Step:
    return decode_step.Step(Fp8Decoder(model, given.batch, given.context).step, {})


_PEERS = {"snapkv": decode_step.best_dense, "flashinfer fp8": _fp8}


def _step(case: Case, chosen: Row) -> Row:
    given = _sizes(case)
    if case.way == "snapkv":
        given.context = max(int(case.context * byte_share(case, chosen)) // _WHOLE, 1) * _WHOLE
    model = _model(case, given)
    if case.way in _HAND_BUILT and model.config.model_type not in _FAMILIES:
        raise ValueError(f"the hand-built step is one of {' and '.join(_FAMILIES)}, not of {model.config.model_type}")
    with _all_compressed(case, given.layers):
        step = (decode_step.DECODE | _PEERS)[case.way](model, given, chosen)
        row = decode_step.measured(step.call, given) | decode_step.held(given) | step.about
    speed = {"tokens_per_s": 1e3 * given.batch / row["ms"], "peak_GB": _peak(given)}
    profile = row.pop("profile")
    kernels = {name: us / 1e3 for name, (_, us) in profile["kernels"].items()}
    return row | speed | {"kernels": kernels, "busy_ms": profile["busy_ms"]}


def _first_token(case: Case, chosen: Row) -> Row:
    given = _sizes(case)
    model = _model(case, given)
    with _all_compressed(case, given.layers):
        row = decode_step.PREFILL[_PREFILLS[case.way]](model, given, chosen)
    return {"first_token_ms": row["ms"], "peak_GB": row["memory_GB"]}


def _generate(case: Case, chosen: Row) -> Row:
    given = _sizes(case)
    model = _model(case, given)
    with _all_compressed(case, given.layers):
        row = generating.measured(model, case, chosen, byte_share(case, chosen) if case.way == "snapkv" else 1)
    return row | {"peak_GB": _peak(given)}


def _loss(case: Case, chosen: Row) -> Row:
    return losses.measured(case, chosen)


_MEASURES = {"step": _step, "first token": _first_token, "generate": _generate, "loss": _loss}


def byte_share(case: Case, chosen: Row) -> float:
    """Stored bytes over dense ones, of a cache of ``case.context`` tokens with such options."""
    config = config_of(case.shape, case.context)
    heads, head_dim = config.num_key_value_heads, config.head_dim
    format_of = policy(read_options(None, chosen)[0])
    formats = [format_of(None, role, heads, head_dim, torch.bfloat16, DEVICE) for role in ("key", "value")]
    stored = sum(form.stored_bytes(1, heads, case.context, torch.bfloat16.itemsize) for form in formats)
    return stored / (2 * heads * case.context * head_dim * torch.bfloat16.itemsize)


def _sizes(case: Case) -> SimpleNamespace:
    """What ``decode_step`` wants to know."""
    taken = torch.cuda.memory_allocated() if ON_GPU else 0
    return SimpleNamespace(
        batch=case.batch,
        context=case.context,
        prompt=case.context,
        layers=case.layers,
        reserved=decode_step.reserved_bytes(),
        allocated=taken,
        profile=True,
    )


def _model(case: Case, given: SimpleNamespace) -> Any:
    changes = {"num_hidden_layers": case.layers} if case.layers else {}
    config = config_of(case.shape, case.context + case.new_tokens, **changes)
    given.layers = config.num_hidden_layers
    with turns.timed("model"):
        return build(config)


def _peak(given: SimpleNamespace) -> float:
    """GB that tensors took at most."""
    return (torch.cuda.max_memory_allocated() - given.allocated) / 1e9 if ON_GPU else 0.0


@contextlib.contextmanager
def _all_compressed(case: Case, layers: int) -> Iterator[None]:
    """Raises RuntimeError where a model that was compiled within it did not run compressed in all layers."""
    if case.way not in _COMPILED:
        yield
        return
    with mustafar_compile.explain() as report:
        yield
    if len(report.matched) != layers:
        raise RuntimeError(f"{len(report.matched)} of {layers} layers ran compressed:\n{report}")
