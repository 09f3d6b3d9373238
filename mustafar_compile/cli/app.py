"""``mustafar``: what it is made of."""

from __future__ import annotations

from importlib import import_module

import typer

COMMANDS = ("explain", "plan", "generate", "chat", "bench", "calibrate")
"""Each is the function of this name, in the module of this name."""

app = typer.Typer(
    name="mustafar",
    help="Compressed KV caches for decoder language models: look, plan, measure, generate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _name in COMMANDS:
    app.command(_name)(getattr(import_module(f"{__package__}.{_name}"), _name))


def main() -> None:
    """Run the command line. Exits with 0 where all went well, 1 where a command failed, 2 where it was misused."""
    app()
