"""Process groups. Torch may be built without them, and they take a while to load, so names are probed where used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from .probe import probe


def groups_in(x: Any) -> Sequence[Any]:
    """The process groups of a group, a device mesh or a DTensor, none of anything else."""
    distributed = torch.distributed
    if isinstance(x, distributed.ProcessGroup):
        return [x]
    mesh = getattr(x, "device_mesh", x)
    return mesh.get_all_groups() if isinstance(mesh, distributed.DeviceMesh) else []


def group_named(name: str) -> Any:
    """The process group of a name, None where there is none."""
    with suppress(ValueError, LookupError, RuntimeError):
        return probe("torch.distributed.distributed_c10d", "_resolve_process_group")(name)
    return None


def backend_of(name: str, device: torch.device) -> str | None:
    """What carries out the collectives of a group on ``device``, such as "nccl"; None where there is no such group."""
    group = group_named(name)
    return None if group is None else group._get_backend(device).name()


def store_of(group: Any) -> Any:
    """The store by which the ranks of ``group`` found each other."""
    return probe("torch.distributed.distributed_c10d", "_get_process_group_store")(group)


def timeout_of(group: Any) -> float:
    """Seconds that a rank of ``group`` waits for others at most."""
    backends = [group._get_backend(device) for device in group._device_types]
    timeouts = [backend.options._timeout for backend in backends if hasattr(backend, "options")]
    return min(timeouts, default=torch.distributed.default_pg_timeout).total_seconds()
