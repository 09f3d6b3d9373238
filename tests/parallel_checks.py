"""What ranks of a process group do in ``test_parallel.py``, each of them in a process of its own."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_reduce

from compilers import without_compiler
from models import TupleModel, hf_model, prompt
from mustafar_compile import _compat, cache_stats, explain, load_sharded, save_sharded
from mustafar_compile.calling.watch import Watch
from mustafar_compile.lowering import builds
from ranks import device, printed_by, sharded
from stand_in_graphs import record_on_a_cpu

EXAMPLE = Path(__file__).parents[1] / "examples" / "tensor_parallel.py"
WINDOW = 4
NEW = 8
SHORT = 3
"""Seconds that a rank waits for one that does not come."""


def options(sparsity: float) -> dict[str, Any]:
    builds.why_not = lambda: "the tests ask for PyTorch"
    return {"key_sparsity": sparsity, "value_sparsity": sparsity, "window": WINDOW}


def tokens_of(family: str, cache: str, sparsity: float, compiler=without_compiler, **changes: Any) -> tuple:
    """Of a sharded HF model: tokens, phases of layers, bytes of the cache of this rank and of all, how steps run."""
    inputs = {name: x.to(device()) for name, x in prompt(padded=True).items()}
    how = inputs | {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    model = sharded(family, **changes)
    if cache == "static":
        how["cache_implementation"] = "static"
    with compiler(), explain() as report:
        model.compile(backend="mustafar", fullgraph=True, options=options(sparsity))
        out = model.generate(**how)
    sizes = [cache_stats(out.past_key_values, group=group).stored_bytes for group in (None, dist.group.WORLD)]
    return out.sequences.cpu(), [entry.phases for entry in report.matched], sizes, report.launching


def example() -> Any:
    """The example as a module. A benchmark has the same name."""
    sys.path.append(str(EXAMPLE.parent))
    spec = spec_from_file_location("parallel_example", EXAMPLE)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_loop(sparsity: float) -> tuple:
    """New tokens of slices of a model in a loop of our own, and the phases of its layers."""
    ids, loop = prompt()["input_ids"], example()
    model = loop.ShardedLlama(hf_model(num_hidden_layers=1), len(ids), ids.shape[1] + NEW)
    with without_compiler(), explain() as report:
        step = torch.compile(model, backend="mustafar", fullgraph=True, dynamic=False, options=options(sparsity))
        tokens = loop.generate(step, ids, NEW)
    return torch.cat([ids, tokens], 1), [entry.phases for entry in report.matched]


def recorded() -> tuple:
    """As ``tokens_of``, with decode steps recorded; how often that was, and the timeouts of watched replays."""
    watched: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compat.distributed, "backend_of", lambda name, device: "nccl")
        patch.setattr(Watch, "__call__", lambda watch: watched.append(watch.timeout))
        made = record_on_a_cpu(patch)
        return *tokens_of("llama", "static", 0.7, num_hidden_layers=1), len(made), watched


class Summing(TupleModel):
    """A layer whose result is summed over ``group``."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group = group

    def step(self, x, past):
        out, past = super().step(x, past)
        return all_reduce(out, "sum", self.group), past


def _step(group: Any = None, **changes: Any):
    model = Summing(group or dist.group.WORLD).to(device())
    return torch.compile(model.step, backend="mustafar", fullgraph=True, options=options(0.5) | changes)


def x() -> torch.Tensor:
    return torch.ones(2, 6, 32, device=device())


def not_recorded() -> list[str]:
    """What the report says of decode steps."""
    with pytest.MonkeyPatch.context() as patch, without_compiler(), explain() as report:
        record_on_a_cpu(patch)
        step = _step()
        _, past = step(x(), None)
        step(x()[:, :1], past)
    return report.launching


def other_settings() -> None:
    with without_compiler():
        _step(key_sparsity=0.5 + 0.2 * dist.get_rank())(x(), None)


def heads_of_ranks() -> None:
    with without_compiler():
        _step(key_sparsity={"default": {0: 0.5, "default": 0.7}})(x(), None)


def a_refused_setting() -> None:
    with without_compiler():
        _step(window=4 - 4 * dist.get_rank())(x(), None)


def another_reason() -> None:
    grad = torch.enable_grad() if dist.get_rank() else nullcontext()
    with without_compiler(), grad:
        _step()(x(), None)


def another_graph() -> None:
    def step(x, past):
        out, past = model.step(x, past)
        return all_reduce(out, "sum", model.group) if dist.get_rank() else out, past

    model = Summing(dist.group.WORLD).to(device())
    with without_compiler():
        torch.compile(step, backend="mustafar", options=options(0.5))(x(), None)


def the_same_reason() -> list[str]:
    with without_compiler(), torch.enable_grad(), explain() as report:
        _step()(x(), None)
    return [entry.reason for entry in report.missed]


def a_silent_rank() -> tuple:
    """The error of the rank that compiles, and how long it took."""
    group = dist.new_group(timeout=timedelta(seconds=SHORT))
    start, error = time.monotonic(), ""
    if dist.get_rank() == 0:
        with without_compiler(), pytest.raises(Exception, match="RanksDisagreeError") as caught:
            _step(group)(x(), None)
        error = str(caught.value)
    return error, time.monotonic() - start


def parts_on_disk() -> tuple:
    """The cache as saved and as loaded, and the error of another sharding."""
    with without_compiler():
        _, past = _step()(x() * (1 + dist.get_rank()), None)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    save_sharded(past, folder[0])
    loaded = load_sharded(folder[0])
    same = [torch.equal(a.dense(), b.dense()) for a, b in zip(past, loaded, strict=True)]
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    with pytest.raises(Exception, match="has no part") as caught:
        load_sharded(folder[0], alone)
    return same, str(caught.value)


def one_report() -> list[str]:
    """What is printed of reports that are the same, and of reports that are not."""
    with without_compiler(), explain() as report:
        _step()(x(), None)
    same = printed_by(lambda: report.print_once(dist.group.WORLD))
    report.notices.append(f"of rank {dist.get_rank()}")
    return [same, printed_by(lambda: report.print_once(dist.group.WORLD))]


def a_killed_rank() -> tuple:
    """What a rank gets whose peer ends, and how long that took. It is the last check: nothing works afterwards."""
    start, error = time.monotonic(), ""
    with without_compiler():
        step = _step(dist.new_group(timeout=timedelta(seconds=SHORT)))
        _, past = step(x(), None)
        if dist.get_rank():
            os._exit(0)
        with pytest.raises(Exception) as caught:  # noqa: PT011  (ours, or that of the collective)
            step(x()[:, :1], past)
        error = str(caught.value)
    return error, time.monotonic() - start


def a_long_sleep() -> None:
    time.sleep(1000)
