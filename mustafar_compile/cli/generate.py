"""``mustafar generate MODEL``"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from .generating import Run, run
from .models import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    PromptOption,
    device_of,
    encode,
    load_model,
    load_tokenizer,
    read_prompt,
    running_dtype,
)
from .output import JsonOption, console, print_json, quiet, table
from .settings import with_settings
from .streaming import Columns, Stream


@with_settings
def generate(
    model: ModelArgument,
    prompt: PromptOption,
    settings: dict[str, Any],
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 128,
    compare: Annotated[bool, typer.Option("--compare", help="Generate with a dense cache, too, side by side.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text over a compressed cache, printing it as it comes. Greedy.

    The first tokens take long: they wait for the compiler. Dense runs as it is. What it cost goes to standard error.
    """
    text, place = read_prompt(prompt), device_of(device)
    from ..hugging_face import prepare

    with quiet():
        tokenizer = load_tokenizer(model)
        loaded = load_model(model, place, running_dtype(dtype, place))
        ids = encode(text, tokenizer, loaded, new_tokens)
        runs = {}
        with Columns(["dense", "compressed"]) if compare and not as_json else Stream(silent=as_json) as shown:
            if compare:
                runs["dense"] = _run("dense", loaded, tokenizer, ids, new_tokens, shown)
            prepare(loaded, options=settings)
            runs["compressed"] = _run("compressed", loaded, tokenizer, ids, new_tokens, shown)
    if as_json:
        texts = {way: {"text": _text(tokenizer, run.tokens)} | asdict(run) for way, run in runs.items()}
        print_json({"model": model, "prompt_tokens": ids.shape[1], **texts})
    else:
        rows = [_row(way, run) for way, run in runs.items()]
        console(err=True).print(table("", ("", ">tokens", ">cache", ">of dense", ">a token"), rows))


def _run(way: str, model: Any, tokenizer: Any, ids: Any, new_tokens: int, shown: Columns | Stream) -> Run:
    so_far: list[int] = []

    def on_token(new: list[int]) -> None:
        so_far.extend(new)
        shown.update(_text(tokenizer, so_far), way)

    return run(model, ids, new_tokens=new_tokens, on_token=on_token)[0]


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _row(way: str, run: Run) -> tuple[str, ...]:
    from ..reporting.text import bytes_text

    stored, dense = (run.cache["stored_bytes"], run.cache["dense_bytes"]) if run.cache else (0, 0)
    share = f"{stored / dense:.1%}" if dense else "-"
    return way, str(len(run.tokens)), bytes_text(stored), share, f"{1e3 * run.step_seconds:.1f} ms"
