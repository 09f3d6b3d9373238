"""``mustafar chat MODEL``"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .generating import run
from .models import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    check_room,
    device_of,
    load_model,
    load_tokenizer,
    running_dtype,
)
from .output import JsonOption, print_json, quiet
from .settings import with_settings
from .streaming import Stream


@with_settings
def chat(
    model: ModelArgument,
    settings: dict[str, Any],
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a reply, at most.")] = 256,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model over a compressed cache that goes on from turn to turn.

    One line is one turn; an empty line or the end of the input ends it. With --json, a line for each reply. A model
    without a chat template continues the text.
    """
    place = device_of(device)
    with quiet():
        tokenizer = load_tokenizer(model)
        loaded = load_model(model, place, running_dtype(dtype, place))
        loaded.compile(backend="mustafar", options=settings)  # a growing cache, which a later turn continues
        talk = Conversation(loaded, tokenizer, new_tokens)
        while line := _line(ask=not as_json):
            with Stream(silent=as_json) as stream:
                reply = talk.say(line, stream)
            if as_json:
                print_json({"reply": reply, "tokens": talk.tokens})


def _line(ask: bool) -> str:
    """A line of the user's, "" at the end."""
    if ask and sys.stdin.isatty():
        typer.echo("> ", nl=False)
    return sys.stdin.readline().strip()


class Conversation:
    """Turns of one conversation, and the cache of what was said."""

    def __init__(self, model: Any, tokenizer: Any, new_tokens: int) -> None:
        self._model, self._tokenizer, self._new_tokens = model, tokenizer, new_tokens
        self._messages: list[dict[str, str]] = []
        self._said: list[int] = []  # tokens of which the cache holds keys and values
        self._cache: Any = None

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._said)

    def say(self, text: str, stream: Stream) -> str:
        """The model's reply, written to ``stream`` as it comes."""
        import torch

        self._messages.append({"role": "user", "content": text})
        ids = self._ids()
        check_room(self._model, len(ids), self._new_tokens)
        kept = _common(self._said, ids[:-1])  # the last token of a prompt is always read
        if self._cache is not None and kept < len(self._said):
            self._cache.crop(kept - len(self._said))  # that many tokens less
        given = torch.tensor([ids], device=self._model.device)
        so_far: list[int] = []

        def on_token(new: list[int]) -> None:
            so_far.extend(new)
            stream.update(self._tokenizer.decode(so_far, skip_special_tokens=True))

        made, out = run(self._model, given, new_tokens=self._new_tokens, on_token=on_token, cache=self._cache)
        self._cache, self._said = out.past_key_values, [*ids, *made.tokens[:-1]]
        reply = self._tokenizer.decode(made.tokens, skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": reply})
        return reply

    def _ids(self) -> list[int]:
        if self._tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in self._messages)
            return self._tokenizer(text, add_special_tokens=False).input_ids
        made = self._tokenizer.apply_chat_template(self._messages, add_generation_prompt=True, return_dict=True)
        return made["input_ids"]


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
