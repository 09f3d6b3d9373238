"""Inline-assembly blocks: PTX lines over named registers, bound to operands."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Lines = Iterator[str]

_DECLARED = {"r": "b32", "l": "b64", "f": "f32"}


def names(prefix: str, count: int, kind: str = "r") -> dict[str, str]:
    """Registers ``prefix``0, ``prefix``1, ... of one kind: r (32 bits), l (64 bits) or f (float32)."""
    return {f"{prefix}{i}": kind for i in range(count)}


def listed(prefix: str, *indices: int) -> str:
    """A PTX vector operand: {x0,x1}."""
    return "{" + ",".join(f"{prefix}{i}" for i in indices) + "}"


def vectors(prefix: str, count: int, first: int = 0) -> Iterator[tuple[int, str, str]]:
    """Registers in the widest vectors that divide ``count``: the first index, the type (v4.b32), the operand."""
    width = next(n for n in (4, 2, 1) if count % n == 0)
    for i in range(first, first + count, width):
        yield (i, "b32", f"{prefix}{i}") if width == 1 else (i, f"v{width}.b32", listed(prefix, *range(i, i + width)))


def float32(x: float) -> str:
    """A PTX constant."""
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


def locate_thread() -> Lines:
    """lane and warp of the thread."""
    yield "mov.u32 lane, %laneid; mov.u32 warp, %tid.x; shr.u32 warp, warp, 5;"


@dataclass(frozen=True)
class Block:
    """One inline-assembly block: its text, its constraints, and how many results of which kind it has."""

    text: str
    constraints: str
    results: str

    @classmethod
    def of(cls, inputs: Mapping[str, str], outputs: Mapping[str, str], body: Iterator[str]) -> Block:
        """Bind named registers to operands. Registers that are only outputs are declared here as well."""
        text = ["{", *(f".reg .{_DECLARED[kind]} {name};" for name, kind in {**inputs, **outputs}.items())]
        for i, (name, kind) in enumerate(inputs.items()):
            text.append(f"mov.{_DECLARED[kind]} {name}, ${len(outputs) + i};")
        text.extend(body)
        text += [f"mov.{_DECLARED[kind]} ${i}, {name};" for i, (name, kind) in enumerate(outputs.items())]
        constraints = [f"=&{kind}" for kind in outputs.values()] + list(inputs.values())
        return cls("\n".join([*text, "}"]), ",".join(constraints), "".join(outputs.values()))
