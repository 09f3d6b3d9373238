"""Looking up what a supported version has."""

from __future__ import annotations

import importlib
from typing import Any

import torch

SUPPORTED = "torch 2.11 to 2.15 and transformers 5.17 to 5.24"


def probe(module: str, name: str) -> Any:
    """An attribute of a module. Raises ImportError that says which versions are supported."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"mustafar_compile needs {module}.{name}, which torch {torch.__version__} does not have; "
            f"supported: {SUPPORTED}"
        ) from error
