"""``mustafar explain MODEL``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any

import typer

from ..errors import MustafarError
from .models import DeviceOption, DtypeOption, ModelArgument, config_dtype, device_of, read_config
from .output import JsonOption, console, fail, first_line, print_json, quiet, table
from .settings import with_settings


@with_settings
def explain(
    model: ModelArgument,
    settings: dict[str, Any],
    context: Annotated[int, typer.Option(min=32, help="Tokens of the prompt that is traced.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which layers are compressed, in which phases and by what code, and why the others are not.

    Only the config is read: weights are not downloaded, and no memory is taken for them. What is shown is what
    model.compile(backend="mustafar") does on this machine, with the model's default cache.
    """
    config, place = read_config(model), device_of(device)
    from ..planning.layers import explain_config
    from ..reporting.text import bytes_text

    element = config_dtype(dtype, config)
    try:
        with quiet():
            entries, report = explain_config(
                config, settings, batch=batch, context=context, dtype=element, device=place
            )
    except MustafarError as error:  # settings for other layers than there are
        fail(f"{model}: {error}")
    except Exception as error:  # whatever the model's code raises where it meets tensors without numbers
        fail(f"{model} cannot be traced without its weights: {type(error).__name__}: {first_line(error)}")
    if as_json:
        layers = [{name: value for name, value in asdict(e).items() if name != "function"} for e in entries]
        print_json({"model": model, "layers": layers, "notices": report.notices, "launching": report.launching})
        return
    compressed = [e for e in entries if not e.reason]
    dense, stored = sum(e.dense_bytes for e in entries), sum(e.stored_bytes for e in entries)
    title = f"{model}: {len(compressed)} of {len(entries)} attention layers compressed"
    columns = ("layers", "module", "cache", "compressed", "by", "keys kept", "values kept", ">dense", ">stored")
    out = console()
    out.print(table(title, columns, [_row(list(alike)) for _, alike in groupby(entries, _looks)]))
    sizes = f"{batch} x {context} tokens in {str(element).removeprefix('torch.')}"
    out.print(f"The cache after a prompt of {sizes} and one more: {bytes_text(stored)} of {bytes_text(dense)}")
    for line in (*report.launching, *(f"note: {notice}" for notice in report.notices)):
        out.print(line)


def _looks(entry: Any) -> tuple[Any, ...]:
    """What is shown of a layer, but its number."""
    name = entry.name.replace(f".{entry.layer}.", ".*.", 1)
    how = entry.phases, entry.reason, entry.kernels, entry.kept
    return name, entry.form, *how, entry.dense_bytes, entry.stored_bytes


def _row(alike: Sequence[Any]) -> tuple[str, ...]:
    """Layers that stand side by side and look alike, as one row."""
    from ..reporting.report import kept_of_each, verdict
    from ..reporting.text import bytes_text

    first, last = alike[0], alike[-1]
    numbers = "?" if first.layer is None else f"{first.layer}" if first is last else f"{first.layer}-{last.layer}"
    name = first.name if first is last else _looks(first)[0]
    each = "" if first is last else f"{len(alike)} x "
    sizes = (f"{each}{bytes_text(size)}" for size in (first.dense_bytes, first.stored_bytes))
    return numbers, name, first.form, verdict(first), first.kernels, *kept_of_each(first), *sizes
