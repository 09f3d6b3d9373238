"""Draw the results of attention.py over the length of the context.

    python benchmarks/attention.py
    python benchmarks/plot.py

Left: how many times faster than the best dense attention. Right: the time that a copy would need for the bytes that
are read, as a share of the time taken. One line for each sparsity and number of query heads per KV head.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from timing import parser, path_of, read

ROOT = Path(__file__).resolve().parent.parent
PANELS = {"ratio": "speed-up over the best dense attention", "of_limit": "share of the bandwidth limit"}
COLOURS = {1: "#0969da", 4: "#2da44e", 8: "#bc4c00"}
STYLES = {0.5: "--", 0.7: "-"}
Line = list[dict[str, Any]]


def lines(rows: list[dict[str, Any]], batch: int, head_dim: int) -> dict[tuple[int, float], Line]:
    """Rows of one batch size and head size by (query heads per KV head, sparsity), in order of length."""
    found = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if (row["batch"], row["head_dim"], row["dtype"]) == (batch, head_dim, "bfloat16"):
            found[row["gqa"], row["sparsity"]].append(row)
    return dict(sorted(found.items()))


def draw(panel: Any, column: str, found: dict[tuple[int, float], Line]) -> None:
    """One panel."""
    for (gqa, sparsity), line in found.items():
        tokens, numbers = [row["tokens"] for row in line], [row[column] for row in line]
        style = {"color": COLOURS.get(gqa), "linestyle": STYLES.get(sparsity, ":"), "marker": "o", "markersize": 3.5}
        panel.plot(tokens, numbers, label=f"heads per KV head: {gqa}, sparsity {sparsity}", **style)
    panel.axhline(1, color="#8c959f", linewidth=1)
    panel.set_xscale("log", base=2)
    ticks = sorted({row["tokens"] for line in found.values() for row in line})
    panel.set_xticks(ticks, [f"{tokens // 1024}K" for tokens in ticks])
    panel.set_xlabel("tokens in the cache")
    panel.set_title(PANELS[column], fontsize=10)
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", color="#d1d9e0", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--output", type=Path, default=ROOT / "docs" / "attention.svg")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--head-dim", type=int, default=128)
    given = options.parse_args()
    found = lines(read("attention"), given.batch, given.head_dim)
    if not found:
        options.error(f"{path_of('attention')} holds nothing to draw; run attention.py first")
    # The same numbers give the same file, and the text stays text.
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "mustafar", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(9.4, 3.9))
    for panel, column in zip(panels, PANELS, strict=True):
        draw(panel, column, found)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(given.output, metadata={"Date": None})
    print(f"written to {given.output}")


if __name__ == "__main__":
    main()
