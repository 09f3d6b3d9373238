"""What users gain over what they would pick instead: a study of speed and memory, told by a YAML file.

    python benchmarks/efficiency_study.py benchmarks/runs/efficiency_short.yaml
    python benchmarks/efficiency_study.py benchmarks/runs/efficiency.yaml --gpus 2
    python benchmarks/efficiency_study.py benchmarks/runs/efficiency.yaml --show

``efficiency/runs.py`` says what may stand in the file. Each row is a process of its own and is saved as it comes; what
the results have already is not measured again, so stop it and start it as you like (``--again RUN`` does measure it).
What cannot be measured is a row with the reason. With ``--jobs 4`` so many rows prepare side by side on each GPU, as
far as their memory goes, and one at a time measures. At the end come tables and a report, one HTML file. ``--show``
measures nothing.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import timing
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from study_files import StudyError, known
from timing import parser

from accuracy.results import Results
from efficiency import markdown, tables
from efficiency.case import Case
from efficiency.processes import Machine
from efficiency.runs import Study, read_study

Row = dict[str, Any]


def results_of(study: Study) -> Results:
    """What a study has so far."""
    return Results(timing.OUT / f"efficiency_{study.name}.jsonl", timing.versions)


Work = list[tuple[Case, float, int]]
"""Cases, the seconds that each may take, and the largest batch that is known, or 0."""


def missing(study: Study, rows: list[Row], retry: bool = False, again: Collection[str] = ()) -> Work:
    """What is still to be measured. retry: also what failed. again: also what these runs have already."""
    found = tables.by_case(rows)
    done = {case for case, figures in found.items() if not (retry and "failed" in figures)}
    done -= {case for run in study.runs if run.name in again for case in run.cases}
    fitting = {case: figures["batch"] for case, figures in found.items() if case.memory_GB and "batch" in figures}
    return [(case, limit_s, fitting.get(case, 0)) for case, limit_s in study.cases.items() if case not in done]


def complete(study: Study, work: Work, gpus: int, jobs: int, console: Console) -> list[Row]:
    """All rows of a study. Those of ``work`` are measured and saved one by one."""
    results = results_of(study)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        bar = progress.add_task(study.name, total=len(work))
        machine = Machine(gpus, timing.OUT / f"efficiency_{study.name}_logs", jobs) if work else None
        for case, figures in machine.measure(work) if machine else ():
            results.add({**case.described(), "figures": figures})
            progress.update(bar, advance=1)
            console.print(f"{case}: {tables.shown(figures)}", highlight=False, markup=False)
    return results.rows


def main() -> None:
    """Run from the command line."""
    arguments = parser(__doc__)
    arguments.add_argument("study", type=Path, metavar="RUNS.yaml")
    arguments.add_argument("--gpus", type=int, default=int(timing.ON_GPU), help="rows run on so many, side by side")
    arguments.add_argument("--runs", nargs="+", metavar="NAME", help="of the file, only these")
    arguments.add_argument("--jobs", type=int, default=1, help="rows that prepare side by side on each GPU")
    arguments.add_argument("--retry", action="store_true", help="measure again what failed")
    arguments.add_argument("--again", nargs="+", metavar="NAME", default=[], help="measure these runs again")
    arguments.add_argument("--show", action="store_true", help="tables and report of what there is; measure nothing")
    arguments.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables between its marks, too")
    arguments.add_argument("--report", type=Path, help="(default: efficiency_<name>.html beside the results)")
    args = arguments.parse_args()
    try:
        study = read_study(args.study, args.runs)
        known(dict.fromkeys(args.again), {run.name for run in study.runs}, "run")
        if args.markdown:  # before hours of measuring
            markdown.around(args.markdown)
    except (OSError, StudyError) as error:
        arguments.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; what was measured is saved"))
    transformers.logging.set_verbosity_error()
    console = Console(width=None if sys.stdout.isatty() else 240)
    try:
        rows = results_of(study).rows
        if not args.show:
            rows = complete(study, missing(study, rows, args.retry, args.again), args.gpus, args.jobs, console)
        if args.markdown:
            markdown.replace(args.markdown, study, rows)
    except StudyError as error:
        arguments.error(str(error))
    for run in study.runs:
        timing.show(run.name, [tables.cut(line) for line in tables.table(run, rows)])
    path = args.report or timing.OUT / f"efficiency_{study.name}.html"
    try:
        from efficiency import report
    except ImportError as error:
        print(f"no report: {error}; pip install '.[benchmark]', then --show")
        return
    path.write_text(report.html(study, rows), encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
