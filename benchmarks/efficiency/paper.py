"""Table 14 of the paper (arXiv 2505.22913), measured there on an RTX 6000 Ada (48 GB, 960 GB/s): batch 4."""

from __future__ import annotations

from dataclasses import dataclass

BATCH = 4


@dataclass(frozen=True)
class Line:
    """first_token: seconds. tokens_per_s: over so many new tokens."""

    label: str
    first_token: float
    tokens_per_s: dict[int, float]


DENSE = "dense"
TABLE_14: dict[tuple[str, int], list[Line]] = {  # shape, tokens of the prompt
    ("llama-2-7b", 2048): [
        Line(DENSE, 1.396, {512: 88.685, 1024: 88.512, 2048: 79.185}),
        Line("0.5", 2.532, {512: 89.452, 1024: 89.514, 2048: 85.687}),
        Line("0.7", 2.249, {512: 96.386, 1024: 97.436, 2048: 95.120}),
    ],
    ("llama-3-8b", 4096): [
        Line(DENSE, 2.769, {512: 61.993, 1024: 61.220, 2048: 59.242}),
        Line("0.5", 3.269, {512: 78.434, 1024: 83.768, 2048: 83.303}),
        Line("0.7", 3.151, {512: 84.065, 1024: 88.293, 2048: 89.699}),
    ],
}

LARGEST_GAIN = 2.23
"""Of throughput, at most: Llama 3 8B at 0.5, batch 8 compressed against batch 6 dense."""
