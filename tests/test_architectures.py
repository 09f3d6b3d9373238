"""A few rows of the table of architectures, and what they rest on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import architectures
import architectures_page
from architectures import ARCHITECTURES, QUANTIZED, Generated, build, generate, main, measure
from architectures_page import INT8, Outcome, changes, read_table, rewritten
from nightly import at_night
from reference import pruned_generation

pytestmark = pytest.mark.usefixtures("no_grad")
TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"


@pytest.mark.parametrize(
    ("name", "attention", "cache", "found", "compressed"),
    [
        ("gpt_bigcode", "sdpa", "static", 2, 2),
        *at_night(
            [
                ("gptj", "eager", "dynamic", 2, 2),
                ("olmo3", "eager", "static", 2, 1),
                ("bart", "sdpa", "dynamic", 4, 2),
            ]
        ),
    ],
)
def test_outcome(name, attention, cache, found, compressed):
    outcome = measure(name, attention, cache)
    assert (outcome.found, outcome.compressed, outcome.error) == (found, compressed, "")
    assert not outcome.is_wrong
    assert bool(outcome.reasons) == (compressed < found)


@pytest.mark.parametrize(
    ("name", "attention", "cache", "error"),
    [
        ("gpt_oss", "sdpa", "dynamic", "does not support .*scaled_dot_product_attention"),
        ("gpt_neo", "eager", "static", "something else with a static cache"),
    ],
)
def test_what_transformers_does_not_run_right_is_its_outcome(name, attention, cache, error):
    outcome = measure(name, attention, cache)
    assert re.search(error, outcome.error)
    assert not outcome.is_wrong


def test_pruning_matters_to_the_models():
    model = build("llama", "sdpa")
    dense = generate(model)
    with pruned_generation(0.5, 0.5, 4, layers={1}):
        one_layer = generate(model)
    with pruned_generation(0.5, 0.5, 4):
        both = generate(model)
    assert dense.agrees(generate(model))
    assert not dense.agrees(one_layer)
    assert not one_layer.agrees(both)


def test_tokens_may_part_at_a_tie_only():
    logits = torch.tensor([[[1.0, 1.0], [0.0, 3.0]]])
    one = Generated(torch.tensor([[0, 1]]), logits)
    tie = Generated(torch.tensor([[1, 1]]), logits + torch.tensor([[[0.0, 1e-5], [5.0, 0.0]]]))
    assert one.agrees(tie)
    assert not one.agrees(replace(one, logits=logits + torch.tensor([[[0.0, 0.1], [0.0, 0.0]]])))
    assert not one.agrees(replace(one, logits=logits + torch.tensor([[[0.0, 0.0], [0.0, 0.1]]])))


def test_changes_of_the_table():
    """Of words, rounding and versions there may be others; what is compressed must be the same."""
    page = TABLE.read_text()
    assert changes(page.replace("sliding window of 6", "window"), page, ARCHITECTURES) == []
    assert len(read_table(page)) > 2 * len(ARCHITECTURES)
    fewer = page.replace("| llama | all | 2 | 2 |", "| llama | sdpa dynamic, eager dynamic | 2 | 1 |")
    assert [line.split(":")[0] for line in changes(fewer, page, ["llama", "mistral"])] == [
        "llama eager dynamic", "llama eager static", "llama sdpa dynamic", "llama sdpa static",
    ]  # fmt: skip
    assert "are not run" in changes(fewer, page, ["llama"])[1]
    assert changes(fewer, page, ["mistral"]) == []


def test_a_table_of_which_nothing_is_measured_stays(monkeypatch):
    monkeypatch.setattr(architectures_page, "version", lambda package: "1.0")
    found = Outcome(found=3, compressed=1, exact=True, pruned=True, reasons=("why",))
    rows = [("llama", "sdpa", "static", found), ("llama", "eager", "static", Outcome(error="not so"))]
    plain, heading, quantized = TABLE.read_text().partition("## With int8 weights\n")
    page = rewritten(plain + heading + quantized, rows)
    assert page.endswith(heading + quantized)
    assert "| llama | sdpa static | 3 | 1 | yes | yes | why |\n" in page
    assert "| llama | eager static | not so |\n" in page
    page = rewritten(plain + heading + quantized, [(name + INT8, *rest) for name, *rest in rows])
    assert page.startswith(plain + heading)
    assert page.endswith(
        "| llama int8 | sdpa static | 3 | 1 | yes | yes | why |\n"
        "| llama int8 | eager static | - | - | - | - | not so |\n"
    )


@pytest.fixture
def without_torchao(monkeypatch):
    """And nothing is measured."""
    measured = []
    monkeypatch.setattr(architectures, "_has_torchao", lambda: False)
    monkeypatch.setattr(architectures, "measure_all", lambda names, workers: measured.extend(names) or [])
    return measured


def test_without_torchao_what_needs_it_is_left_out(without_torchao, capsys):
    main([])
    assert without_torchao == list(ARCHITECTURES)
    assert "left out: torchao is not installed, which llama int8, " in capsys.readouterr().out


def test_without_torchao_what_needs_it_is_refused(without_torchao, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "llama", "llama int8"])
    assert "pip install '.[architectures]'" in capsys.readouterr().err
    assert not without_torchao


@pytest.mark.nightly
def test_quantized_weights():
    pytest.importorskip("torchao")
    outcome = measure("llama int8", "sdpa", "static")
    assert (outcome.found, outcome.compressed) == (2, 2)
    assert not outcome.is_wrong
    plain, quantized = (generate(build(name, "sdpa")) for name in ("llama", "llama int8"))
    assert not plain.agrees(quantized)


def test_the_tables_hold_every_architecture_and_nothing_wrong():
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.read_text().splitlines()]
    rows = [row for row in cells if len(row) == 7 and re.match("all|sdpa|eager", row[1])]
    assert {row[0] for row in rows} == {*ARCHITECTURES, *QUANTIZED}
    assert {answer for row in rows for answer in row[4:6]} == {"yes"}
    assert all(row[6] for row in rows if row[2] != row[3])
