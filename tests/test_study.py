"""The accuracy study as a whole: its file of runs, what it resumes, its tables, and the two ways that must agree."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import timing
import torch
from rich.console import Console
from transformers import ByT5Tokenizer

import accuracy_study
from accuracy import plots, tables, through_backend
from accuracy.case import Case
from accuracy.dialects import Code, source
from accuracy.intervals import half_width, interval
from accuracy.models import Subject
from accuracy.readings import Text
from accuracy.results import about
from accuracy.runs import StudyError, expanded, read_study
from accuracy.strategies import VALUES
from compilers import without_compiler
from models import hf_model
from nightly import mostly_at_night
from quickstart import fact_prompts

STUDY = """
models: [toy]
runs:
  - name: texts
    texts: {count: 2, tokens: 200, prompt: 40}
    cases: [{}, {sparsity: [0.3, 0.7], window: 8}]
  - name: tasks
    tasks: {names: [needle], lengths: [300, 400], depths: [0, 1], samples: 2}
    cases: [{}, {sparsity: 0.7}]
  - name: strategies
    texts: {count: 2, tokens: 200, prompt: 40}
    cases: [{key_sparsity: 0.5}, {key_strategy: output-aware, key_sparsity: 0.5}]
  - name: again
    texts: {count: 2, tokens: 200, prompt: 40}
    magnitudes: {layers: [0, 1], tokens: 64, prompt: 40}
    cases: [{sparsity: 0.7, window: 8}, {}, {value_sparsity: 0.5}]
"""
ROWS = 2 * 3 + 4 * 2 + 2 * 2 + 2 + 3  # the last run needs one case more on texts, and its three of layers


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of a model of a byte vocabulary, and how often each reading was asked for figures."""
    path = tmp_path / "toy.yaml"
    path.write_text(STUDY)
    monkeypatch.setattr(timing, "OUT", tmp_path / "out")
    model = hf_model(vocab_size=259, max_position_embeddings=1024, head_dim=32, num_hidden_layers=2)
    subject = Subject(model, ByT5Tokenizer(extra_ids=0), Code(), source(), fact_prompts())
    monkeypatch.setattr(accuracy_study, "subject", lambda name, device, dtype: subject)
    return read_study(path)


@torch.no_grad()
def test_a_study_that_was_stopped_goes_on_where_it_was(study, tmp_path, monkeypatch):
    computed = []
    original = Text.row

    def row(self, case, way):
        if len(computed) == 3 and "stopped" not in computed:
            computed.append("stopped")
            raise KeyboardInterrupt
        computed.append(case)
        return original(self, case, way)

    monkeypatch.setattr(Text, "row", row)
    with pytest.raises(KeyboardInterrupt):
        accuracy_study.complete(study, "cpu", Console(quiet=True))
    path = tmp_path / "out" / "study_toy.jsonl"
    where, *saved = map(json.loads, path.read_text().splitlines())
    assert "torch" in where["environment"]
    assert len(saved) == 3
    path.write_text(path.read_text() + '{"model": "toy", "wa')  # what a machine leaves that goes down
    rows = accuracy_study.complete(study, "cpu", Console(quiet=True))
    assert rows[:3] == saved
    assert len(rows) == ROWS
    assert set(Counter(map(about, rows)).values()) == {1}
    assert len(computed) == 1 + 2 * 6
    assert len(path.read_text().splitlines()) == 2 + ROWS
    monkeypatch.setattr(accuracy_study, "subject", lambda *_: pytest.fail("nothing is left to be done"))
    assert accuracy_study.complete(study, "cpu", Console(quiet=True)) == rows

    lines = {title: lines for run in study.runs for title, lines in tables.tables(run, rows)}
    assert [len(of_run) for of_run in lines.values()] == [3, 2, 2, 3]
    magnitude, aware = lines["strategies: toy"]
    more = aware["over_dense"] - magnitude["over_dense"]
    assert float(aware["over_magnitude"].split()[0]) == pytest.approx(more, abs=1e-3)
    assert "over_magnitude" not in magnitude
    dense, half, pruned = lines["texts: toy"]
    assert dense["over_dense"] == pytest.approx(0, abs=1e-5)
    assert 0 < half["kl"] < pruned["kl"]
    mine = [row["figures"] for row in rows if row.get("key_sparsity") == 0.7 and "text" in row]
    assert pruned["over_dense"] == pytest.approx(sum(figures["over_dense"] for figures in mine) / 2)
    assert lines["again: toy"][0]["over_dense"] == pruned["over_dense"]
    pytest.importorskip("matplotlib")
    drawn = [path.name for path in plots.draw_all(study, rows, tmp_path / "plots")]
    assert drawn == ["frontier_toy.svg", "needles_toy.svg", "magnitudes_toy.svg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("runs:", "sort:"), "study sort is unknown; accepted are dtype, models, runs"),
        (("name: texts", "label: texts"), "run label is unknown; accepted are cases, magnitudes, models"),
        (("cases: [{}, {sparsity: [0.3, 0.7], window: 8}]", ""), "a run has no cases; it is {'name': 'texts'"),
        (("window: 8", "windows: 8"), "case windows is unknown; accepted are budget, code, group"),
        (("tokens: 200", "token: 200"), "texts token is unknown"),
        (("[needle]", "[nail]"), "task nail is unknown; accepted are common words"),
        (("[0.3, 0.7]", "[0.3, 1.7]"), r"key_sparsity=1.7 is not accepted; it must be in \[0, 1\)"),
    ],
)
def test_what_no_study_may_say(tmp_path, change, message):
    path = tmp_path / "toy.yaml"
    path.write_text(STUDY.replace(*change, 1))
    with pytest.raises(StudyError, match=message):
        read_study(path)


