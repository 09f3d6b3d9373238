"""Sums over ranks: what the two exchanges of a layer take, however they are done.

    torchrun --nproc-per-node 2 benchmarks/all_reduce.py

nccl      what functional collectives do by default
one-shot  each rank reads the tensors of all others, over memory that they share: what ``--one-shot`` of
          tensor_parallel.py lets Inductor do
two-shot  each rank sums up its share and reads those of others

Times are of one of many in a CUDA graph, one after the other. Without a GPU there is only gloo.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from timing import DEVICE, ON_GPU, graphed, median_ms, parser, write
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce

from tensor_parallel import join, leave

NAME = "all_reduce"
_TIMES = 64
_ROWS = (1, 8, 32, 128)


def by_default(rows: int, width: int) -> Callable[[], Tensor]:
    """The sum of [rows, width] of each rank, by the library of the process group."""
    x = torch.ones(rows, width, dtype=torch.bfloat16, device=DEVICE)
    return lambda: all_reduce(x, "sum", dist.group.WORLD) + 0  # to be waited for


def over_shared_memory(op: str) -> Callable[[int, int], Callable[[], Tensor]]:
    """The same by an op of symmetric memory."""

    def prepared(rows: int, width: int) -> Callable[[], Tensor]:
        import torch.distributed._symmetric_memory as symmetric

        x = symmetric.empty(rows, width, dtype=torch.bfloat16, device=DEVICE).fill_(1)
        symmetric.rendezvous(x, dist.group.WORLD)
        return lambda: getattr(torch.ops.symm_mem, op)(x, "sum", dist.group.WORLD.group_name)

    return prepared


BY_LIBRARY = {"nccl" if ON_GPU else "gloo": by_default}
SHARED = {
    "one-shot": over_shared_memory("one_shot_all_reduce"),
    "two-shot": over_shared_memory("two_shot_all_reduce_"),
}


def microseconds(sum_up: Callable[[], Tensor]) -> float:
    """Of one sum."""

    def many() -> None:
        for _ in range(_TIMES):
            sum_up()

    sum_up()  # what it sets up cannot be recorded
    return 1e3 * median_ms(graphed(many), before=lambda: None) / _TIMES


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--width", type=int, default=4096, help="hidden size of the model")
    given = options.parse_args()
    join()
    rows = [
        {"rows": count, "KiB": count * given.width * 2 / 1024, "ranks": dist.get_world_size(), "way": way}
        | {"us": microseconds(prepared(count, given.width))}
        for count in _ROWS
        for way, prepared in (BY_LIBRARY | (SHARED if ON_GPU else {})).items()
    ]
    if dist.get_rank() == 0:
        write(NAME, rows)
    leave()


if __name__ == "__main__":
    with torch.no_grad():
        main()
