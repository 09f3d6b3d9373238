"""Calibrated budgets, as the package saves them: how keys and values of each layer are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CODES = {"none": "none", "int8": "int8", "int4 growing": "int4"}
"""Codes of the study that the backend has, and what it calls them."""


def by_layer(path: str, layers: int | None = None) -> list[dict[str, Any]]:
    """Fields of a case for each layer. Raises OSError, and ValueError where the file is for other layers or by head."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))["layers"]
    numbers = sorted(map(int, found))
    if layers is not None and numbers != list(range(layers)):
        raise ValueError(f"{path} has a budget for the layers {numbers}; the model has {layers}")
    if any(isinstance(stored, list) for layer in found.values() for stored in layer.values()):
        raise ValueError(f"{path} has a budget by KV head, which the study has no cases for; accepted is one by layer")
    names = {ours: name for name, ours in CODES.items()}
    return [
        {
            f"{role}_{name}": names[value] if name == "code" else value
            for role, stored in found[str(number)].items()
            for name, value in stored.items()
        }
        for number in numbers
    ]
