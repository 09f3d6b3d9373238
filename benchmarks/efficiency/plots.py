"""Pictures of the efficiency study, as SVG."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

from .case import LARGEST, Case
from .kernels import KINDS, REST, by_kind
from .tables import Found, batch_of, peers

PEER_COLOURS = {"hf": "#bc4c00", "dense": "#24292f", "snapkv": "#8250df", "flashinfer fp8": "#9a6700"}
OUR_COLOURS = {"0.5": "#0969da", "0.7": "#2da44e", "safe": "#54aeff", "balanced": "#bf3989", "small": "#1b7c83"}
OTHER_COLOUR = "#57606a"
KIND_COLOURS = {"attention": "#0969da", "matmul": "#8c959f", REST: "#d4a72c"}
IDLE_COLOUR = "#eaeef2"
MARKERS = {"ours": "s", "op": "o"}
_DISTURBED = 1.1
"""Times the step: where kernels take longer, others used the device while they were listed."""
_FAR = 2.5
"""Times the median step: a bar that is longer is cut off."""

Points = list[tuple[int, Case]]
Group = dict[str, Points]
"""Cases by label, each in order of what the plot goes along."""


def draw_all(found: Found) -> Iterator[tuple[str, str]]:
    """A title and a picture as SVG for all that there are enough rows for."""
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "mustafar", "svg.fonttype": "none", "font.size": 9})
    for title, cases in _groups(found, "batch"):
        yield f"Tokens a second against batch: {title}", _along(cases, found, "batch", _speeds, "tokens a second")
        yield f"Speed-up against batch: {title}", _speed_ups(cases, found, "batch")
        yield f"Memory against batch: {title}", _along(cases, found, "batch", _memory, "peak memory, GB")
    for title, cases in _groups(found, "context"):
        yield f"Speed-up against context: {title}", _speed_ups(cases, found, "context")
        yield f"Memory against context: {title}", _along(cases, found, "context", _memory, "peak memory, GB")
    for title, cases in _filling(found):
        yield f"Equal memory: the largest batch of each way, {title}", _equal_memory(cases, found)
    for title, cases in _profiled(found):
        yield f"Where a decode step's time goes: {title}", _kinds(cases, found)


def _groups(found: Found, along: str) -> Iterator[tuple[str, Group]]:
    """Steps that differ in ``along`` alone: ways with two values of it or more."""
    groups: dict[tuple[str, ...], Group] = {}
    for case, figures in found.items():
        if case.measure != "step" or "failed" in figures or (along == "context" and case.batch == LARGEST):
            continue
        place = batch_of(case, figures) if along == "batch" else case.context
        fixed = f"{case.context} tokens" if along == "batch" else f"batch {case.batch}"
        card = f"{case.memory_GB:g} GB of " if case.memory_GB else ""
        key = case.shape, f"{case.layers} layers" if case.layers else "all layers", fixed, card + figures["device"]
        groups.setdefault(key, {}).setdefault(case.label, []).append((place, case))
    for key, cases in groups.items():
        lines = {label: sorted(points, key=lambda point: point[0]) for label, points in cases.items()}
        lines = {label: points for label, points in lines.items() if points[0][0] < points[-1][0]}
        if lines:
            yield ", ".join(key), lines


def _filling(found: Found) -> Iterator[tuple[str, list[Case]]]:
    """Steps with the largest batch that fits, where there are several of one size."""
    groups: dict[str, list[Case]] = {}
    for case, figures in found.items():
        if case.measure == "step" and case.batch == LARGEST and "failed" not in figures:
            layers = f"{case.layers} layers" if case.layers else "all layers"
            card = f"{case.memory_GB:g} GB of {figures['device']}" if case.memory_GB else figures["device"]
            groups.setdefault(f"{case.shape}, {layers}, {case.context} tokens, {card}", []).append(case)
    yield from ((title, cases) for title, cases in groups.items() if len(cases) > 1)


def _profiled(found: Found) -> Iterator[tuple[str, list[Case]]]:
    """Steps of one size for each shape: of that which was measured in most ways."""
    groups: dict[str, dict[str, list[Case]]] = {}
    for case, figures in found.items():
        if case.measure == "step" and "failed" not in figures and case.batch != LARGEST and _was_alone(figures):
            layers = f"{case.layers} layers" if case.layers else "all layers"
            size = f"{layers}, batch {case.batch}, {case.context} tokens, {figures['device']}"
            groups.setdefault(case.shape, {}).setdefault(size, []).append(case)
    for shape, sizes in groups.items():
        size = max(sizes, key=lambda size: len(sizes[size]))
        yield f"{shape}, {size}", sizes[size]


def _was_alone(figures: dict[str, Any]) -> bool:
    """Whether the kernels that were listed took no longer than in the step that was timed."""
    return figures["busy_ms"] < _DISTURBED * figures["ms"]


def _speeds(case: Case, found: Found) -> float:
    return found[case]["tokens_per_s"]


def _memory(case: Case, found: Found) -> float:
    return found[case]["peak_GB"]


def _along(cases: Group, found: Found, along: str, value: Callable[[Case, Found], float], name: str) -> str:
    figure, panel = pyplot.subplots(figsize=(6.4, 3.8))
    for label, points in cases.items():
        _draw_line(panel, points, [value(case, found) for _, case in points], style_of(label, cases))
    _finish(panel, cases, along)
    panel.set_ylabel(name)
    return _svg(figure)


def _speed_ups(cases: Group, found: Found, along: str) -> str:
    """A panel for each peer. Where batches are the largest that fit, the gain is that of equal memory."""
    ways = [way for way in ("hf", "dense") if any(len(_gains(points, way, found)) > 1 for points in cases.values())]
    figure, panels = pyplot.subplots(1, max(len(ways), 1), figsize=(4.6 * max(len(ways), 1), 3.8), squeeze=False)
    for panel, way in zip(panels[0], ways, strict=False):
        for label, points in cases.items():
            known = _gains(points, way, found)
            if known and points[0][1].is_ours:
                _draw_line(panel, [point for point, _ in known], [gain for _, gain in known], style_of(label, cases))
        panel.axhline(1, color="#8c959f", linewidth=1)
        _finish(panel, cases, along)
        panel.set_title({"hf": "over HF's compiled static cache", "dense": "over the best dense step"}[way], fontsize=9)
    return _svg(figure)


def _gains(points: Points, way: str, found: Found) -> list[tuple[tuple[int, Case], float]]:
    known = []
    for point in points:
        rivals = [peer for peer in peers(point[1], found) if peer.way == way]
        known += [(point, found[point[1]]["tokens_per_s"] / found[peer]["tokens_per_s"]) for peer in rivals]
    return known


def _equal_memory(cases: list[Case], found: Found) -> str:
    figure, panel = _bars(cases)
    for place, case in enumerate(reversed(cases)):
        style = style_of(case.label, {case.label: [(0, case)]})
        speed = found[case]["tokens_per_s"]
        panel.barh(place, speed, color=style["color"], height=0.66)
        _beside(panel, speed, place, f"{speed:.0f} (batch {batch_of(case, found[case])})")
    panel.set_xlabel("tokens a second")
    panel.margins(x=0.22)
    _plain(panel)
    return _svg(figure)


def _bars(cases: list[Case]) -> tuple[Any, Any]:
    """A panel with a line for each case, the first on top."""
    figure, panel = pyplot.subplots(figsize=(7.6, 0.9 + 0.36 * len(cases)))
    panel.set_yticks(range(len(cases)), [case.label for case in reversed(cases)])
    return figure, panel


def _beside(panel: Any, end: float, place: int, text: str) -> None:
    """Text behind the end of a bar."""
    panel.annotate(f" {text}", (end, place), va="center", fontsize=8, annotation_clip=False)


def _kinds(cases: list[Case], found: Found) -> str:
    """A bar that is far longer than the others is cut off: the figure behind it tells."""
    cases = sorted(cases, key=lambda case: -found[case]["ms"])
    steps = [found[case]["ms"] for case in cases]
    most = 1.12 * max(ms for ms in steps if ms <= _FAR * statistics.median(steps))
    figure, panel = _bars(cases)
    for place, case in enumerate(reversed(cases)):
        step, start = found[case]["ms"], 0.0
        for kind, taken in by_kind(found[case]["kernels"], found[case]["busy_ms"]).items():
            panel.barh(place, taken, left=start, color=KIND_COLOURS[kind], height=0.66)
            start += taken
        panel.barh(place, max(0.0, step - start), left=start, color=IDLE_COLOUR, height=0.66)
        _beside(panel, min(max(step, start), most), place, f"{step:.2f} ms" + (" (cut off)" if step > most else ""))
    panel.set_xlim(0, most)
    panel.set_xlabel("ms of a step")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=KIND_COLOURS[kind]) for kind in (*KINDS, REST)]
    handles.append(pyplot.Rectangle((0, 0), 1, 1, color=IDLE_COLOUR))
    names = [*KINDS, REST, "no kernel runs"]
    panel.legend(handles, names, frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    _plain(panel)
    return _svg(figure)


def style_of(label: str, cases: Group) -> dict[str, Any]:
    """Colour and marker of a way: peers have their own, ours go by their settings."""
    case = cases[label][0][1]
    if not case.is_ours:
        return {"color": PEER_COLOURS.get(case.way, OTHER_COLOUR), "marker": "D", "linestyle": "--", "label": label}
    colour = OUR_COLOURS.get(case.setting, OTHER_COLOUR)
    return {"color": colour, "marker": MARKERS[case.way], "linestyle": "-", "label": label}


def _draw_line(panel: Any, points: Points, values: list[float], style: dict[str, Any]) -> None:
    places = [place for place, _ in points]
    panel.plot(places, values, markersize=4, linewidth=1.3, **style)
    largest = [(place, value) for (place, case), value in zip(points, values, strict=True) if case.batch == LARGEST]
    for place, value in largest:
        panel.plot(place, value, marker="*", markersize=12, color=style["color"], linestyle="")


def _finish(panel: Any, cases: Group, along: str) -> None:
    panel.set_xscale("log", base=2)
    ticks = sorted({place for points in cases.values() for place, case in points if case.batch != LARGEST})
    panel.set_xticks(ticks, [f"{tick // 1024}K" if tick % 1024 == 0 else str(tick) for tick in ticks])
    panel.set_xlabel("tokens in the cache" if along == "context" else "batch; a star: the largest that fits")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=7)
    _plain(panel)


def _plain(panel: Any) -> None:
    panel.grid(color="#d1d9e0", linewidth=0.5)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _svg(figure: Any) -> str:
    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return out.getvalue()
