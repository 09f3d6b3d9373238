"""Questions that are asked about nodes everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from .symbols import same_size

_TORCH = Path(torch.__file__).parent
_COLLECTIVES = ("_c10d_functional", "c10d", "_dtensor", "symm_mem", "redistribute", "full_tensor")
_ATTENTION = ("scaled_dot_product_attention", "flex_attention", "softmax")


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a node that holds a tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def is_single(value: Any) -> bool:
    """Whether ``value`` is a node that holds a tensor of one element."""
    return is_tensor(value) and all(same_size(size, 1) for size in value.meta["val"].shape)


def symbolic_size(graph: Graph, node: Node, dim: int) -> Node:
    """A new node that holds a size of a tensor, where the graph inserts."""
    size = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
    size.meta["val"] = node.meta["val"].shape[dim]
    return size


def computed_alike(a: Any, b: Any) -> bool:
    """Whether two values of a functional graph are known to be equal: the same ops make them of the same values."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(computed_alike, a, b))
    if not (isinstance(a, Node) and is_call(b, a.target)):
        return a == b or same_size(a, b)
    random = torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ())
    return a is b or (not random and a.kwargs == b.kwargs and computed_alike(a.args, b.args))


def drop_meta(graph: Graph) -> None:
    """Let go of what is noted about nodes: fake tensors and with them all that was traced."""
    for node in graph.nodes:
        node.meta.clear()


def may_be_attention(node: Node) -> bool:
    """Whether a call of Dynamo's graph is attention or a part of it that tells it, by its name alone."""
    return node.op.startswith("call") and any(name in str(node.target) for name in _ATTENTION)


def is_collective(node: Node) -> bool:
    """Whether a node of any graph waits for other ranks. A DTensor's change of layout may do so."""
    waits = str(node.target).startswith(_COLLECTIVES) and "wait_tensor" not in str(node.target)
    return node.op.startswith("call") and waits


def source_line(node: Node) -> str:
    """The line outside of torch that ``node`` comes from, as "file.py:12"; "" where unknown."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    outside = [(file, line) for file, line in lines if not Path(file).is_relative_to(_TORCH)]
    return f"{Path(outside[-1][0]).name}:{outside[-1][1]}" if outside else ""


@contextmanager
def located(node: Node) -> Iterator[None]:
    """An error within gets a note of the line that ``node`` comes from, "at file.py:12", unless it has one."""
    try:
        yield
    except Exception as error:
        line = source_line(node)
        if line and not hasattr(error, "__notes__"):
            error.add_note(f"at {line}")
        raise
