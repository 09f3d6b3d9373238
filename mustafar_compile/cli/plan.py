"""``mustafar plan MODEL``"""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from ..errors import MustafarError
from ..settings import PRESETS
from .models import DtypeOption, ModelArgument, config_dtype, read_config
from .output import JsonOption, console, fail, first_line, print_json, quiet, table
from .settings import with_settings

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_COMPARED: dict[str, dict[str, Any]] = {
    "default, 0.5": {},
    "0.7": {"key_sparsity": 0.7, "value_sparsity": 0.7},
    **{f"preset {name}": {"preset": name} for name in PRESETS},
}


def read_bytes(text: str) -> int:
    """``80GiB`` -> 85899345920. Raises typer.BadParameter for other texts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.strip().upper())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size; accepted are such as 80GiB, 24GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


@with_settings
def plan(
    model: ModelArgument,
    settings: dict[str, Any],
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU, such as 80GiB or 24GB.")] = "80GiB",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 256,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the largest batch and context that fit into a GPU, dense and with each setting.

    Only the config is read, and no GPU is needed. Dense is a static cache; compressed is a growing one with a compiled
    prompt: model.compile(backend="mustafar"). Settings that are given are one more row.
    """
    memory, config = read_bytes(gpu_memory), read_config(model)
    from ..planning.footprint import measure
    from ..planning.memory import compressed_plan, dense_plan

    try:
        with quiet():
            footprint = measure(config, config_dtype(dtype, config))
    except Exception as error:  # whatever the model's code raises where it meets tensors without numbers
        fail(f"{model} cannot be measured without its weights: {type(error).__name__}: {first_line(error)}")
    plans = {"dense": dense_plan(footprint, new_tokens)}
    try:
        for name, options in (_COMPARED | ({"as given": settings} if settings else {})).items():
            plans[name] = compressed_plan(footprint, options, new_tokens)
    except MustafarError as error:  # settings for other layers or heads than there are
        fail(f"{model}: {error}")
    rows: list[dict[str, Any]] = [
        {
            "way": name,
            "peak_bytes": plan.peak(batch, context),
            "phases": plan.parts(batch, context),
            "largest_batch": plan.largest_batch(context, memory),
            "largest_context": plan.largest_context(batch, memory, footprint.positions),
        }
        for name, plan in plans.items()
    ]
    asked = {"batch": batch, "context": context, "new_tokens": new_tokens, "gpu_memory_bytes": memory}
    if as_json:
        ways = [row | {"formulas": plans[row["way"]].formulas()} for row in rows]
        print_json({"model": model, **asked, "ways": ways})
    else:
        _show(model, asked, rows, footprint.positions)


def _show(model: str, asked: dict[str, int], rows: list[dict[str, Any]], positions: int | None) -> None:
    from ..planning.memory import OUTSIDE
    from ..reporting.text import bytes_text

    batch, context = asked["batch"], asked["context"]
    columns = ("", ">weights", ">cache", ">prompt", ">peak", f">batch at {context}", f">context at batch {batch}")
    cells = []
    for row in rows:
        first, last = row["phases"]["prompt"], row["phases"]["steps"]
        sizes = (first["weights"], last["cache"], first["activations"], row["peak_bytes"])
        limit = " (model's limit)" if row["largest_context"] == positions else ""
        counts = (str(row["largest_batch"]), f"{row['largest_context']}{limit}")
        cells.append((row["way"], *map(bytes_text, sizes), *counts))
    out = console()
    title = f"{model}: {batch} x {context} tokens and {asked['new_tokens']} new ones; what fits into "
    out.print(table(title + bytes_text(asked["gpu_memory_bytes"]), columns, cells))
    out.print(
        f"peak: what torch allocates at most. Of the GPU, {bytes_text(OUTSIDE)} are left for CUDA itself. prompt: "
        "activations while the prompt is read."
    )
