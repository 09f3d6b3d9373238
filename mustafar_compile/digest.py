"""What compiled code depends on beside its graph: the code of this package."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from . import lowering, patterns


@functools.cache
def code_digest() -> str:
    """A hash of all sources of the package, templates included."""
    folders = Path(__file__).parent, *(Path(package.__path__[0]) for package in (lowering, patterns))
    files = {file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".jinja")}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
