"""How far a cache may be pruned: a study of models, told by a YAML file.

    python benchmarks/accuracy_study.py benchmarks/runs/short.yaml
    python benchmarks/accuracy_study.py benchmarks/runs/full.yaml --device cuda

``accuracy/runs.py`` says what may stand in the file. Each result is saved as it comes, and what the results have
already is not computed again: stop it and start it as you like. At the end come a table for each run and model, and
plots. ``--show`` computes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import timing
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timing import DEVICE, parser, show

from accuracy import plots, tables
from accuracy.case import Case
from accuracy.models import subject
from accuracy.readings import Row
from accuracy.results import Results, about
from accuracy.runs import WAYS, Reading, Study, StudyError, read_study
from quickstart import DTYPES

Work = list[tuple[Reading, list[tuple[Case, str]]]]


def missing(study: Study, model: str, rows: list[Row]) -> Work:
    """What is still to be done with a model: readings, with the cases and ways for each."""
    known = set(map(about, rows))
    work: Work = []
    for run in study.runs:
        for reading in run.readings if model in run.models else []:
            wanted = [(case, way) for case in run.cases for way in run.ways]
            new = [(case, way) for case, way in wanted if about(reading.row(model, case, way)) not in known]
            known |= {about(reading.row(model, case, way)) for case, way in new}
            if new:
                work.append((reading, new))
    return work


def complete(study: Study, device: str, console: Console) -> list[Row]:
    """All rows of a study. Those that are missing are computed and saved one by one."""
    results = results_of(study)
    work = {model: missing(study, model, results.rows) for model in study.models}
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        bar = progress.add_task("", total=sum(len(cases) for of_model in work.values() for _, cases in of_model))
        for model, of_model in work.items():
            for row, seconds in computed(study, model, of_model, device) if of_model else ():
                results.add(row)
                progress.update(bar, advance=1, description=model)
                console.print(f"{seconds:.1f} s", _shown(row), highlight=False)
    return results.rows


def results_of(study: Study) -> Results:
    """What a study has so far."""
    return Results(timing.OUT / f"study_{study.name}.jsonl")


def computed(study: Study, model: str, work: Work, device: str) -> Iterator[tuple[Row, float]]:
    """The rows of one model as they come, and the seconds that each took."""
    loaded = subject(model, device, DTYPES[study.dtype])
    for reading, cases in work:
        prepared = reading.make(loaded)
        for case, way in cases:
            start = time.perf_counter()
            figures = prepared.row(case, WAYS[way])
            row = {**reading.row(model, case, way), "head_dim": loaded.head_dim, "figures": figures}
            yield row, time.perf_counter() - start


def _shown(row: Row) -> str:
    figures = {name: round(value, 4) for name, value in row["figures"].items() if isinstance(value, float)}
    return f"{Case.of(row).label}: " + ", ".join(f"{name} {value}" for name, value in figures.items())


@torch.no_grad()
def main() -> None:
    """Run from the command line."""
    arguments = parser(__doc__)
    arguments.add_argument("study", type=Path, metavar="RUNS.yaml")
    arguments.add_argument("--device", default=str(DEVICE), help=f"(default here: {DEVICE})")
    arguments.add_argument("--models", nargs="+", help="in place of those that the file names")
    arguments.add_argument("--runs", nargs="+", metavar="NAME", help="of the file, only these")
    arguments.add_argument("--show", action="store_true", help="tables and plots of what there is; compute nothing")
    args = arguments.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        study = read_study(args.study, args.models, args.runs)
    except (OSError, StudyError) as error:
        arguments.error(str(error))
    rows = results_of(study).rows if args.show else complete(study, args.device, Console())
    for run in study.runs:
        for title, lines in tables.tables(run, rows):
            show(title, lines)
    try:
        for path in plots.draw_all(study, rows, timing.OUT / study.name):
            print(f"drawn: {path}")
    except ImportError as error:
        print(f"no plots: {error}; pip install '.[benchmark]'")


if __name__ == "__main__":
    main()
