"""A study as a YAML file: which models read what, and in which cases.

    models: [smollm2, tiny_llama, path/to/a/checkpoint]
    dtype: float32                  # of the models; rows of a cache are rounded to bfloat16
    runs:
      - name: strategies
        texts: {count: 2, tokens: 1024, prompt: 256}    # text: "prose", "source" or a file
        cases:
          - {key_strategy: [magnitude, output-aware], key_sparsity: [0.5, 0.7]}
          - {sparsity: 0.7, code: int8}
      - name: needles
        tasks: {names: [needle], lengths: [1024], depths: [0, 0.5, 1], samples: 4}
        cases: [{}, {sparsity: 0.7}]
      - name: demo
        questions: true
        ways: [one forward, token by token]
        cases: [{sparsity: 0.5}]

A case is the fields of ``case.Case``. ``sparsity`` and ``code`` stand for those of keys and of values; a list makes a
case for each of its members, several lists one for each choice of theirs. A run may have ``models`` of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from study_files import StudyError, known

from . import dialects, through_backend
from .case import Case
from .models import Subject
from .readings import Layers, Questions, Row, Text, Way, in_one_forward
from .tasks import TASKS

WAYS: dict[str, Way] = {"one forward": in_one_forward, "token by token": through_backend.token_by_token}
TEXT_SOURCES = {"prose": dialects.prose, "source": dialects.source}
_BOTH = "sparsity", "code"
_READS = {
    "texts": {"text": "", "count": 4, "tokens": 3072, "prompt": 256},
    "tasks": {"names": list(TASKS), "lengths": [1024], "depths": [0.0, 0.25, 0.5, 0.75, 1.0], "samples": 4},
    "questions": None,
    "magnitudes": {"layers": [0], "tokens": 1024, "prompt": 128},
}


@dataclass(frozen=True)
class Reading:
    """One thing to read. key: what tells its rows from others. make: prepares it for a model."""

    key: Row
    make: Callable[[Subject], Text | Questions | Layers]

    def row(self, model: str, case: Case, way: str) -> Row:
        """A row of results, but for its figures."""
        return {"model": model, "way": way, **self.key, **case.described()}


@dataclass(frozen=True)
class Run:
    """Some readings in some cases; one table."""

    name: str
    models: list[str]
    readings: list[Reading]
    cases: list[Case]
    ways: list[str]


@dataclass(frozen=True)
class Study:
    """All runs of a file."""

    name: str
    dtype: str
    runs: list[Run]

    @property
    def models(self) -> list[str]:
        """All models, each once."""
        return list(dict.fromkeys(model for run in self.runs for model in run.models))


def read_study(path: Path, models: list[str] | None = None, runs: list[str] | None = None) -> Study:
    """The study of a file. models: those that take part, in place of the file's. runs: names of those wanted.

    Raises StudyError, naming what is accepted.
    """
    try:
        given = known(yaml.safe_load(path.read_text(encoding="utf-8")), {"models", "dtype", "runs"}, "study", ["runs"])
        found = {run.name: run for run in (_run(run, given.get("models", []), models) for run in given["runs"])}
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise StudyError(f"{path}: {error}") from error
    known(dict.fromkeys(runs or ()), set(found), "run")
    wanted = [run for name, run in found.items() if not runs or name in runs]
    return Study(path.stem, given.get("dtype", "float32"), wanted)


def _run(given: Row, models: list[str], instead: list[str] | None) -> Run:
    known(given, {"name", "models", "cases", "ways", *_READS}, "run", ["name", "cases"])
    ways = given.get("ways", ["one forward"])
    for way in ways:
        known({way: None}, set(WAYS), "way")
    cases = list(dict.fromkeys(case for entry in given["cases"] for case in expanded(entry)))
    return Run(given["name"], instead or given.get("models", models), list(_readings(given)), cases, ways)


def expanded(entry: Row) -> Iterator[Case]:
    """The cases that one entry stands for. Raises StudyError for an unknown field."""
    known(entry, {*_BOTH, *(field.name for field in fields(Case))}, "case")
    choices = [value if isinstance(value, list) else [value] for value in entry.values()]
    for chosen in itertools.product(*choices):
        case = dict(zip(entry, chosen, strict=True))
        for name in _BOTH:
            if name in case:
                value = case.pop(name)
                case = {f"key_{name}": value, f"value_{name}": value} | case
        yield Case(**case)


def _readings(given: Row) -> Iterator[Reading]:
    if "texts" in given:
        yield from _texts(**_READS["texts"] | known(given["texts"] or {}, set(_READS["texts"]), "texts"))
    if "tasks" in given:
        yield from _tasks(**_READS["tasks"] | known(given["tasks"] or {}, set(_READS["tasks"]), "tasks"))
    if given.get("questions"):
        yield Reading({"questions": "demo"}, lambda subject: Questions(subject.model, subject.questions))
    if "magnitudes" in given:
        yield _layers(
            **_READS["magnitudes"] | known(given["magnitudes"] or {}, set(_READS["magnitudes"]), "magnitudes")
        )


def _texts(text: str, count: int, tokens: int, prompt: int) -> Iterator[Reading]:
    for part in range(count):

        def make(subject: Subject, part: int = part) -> Text:
            return Text(subject.model, subject.texts_of(_read(text, subject), count, tokens)[part], prompt)

        yield Reading({"text": text or "own", "part": f"{part} of {count}", "tokens": tokens, "prompt": prompt}, make)


def _read(text: str, subject: Subject) -> str:
    if not text:
        return subject.text
    return TEXT_SOURCES[text]() if text in TEXT_SOURCES else Path(text).read_text(encoding="utf-8")


def _tasks(names: list[str], lengths: list[int], depths: list[float], samples: int) -> Iterator[Reading]:
    for name, length, depth in itertools.product(names, lengths, depths):
        known({name: None}, set(TASKS), "task")

        def make(subject: Subject, name: str = name, length: int = length, depth: float = depth) -> Questions:
            prompts = [subject.prompts.prompt(name, length, depth, seed) for seed in range(samples)]
            return Questions(subject.model, prompts)

        yield Reading({"task": name, "length": length, "depth": depth, "samples": samples}, make)


def _layers(layers: list[int], tokens: int, prompt: int) -> Reading:
    def make(subject: Subject) -> Layers:
        return Layers(subject.model, subject.texts_of(subject.text, 1, tokens)[0], prompt, layers)

    return Reading({"magnitudes": str(layers), "tokens": tokens, "prompt": prompt}, make)
