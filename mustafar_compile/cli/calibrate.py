"""``mustafar calibrate MODEL``"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..lowering.format import CODES
from .models import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    device_of,
    encode,
    load_model,
    load_tokenizer,
    read_prompt,
    running_dtype,
)
from .output import JsonOption, fail, first_line, print_json, quiet


def calibrate(
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Option(help="A text such as the model will read. May be given several times.")],
    share: Annotated[float, typer.Option("--bytes", help="Bytes stored over dense bytes, in (0, 1].")] = 0.375,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("budget.json"),
    codes: Annotated[str, typer.Option(help="Codes that may be used.")] = ",".join(CODES),
    window: Annotated[int, typer.Option(min=1, help="Latest tokens that stay dense and exact.")] = 32,
    by_head: Annotated[
        bool, typer.Option("--by-head", help="Also over the KV heads of a layer, in two groups.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=64, help="Of each text so many are read, from its start.")] = 1024,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Spread a budget of bytes over layers, keys and values, and codes, by what texts of yours lose.

    All commands take the file as --budget, and so do prepare and torch.compile, as the option budget.
    """
    texts, place = [read_prompt(path) for path in prompts], device_of(device)
    from ..calibration.calibrate import calibrate as spread

    if not out.parent.is_dir():
        fail(f"--out {out}: there is no folder {out.parent}")
    with quiet():
        tokenizer = load_tokenizer(model)
        loaded = load_model(model, place, running_dtype(dtype, place))
        read = [encode(text, tokenizer, loaded, 0, most=tokens)[0] for text in texts]
    try:
        budget = spread(loaded, read, bytes=share, codes=codes.split(","), window=window, by_head=by_head)
    except (ValueError, NotImplementedError) as error:
        fail(first_line(error))
    budget.save(out)
    if as_json:
        print_json({"model": model, "out": str(out), **asdict(budget)})
    else:
        typer.echo(f"{budget}\nWritten to {out}")
