"""An option for each field of ``Settings``, made of the field: a new setting needs no line here."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, get_type_hints

import typer

from ..lowering.format import CODES
from ..lowering.strategies import strategies_of
from ..settings import PRESETS, Settings, read_options, setting_names

_SCALARS = (bool, int, float, str)
_HINTS = get_type_hints(Settings)
_NAMES: dict[str, list[str]] = {
    "preset": list(PRESETS),
    **{f"{role}_code": list(CODES) for role in ("key", "value")},
    **{f"{role}_strategy": strategies_of(role) for role in ("key", "value")},
}
"""What a shell suggests for a setting."""

_TOGETHER = {
    "preset": f"Settings that go well together: {', '.join(PRESETS)}. What is given beside it goes before it.",
    "budget": "A file that `mustafar calibrate` wrote: settings by layer. What is given beside it goes before it.",
}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """``command(..., settings)`` with an option for each setting in place of ``settings``: a dict of those given.

    A value that is not accepted is an error of use, before the command runs.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    texts = _TOGETHER | _texts()
    options = [_option(name, texts.get(name, "")) for name in (*_TOGETHER, *setting_names())]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        texts = {option.name: given.pop(option.name) for option in options}
        settings = {name: option_value(name, text) for name, text in texts.items() if text is not None}
        try:
            read_options(None, settings)
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error)) from error
        command(**given, settings=settings)

    parameters = [parameter for parameter in own if parameter.name != "settings"] + options
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _option(name: str, text: str) -> inspect.Parameter:
    hint = _HINTS.get(name, str)
    kind: Any = (hint if hint in _SCALARS else str) | None
    names = _NAMES.get(name)
    shown: dict[str, Any] = {"help": text, "rich_help_panel": "Settings", "show_default": False}
    shown |= {"autocompletion": lambda: names} if names else {}
    annotation = Annotated[kind, typer.Option(**shown)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _texts() -> dict[str, str]:
    """What the docstring of ``Settings`` says of each field."""
    found = re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", inspect.getdoc(Settings) or "", re.MULTILINE | re.DOTALL)
    return {name: f"{text[0].upper()}{' '.join(text[1:].split())}" for name, text in found}


def option_value(name: str, given: Any) -> Any:
    """A value as it was given, of a setting that is no scalar as JSON: ``[0, 1]``, or without brackets ``0,1``.

    One that may differ by layer is that of all where it is alone.
    """
    hint = _HINTS.get(name, str)
    if hint in _SCALARS:
        return given
    whole = hint is Any or given.lstrip().startswith(("[", "{"))
    for text in (given, f"[{given}]") if whole else (f"[{given}]",):
        with suppress(json.JSONDecodeError):
            return json.loads(text)
    return given