def test_lists_of_a_case_are_all_its_choices():
    entry = {"sparsity": [0.5, 0.7], "window": [1, 8], "value_sparsity": 0.3}
    assert list(expanded(entry)) == [
        Case(key_sparsity=sparsity, value_sparsity=0.3, window=window) for sparsity in (0.5, 0.7) for window in (1, 8)
    ]


@pytest.mark.parametrize("name", ["short", "full", "codes"])
def test_studies_that_come_along_are_accepted(name):
    study = read_study(timing.OUT.parent / "runs" / f"{name}.yaml")
    assert all(run.cases and run.readings and run.models for run in study.runs)
    for run in study.runs:
        for case in run.cases if "token by token" in run.ways else ():
            assert case.label


def test_intervals():
    samples = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = interval(samples)
    mean = sum(samples) / 400
    assert low < mean < high
    assert half_width(samples) == pytest.approx(1.96 / 20, rel=0.2)
    assert interval(samples) == (low, high)


STORED = [
    {"key_strategy": "output-aware", "key_sparsity": 0.5},
    {"key_sparsity": 0.7, "value_sparsity": 0.3},
    {"sparsity": 0.5, "code": "int8"},
    {"code": "int4 growing"},
    {"key_strategy": "think", "key_sparsity": 0.5},
    *({"value_strategy": name, "value_sparsity": 0.5} for name in VALUES if name != "magnitude"),
]


@pytest.mark.parametrize("entry", mostly_at_night(STORED, 2), ids=lambda entry: " ".join(map(str, entry.values())))
@torch.no_grad()
def test_both_ways_say_the_same(entry):
    """Without a code to rounding, with one to what scales of a bfloat16 come to."""
    (case,) = expanded(entry | {"window": 8})
    tokens = 76 if "channel" in str(entry) else 56  # so many that a group leaves the window in a step
    model = hf_model(num_hidden_layers=1, head_dim=32)
    # No token twice: values of a first layer would be equal, and which of them goes first a matter of rounding.
    ids = 1 + torch.randperm(99, generator=torch.Generator().manual_seed(0))[:tokens]
    in_one = case.hidden_states(model, ids, 44, torch.float32)
    with without_compiler():
        one_by_one = through_backend.token_by_token(model, ids, 44, case)
    torch.testing.assert_close(in_one, one_by_one, rtol=0, atol=1e-4 if case.key_code == "none" else 0.04)
    dense = Case().hidden_states(model, ids, 44)
    assert (in_one - dense)[44:].abs().max() > 0.002  # it matters here


def test_what_the_backend_has_not():
    with pytest.raises(ValueError, match="no setting rounding, sinks"):
        through_backend.options(Case(sinks=4, rounding=1))
