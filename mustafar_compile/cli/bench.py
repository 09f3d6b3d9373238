"""``mustafar bench MODEL``"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .generating import Run, run
from .models import DeviceOption, DtypeOption, ModelArgument, check_room, device_of, load_model, running_dtype
from .output import JsonOption, console, print_json, quiet, table
from .settings import with_settings

_CALLS = 2  # of ``generate``: the first compiles


@with_settings
def bench(
    model: ModelArgument,
    settings: dict[str, Any],
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, at random.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=3, help="Tokens to generate.")] = 32,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure generate() here: compiled with a dense cache, and with a compressed one.

    Dense is what transformers compiles by itself on a GPU (a static cache), elsewhere model.compile().
    """
    import torch

    from ..hugging_face import prepare

    place = device_of(device)
    with quiet():
        loaded = load_model(model, place, running_dtype(dtype, place))
        check_room(loaded, context, new_tokens)
        torch.manual_seed(0)
        ids = torch.randint(1, loaded.config.get_text_config().vocab_size, (batch, context), device=place)
        _compile_dense(loaded)
        rows = {"dense": _measured(loaded, ids, new_tokens)}
        torch._dynamo.reset()
        prepare(loaded, options=settings)
        rows["compressed"] = _measured(loaded, ids, new_tokens)
    asked = {"batch": batch, "context": context, "new_tokens": new_tokens, "device": str(place)}
    if as_json:
        print_json({"model": model, **asked, **rows})
        return
    title = f"{model}: {batch} x {context} tokens and {new_tokens} new ones on {place}, {loaded.dtype}"
    columns = ("", ">a step", ">faster", ">tokens/s", ">first token", ">first call", ">cache", ">of dense", ">peak")
    console().print(table(title, columns, [_cells(way, row, rows["dense"]) for way, row in rows.items()]))


def _compile_dense(model: Any) -> None:
    from .. import _compat

    if model.device.type == "cuda" and _compat.models.takes_static_cache(model):
        model.generation_config.cache_implementation = "static"  # which transformers compiles by itself
    else:
        model.compile()


def _measured(model: Any, ids: Any, new_tokens: int) -> dict[str, Any]:
    runs: list[Run] = [run(model, ids, new_tokens=new_tokens, stop=False)[0] for _ in range(_CALLS)]
    first, last = runs[0], runs[-1]
    return {
        "step_seconds": last.step_seconds,
        "tokens_per_second": len(ids) / last.step_seconds,
        "first_token_seconds": last.first_seconds,
        "first_call_first_token_seconds": first.first_seconds,
        "cache": last.cache,
        "peak_bytes": last.peak_bytes,
    }


def _cells(way: str, row: dict[str, Any], dense: dict[str, Any]) -> tuple[str, ...]:
    from ..reporting.text import bytes_text

    cache = row["cache"] or {"stored_bytes": 0, "dense_bytes": 1}
    return (
        way,
        f"{1e3 * row['step_seconds']:.2f} ms",
        f"{dense['step_seconds'] / row['step_seconds']:.2f} x",
        f"{row['tokens_per_second']:.1f}",
        f"{1e3 * row['first_token_seconds']:.0f} ms",
        f"{row['first_call_first_token_seconds']:.1f} s",
        bytes_text(cache["stored_bytes"]),
        f"{cache['stored_bytes'] / cache['dense_bytes']:.1%}",
        bytes_text(row["peak_bytes"]) if row["peak_bytes"] else "-",
    )
