"""What rows take of a device's memory, from the config alone."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterable

from shapes import DTYPE, config_of

from mustafar_compile.planning.footprint import Footprint, measure
from mustafar_compile.planning.memory import Plan, compressed_plan, dense_plan

from .case import LARGEST, Case, options

_OF_LOSS = 6 * 10**9
_MARGIN = 1.1, 2 * 10**9
"""Over what is planned: dense masks and copies of a peer; what CUDA, libraries and graphs hold."""

_planning = threading.Lock()


def plan_ahead(cases: Iterable[Case]) -> None:
    """Find what plans need, so that no device waits for it: some ten seconds for a model."""
    for case in cases:
        if case.measure != "loss":
            _footprint(case.shape, case.layers)


def planned(case: Case, memory: int) -> int:
    """The batch that ``mustafar plan`` foretells. For a single step a prompt needs no room."""
    return plan_of(case).largest_batch(case.context, memory)


def needed(case: Case, memory: int) -> int:
    """Bytes to set aside for a row. memory: of its card, which the largest batch fills."""
    if case.batch == LARGEST:
        return memory
    if case.measure == "loss":
        return _OF_LOSS
    share, fixed = _MARGIN
    return int(share * plan_of(case).peak(int(case.batch), case.context)) + fixed


def plan_of(case: Case) -> Plan:
    """What a case takes, by batch and context."""
    footprint = _footprint(case.shape, case.layers)
    ours = case.is_ours or case.way == "snapkv"
    new = case.new_tokens or 1
    plan = compressed_plan(footprint, options(case.setting), new) if ours else dense_plan(footprint, new)
    return Plan({"steps": plan.phases["steps"]}) if case.measure == "step" else plan


def weights_of(case: Case) -> int:
    """Bytes of the weights."""
    return _footprint(case.shape, case.layers).weights


def _footprint(shape: str, layers: int) -> Footprint:
    with _planning, warnings.catch_warnings():  # modes of torch and filters of warnings are for one thread at a time
        warnings.simplefilter("ignore")
        return _measured(shape, layers)


@functools.lru_cache
def _measured(shape: str, layers: int) -> Footprint:
    changes = {"num_hidden_layers": layers} if layers else {}
    return measure(config_of(shape, 1024, **changes), DTYPE)
