"""Kernels from the templates in ``templates/``: a template rendered for given constants is a Python module."""

from __future__ import annotations

import functools
import hashlib
import linecache
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2


def _dtypes(results: str) -> str:
    """The result types of an inline-assembly block, as a tuple in kernel source: "rf" -> (gl.int32, gl.float32)."""
    kinds = {"r": "gl.int32", "f": "gl.float32"}
    return "(" + ", ".join(kinds[kind] for kind in results) + ")" if len(results) > 1 else kinds[results]


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), undefined=jinja2.StrictUndefined
    )
    environment.filters["dtypes"] = _dtypes
    return environment


def source(template: str, **constants: Any) -> str:
    """The source text of ``templates/<template>.py.jinja`` for these constants."""
    return _environment().get_template(f"{template}.py.jinja").render(**constants)


def kernels(template: str, **constants: Any) -> ModuleType:
    """The module that a template makes; its jitted functions keep their own compiled variants."""
    text = source(template, **constants)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    filename = f"<mustafar {template} {digest}>"
    # Triton reads the source of a function back; linecache serves it without a file.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    module = ModuleType(f"{__package__}.templates.{template}_{digest}")
    module.__dict__["__file__"] = filename
    exec(compile(text, filename, "exec"), module.__dict__)
    return module
