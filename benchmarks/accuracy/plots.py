"""Pictures of a study: loss against bytes, needles by depth and length, magnitudes of keys and values."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .case import Case
from .readings import Row
from .runs import Study
from .tables import line

LEAST = 1e-3  # nats: less is noise, and is drawn there
MAGNITUDES = "magnitudes"
_COLOURS = {
    "quantized only": "#57606a",
    "magnitude": "#0969da",
    "output-aware": "#2da44e",
    "think": "#bc4c00",
    "channel-magnitude": "#bf3989",
    "channel-output-aware": "#8250df",
    "heavy hitters": "#9a6700",
    "calibrated budget": "#cf222e",
}
_MARKERS = {"none": "o", "int8": "s", "int4 growing": "^"}
OTHER_CODE = "D"
_LOSSES = {"over_dense": "nats a token over dense", "kl": "divergence from dense (KL), nats a token"}

Point = tuple[float, float, Case]
"""Stored bytes in percent of dense, loss in nats, and what it is."""


def draw_all(study: Study, rows: list[Row], folder: Path) -> Iterator[Path]:
    """Draw what there are results for, and give the files. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "mustafar", "svg.fonttype": "none", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    for model in study.models:
        found = [row for row in rows if row["model"] == model and row["way"] == "one forward"]
        name = Path(model).name
        for kind, draw in (("frontier", frontier), ("needles", needles), (MAGNITUDES, magnitudes)):
            figure = draw(model, found)
            if figure is not None:
                path = folder / f"{kind}_{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                yield path


def frontier(model: str, rows: list[Row]) -> Any:
    """Loss against stored bytes of the cases that were measured on texts. Those that no other beats are named."""
    rows = [row for row in rows if "text" in row]
    cases = list(dict.fromkeys(map(Case.of, rows)))
    if not cases:
        return None
    lines = [(case, line(case, [row for row in rows if Case.of(row) == case])) for case in cases]
    figure, panels = _figure(len(_LOSSES), (11, 9))
    for panel, (column, title) in zip(panels, _LOSSES.items(), strict=True):
        _draw_frontier(panel, _points(lines, column))
        panel.set_ylabel(title)
    figure.legend(*_legend(cases), loc="lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(f"{Path(model).name}: what is lost at which size", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def _points(lines: list[tuple[Case, Row]], column: str) -> list[Point]:
    points = [(found["bytes_%"], max(found[column], LEAST), case) for case, found in lines]
    return sorted(points, key=lambda point: point[:2])


def _draw_frontier(panel: Any, points: list[Point]) -> None:
    for percent, loss, case in points:
        style = {"color": _COLOURS[family(case)], "marker": _MARKERS.get(case.key_code, OTHER_CODE), "markersize": 5}
        panel.plot(percent, loss, linestyle="", markeredgecolor="white", **style)
    best = unbeaten(points)
    percents, losses, _ = zip(*best, strict=True)
    panel.step(percents, losses, where="post", color="#8c959f", linewidth=1, zorder=0)
    for number, (percent, loss, _) in enumerate(best, 1):
        panel.annotate(str(number), (percent, loss), xytext=(4, 4), textcoords="offset points", fontsize=7)
    names = [f"{number}  {case.label}: {percent:.0f}%" for number, (percent, _, case) in enumerate(best, 1)]
    panel.text(1.02, 1, "\n".join(names), transform=panel.transAxes, va="top", fontsize=7, color="#57606a")
    panel.set_yscale("log")
    panel.set_xlim(0, 104)
    panel.set_xlabel("stored bytes, % of dense")
    panel.grid(color="#d1d9e0", linewidth=0.4)


def _legend(cases: list[Case]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    families = [name for name in _COLOURS if name in map(family, cases)]
    colours = [Line2D([], [], linestyle="", marker="o", color=_COLOURS[name]) for name in families]
    marks = {**{f"code {name}": mark for name, mark in _MARKERS.items()}, "other codes": OTHER_CODE}
    grey = [Line2D([], [], linestyle="", marker=mark, color="#8c959f") for mark in marks.values()]
    return [*colours, *grey], [*families, *marks]


def family(case: Case) -> str:
    """What a case is an example of."""
    if case.token_share < 1:
        return "heavy hitters"
    if not case.key_sparsity and not case.value_sparsity and not case.budget:
        return "quantized only"
    strategies = {case.key_strategy, case.value_strategy} - {"magnitude"}
    return "calibrated budget" if case.budget else min(strategies, default="magnitude")


def unbeaten(points: list[Point]) -> list[Point]:
    """Of points in order of bytes those with less loss than all with fewer bytes."""
    best: list[Point] = []
    for point in points:
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def needles(model: str, rows: list[Row]) -> Any:
    """How often a needle is found, by its depth and the length of the text: a panel for each case."""
    rows = [row for row in rows if row.get("task") == "needle"]
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    cases = list(dict.fromkeys(map(Case.of, rows)))
    if not cases or len(lengths) * len(depths) < 2:
        return None
    columns = min(len(cases), 4)
    lines = -(-len(cases) // columns)
    figure, panels = _figure(
        len(cases), (0.9 + 0.62 * len(lengths) * columns + 0.5 * columns, 0.9 + 1.9 * lines), columns
    )
    for panel, case in zip(panels, cases, strict=False):
        found = {(row["depth"], row["length"]): row["figures"]["score"] for row in rows if Case.of(row) == case}
        grid = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for i, of_depth in enumerate(grid):
            for j, score in enumerate(of_depth):
                panel.text(j, i, f"{score:.0%}", ha="center", va="center", fontsize=6)
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        panel.set_title(case.label, fontsize=7)
    for panel in panels[len(cases) :]:
        panel.set_visible(False)
    figure.suptitle(f"{Path(model).name}: needles found, by depth in the text and tokens", fontsize=10)
    figure.tight_layout()
    return figure


def magnitudes(model: str, rows: list[Row]) -> Any:
    """Magnitudes of keys (above) and values (below) by channel and token, a column for each layer."""
    found = next((row["figures"] for row in rows if MAGNITUDES in row and "keys" in row["figures"]), None)
    if found is None:
        return None
    layers = found["layers"]
    figure, panels = _figure(2 * len(layers), (2.9 * len(layers), 5.6), len(layers))
    for place, (role, layer) in enumerate([(role, i) for role in ("keys", "values") for i in range(len(layers))]):
        panel, grid = panels[place], found[role][layer]
        ceiling = statistics.quantiles([x for of_token in grid for x in of_token], n=200)[-1]
        image = panel.imshow(grid, aspect="auto", cmap="magma", vmin=0, vmax=ceiling, interpolation="nearest",
                             extent=(0, len(grid[0]), found["tokens"], 0))  # fmt: skip
        figure.colorbar(image, ax=panel)
        panel.set_title(f"|{role[0].upper()}|, layer {layers[layer]}", fontsize=8)
        panel.set_xlabel("channel", fontsize=7)
        panel.set_ylabel("token", fontsize=7)
        panel.tick_params(labelsize=6)
    figure.suptitle(f"{Path(model).name}: one KV head", fontsize=10)
    figure.tight_layout()
    return figure


def _figure(panels: int, size: tuple[float, float], columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(-(-panels // columns), columns, figsize=size, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)
