"""What the ranks of a process group have, in one place."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gathered(mine: T, group: Any) -> list[T]:
    """What each rank of ``group`` calls this with, in order. All must call it; ``mine`` can be pickled."""
    parts: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(parts, mine, group=group)
    return parts
