"""Ranks that run parts of one model agree on what becomes of its graphs, before one of them waits for another.

They tell each other through the store of their process group, which is not a collective: a rank that never gets here,
or calls something else, cannot be taken for one that agrees.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch.fx import GraphModule

from . import _compat
from .digest import code_digest
from .errors import RanksDisagreeError, UnknownHeadError
from .patterns.graph.nodes import is_collective
from .patterns.match import Match, NoMatch
from .settings import Settings

Statement = dict[str, str]
"""What a rank says of a graph, by subject."""

_PAUSE = 0.005
"""Seconds between two looks at the store. Its own way to wait would keep it from the threads of the process group."""

_counts: Counter[str] = Counter()
"""How many graphs were compiled for each process group."""


@contextmanager
def agreeing(gm: GraphModule, inputs: Sequence[Any]) -> Iterator[Statement]:
    """Where ``gm`` waits for other ranks, they agree at the end of the block, or learn of the error that ends it.

    Yields what this rank says, to be added to. Raises RanksDisagreeError where another rank says something else, or
    nothing within the timeout of the process group.
    """
    groups = groups_of(gm, inputs)
    versions = f"torch {torch.__version__}, mustafar_compile {code_digest()[:12]}"
    said = {"versions": versions, "collectives": _collectives(gm)}
    try:
        yield said
    except Exception as error:
        _tell(groups, {"error": f"{type(error).__name__}: {error}"})
        raise
    for group, place in _tell(groups, said):
        _compare(_heard(group, place))


def of_options(settings: Settings, inductor: Mapping[str, Any]) -> Statement:
    """What there is to say of options. Those of Inductor may be objects, which are not the same anywhere else."""
    told = {k: repr(v) if isinstance(v, bool | int | float | str) else type(v).__name__ for k, v in inductor.items()}
    return {name: repr(value) for name, value in vars(settings).items()} | told


def of_attention(found: Iterable[Match | NoMatch]) -> Statement:
    """What there is to say of the attention layers of a graph."""
    return {
        f"attention {i} ({m.attention.name or 'unnamed'})": m.reason
        if isinstance(m, NoMatch)
        else f"{m.form}, {m.phase}, {' and '.join(format.encode() for format in m.formats)}"
        for i, m in enumerate(found)
    }


def groups_of(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The process groups of several ranks that a Dynamo graph may wait for, or whose tensors it takes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    given = [x for node in gm.graph.nodes if node.op.startswith("call") for x in (*node.args, *node.kwargs.values())]
    named = {x for node in gm.graph.nodes if is_collective(node) for x in node.args if isinstance(x, str)}
    groups = [group for x in (*inputs, *given) for group in _compat.distributed.groups_in(x)]
    groups += [group for name in sorted(named) if (group := _compat.distributed.group_named(name)) is not None]
    waiting = {g.group_name: g for g in groups if g.size() > 1 and torch.distributed.get_backend(g) != "fake"}
    return [waiting[name] for name in sorted(waiting)]


def check_heads(settings: Settings, gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Raise UnknownHeadError where settings go by KV head and ranks have some of the heads each.

    A rank knows its heads by their numbers among its own, and not which of the model's they are.
    """
    named = settings.by_head()
    if named and (groups := groups_of(gm, inputs)):
        raise UnknownHeadError(
            f"{' and '.join(named)} by KV head is given for a graph of which {groups[0].size()} ranks have a part "
            "each. A rank does not know which of the heads are its own; accepted is what all heads of a layer share"
        )


def _collectives(gm: GraphModule) -> str:
    """Those of a graph in order: "12 all_reduce, 1 all_gather"."""
    names = [str(node.target).rpartition("c10d_functional.")[2] for node in gm.graph.nodes if is_collective(node)]
    return ", ".join(f"{len(list(same))} {name}" for name, same in groupby(names))


def _tell(groups: Iterable[Any], said: Statement) -> list[tuple[Any, str]]:
    """Say it to all groups. Returns each group with the place of what is said there."""
    places = []
    for group in groups:
        place = f"mustafar/{_counts[group.group_name]}"
        _counts[group.group_name] += 1
        _compat.distributed.store_of(group).set(f"{place}/{group.rank()}", json.dumps(said))
        places.append((group, place))
    return places


def _heard(group: Any, place: str) -> dict[int, Statement]:
    """What the ranks of ``group`` say, by their number in it. Raises RanksDisagreeError where one says nothing."""
    store, timeout = _compat.distributed.store_of(group), _compat.distributed.timeout_of(group)
    end = time.monotonic() + timeout
    heard: dict[int, Statement] = {}
    while True:
        for rank in set(range(group.size())) - heard.keys():
            if store.check([f"{place}/{rank}"]):
                heard[rank] = json.loads(store.get(f"{place}/{rank}"))
        silent = sorted(set(range(group.size())) - heard.keys())
        if not silent:
            return heard
        if time.monotonic() > end:
            raise RanksDisagreeError(
                f"rank {group.rank()} compiled a graph that waits for other ranks, and within {timeout:.0f} s, the "
                f"timeout of the process group, rank {', '.join(map(str, silent))} compiled none: it failed, ended or "
                "was given other inputs. All ranks must call the same model with inputs of the same shapes"
            )
        time.sleep(_PAUSE)


def _compare(heard: dict[int, Statement]) -> None:
    """Raise RanksDisagreeError unless all ranks say the same."""
    for rank, said in heard.items():
        if "error" in said:
            error = said["error"]
            raise RanksDisagreeError(f"rank {rank} could not compile a graph that waits for other ranks: {error}")
        different = [subject for subject in heard[0] | said if heard[0].get(subject) != said.get(subject)]
        if different:
            subject, more = different[0], len(different) - 1
            first, other = (statement.get(subject, "none") for statement in (heard[0], said))
            raise RanksDisagreeError(
                "the ranks of a process group would wait for each other in different graphs. They differ in "
                f"{subject}{f' (and in {more} more)' if more else ''}. Rank 0: {first}. Rank {rank}: {other}. Compile "
                "the same model with the same options and versions on all of them"
            )
