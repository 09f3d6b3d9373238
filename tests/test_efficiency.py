"""The efficiency study: its file of runs, rows in processes of their own, largest batches, tables and the report."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import dense
import pytest
import sympy
import timing
import torch
from rich.console import Console
from shapes import build, config_of
from study_files import StudyError

import efficiency_study
import turns
from compilers import without_compiler
from efficiency import child, kernels, largest, markdown, plans, processes, tables
from efficiency.case import LARGEST, Case, options
from efficiency.fp8 import FP8, Fp8Decoder
from efficiency.runs import read_study
from mustafar_compile.planning.footprint import CacheTensor, Footprint
from mustafar_compile.planning.memory import OUTSIDE, WORKSPACES
from nightly import mostly_at_night

STUDY = """
limit_s: 5
runs:
  - name: steps
    measure: step
    shape: tiny
    context: 128
    rows:
      - {way: [dense, hf], batch: [1, 2]}
      - {way: op, setting: [0.5, small], batch: 2}
  - name: generating
    measure: generate
    shape: tiny
    new_tokens: 8
    limit_s: 30
    rows:
      - {way: hf}
      - {way: prepared, setting: 0.7 int8}
"""
TINY = {"shape": "tiny", "batch": 2, "context": 128}
STEP = Case("step", "op", "0.7", **TINY)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "OUT", tmp_path / "out")
    path = tmp_path / "toy.yaml"
    path.write_text(STUDY)
    return read_study(path)


def test_lists_of_a_row_are_all_its_choices(study):
    steps, generating = study.runs
    assert [(case.label, case.batch) for case in steps.cases] == [
        ("best dense step", 1),
        ("best dense step", 2),
        ("HF compiled, static cache", 1),
        ("HF compiled, static cache", 2),
        ("best dense step with our op, 0.5", 2),
        ("best dense step with our op, small", 2),
    ]
    assert [case.new_tokens for case in generating.cases] == [8, 8]
    assert list(study.cases.values()) == [5] * 6 + [30] * 2
    assert all(Case.of(json.loads(json.dumps(case.described()))) == case for case in study.cases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("runs:", "sort:"), "study sort is unknown; accepted are limit_s, runs"),
        (("rows:", "cases:"), "run cases is unknown; accepted are batch, context"),
        (("measure: step", "measure: time"), "measure='time' is not accepted; it must be one of step, first token"),
        (("way: op", "way: eager"), "way='eager' is not accepted; it must be one of hf, dense"),
        (("0.5, small", "0.5, tiny"), r"setting='tiny' is not accepted; it must be a preset \(safe"),
        (("0.7 int8", "0.7 int9"), r"setting='0.7 int9' .* with a code \(none, int8, int4"),
        (("{way: hf}", "{way: hf, setting: 0.5}"), "setting=0.5 is not accepted; it must be left out for hf"),
        (("batch: [1, 2]", "batch: many"), """batch='many' is not accepted; it must be at least 1, or "largest"""),
    ],
)
def test_what_no_study_may_say(tmp_path, change, message):
    path = tmp_path / "toy.yaml"
    path.write_text(STUDY.replace(*change, 1))
    with pytest.raises(StudyError, match=message):
        read_study(path)


def test_settings_are_options_of_the_backend():
    assert options("0.7") == {"key_sparsity": 0.7, "value_sparsity": 0.7, "window": 32}
    assert options("0.5 int4")["value_code"] == "int4"
    assert options("small")["preset"] == "small"


# What stands in for a child: the way of the case says how it ends.
CHILD = """
import json, os, sys, time
request = json.loads(sys.stdin.readline())
if "case" not in request:
    print(json.dumps({"device": "GPU", "bytes": 10**11}))
    sys.exit()
case = request["case"]
with open(os.environ["SEEN"], "a") as file:
    file.write(case["way"] + os.environ.get("CUDA_VISIBLE_DEVICES", "") + "\\n")
if case["way"] == "hf" and "new_tokens" not in case:
    time.sleep(600)
if case["way"] == "op":
    sys.exit(3)
print(json.dumps({"ms": 1.0, "tokens_per_s": 1e3, "peak_GB": 1.0, "device": "CPU", "first_token_ms": 2.0,
                  "tokens_per_s_over": {"8": 1e3}, "kernels": {"gemm": 1.0}, "busy_ms": 1.0}))
"""


def test_each_row_is_a_process_that_may_hang_or_crash(study, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", ("-S", "-c", CHILD))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    study = replace(study, runs=tuple(replace(run, limit_s=1.5) for run in study.runs))
    quiet = Console(quiet=True)
    rows = efficiency_study.complete(study, efficiency_study.missing(study, []), 2, 1, quiet)
    ended = {(case.way, case.measure): figures for case, figures in tables.by_case(rows).items()}
    assert ended["hf", "step"] == {"failed": "more than 1.5 s"}
    assert ended["op", "step"]["failed"].startswith("exit code 3, see ")
    assert ended["dense", "step"]["ms"] == ended["hf", "generate"]["ms"] == 1
    assert len(rows) == 8
    seen = (tmp_path / "seen").read_text().split()
    assert {line[-1] for line in seen} == {"0", "1"}
    assert not efficiency_study.missing(study, rows)
    failed = efficiency_study.missing(study, rows, retry=True)
    assert [case.way for case, *_ in failed] == ["hf", "hf", "op", "op"]
    assert len(efficiency_study.missing(study, rows, again=["generating"])) == 2
    assert len(efficiency_study.complete(study, failed, 2, 1, quiet)) == 8 + 4
    assert len((tmp_path / "seen").read_text().split()) == 8 + 4


def test_rows_enter_as_their_memory_fits_in_order():
    room, order = processes.Room(10), []

    def row(name, needed, release):
        with room.of(needed):
            order.append(name)
            release.wait(5)

    releases = [threading.Event() for _ in range(4)]
    rows = []
    for name, (needed, release) in enumerate(zip([6, 30, 3, 2], releases, strict=True)):
        rows.append(threading.Thread(target=row, args=(name, needed, release)))
        rows[-1].start()
        time.sleep(0.05)
    assert order == [0]  # one that wants all that there is waits for it, and those behind it wait, too
    for i, inside in enumerate([[0, 1], [0, 1, 2, 3]]):
        releases[i].set()
        rows[i].join(5)
        time.sleep(0.05)
        assert sorted(order) == inside
    for release in releases:
        release.set()
    for thread in rows:
        thread.join(5)


TAKES_TURNS = """
import sys, time, turns
for i in range(3):
    with turns.alone():
        print("in", flush=True); time.sleep(0.02); print("out", flush=True)
print(turns.seconds["alone"] >= 0.06)
"""


def test_processes_measure_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv(turns.LOCK, str(tmp_path / "lock"))
    monkeypatch.setenv("PYTHONPATH", str(Path(turns.__file__).parent))
    said = tmp_path / "said"
    with said.open("w") as out:
        running = [subprocess.Popen([sys.executable, "-c", TAKES_TURNS], stdout=out) for _ in range(3)]
        assert [process.wait(20) for process in running] == [0, 0, 0]
    lines = said.read_text().split()
    assert lines.count("True") == 3
    assert [line for line in lines if line != "True"] == ["in", "out"] * 9


def test_the_largest_batch_without_a_gpu_needs_a_memory(study, monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", ("-S", "-c", 'print(\'{"device": "CPU", "bytes": 0}\')'))
    machine = processes.Machine(0, timing.OUT / "logs")
    with pytest.raises(StudyError, match="the largest batch needs memory_GB where there is no GPU"):
        list(machine.measure([(replace(STEP, batch=LARGEST), 5, 0)]))


WEIGHTS, ROW = 16 * 10**9, 2 * 4 * 8192 * 8 * 128 * 2
MEMORY = 40 * 10**9


@pytest.mark.parametrize(("more", "unseen"), [(0.8, 0), (1.0, 0), (1.12, 0), (1.3, 0), (1.0, 0.2)])
def test_the_largest_batch_is_planned_and_tried(monkeypatch, more, unseen):
    """more: what a row takes over what is planned for it. unseen: more of it that no peak shows, as of fragments."""
    tensors = [CacheTensor(i, role, 8, 128, torch.bfloat16, None, True) for i in range(4) for role in ("key", "value")]
    footprint = Footprint(WEIGHTS, tuple(tensors), *[sympy.Integer(0)] * 3, None, 4)
    monkeypatch.setattr(plans, "_footprint", lambda *_: footprint)
    tried = []

    def measured(case):
        tried.append(case.batch)
        peak = WEIGHTS + WORKSPACES + case.batch * more * ROW
        there_is_room = peak + case.batch * unseen * ROW <= MEMORY - OUTSIDE
        return {"peak_GB": peak / 1e9} if there_is_room else {"failed": child.OUT_OF_MEMORY}

    case = Case("step", "dense", batch=LARGEST, context=8192)
    found = largest.search(case, measured, MEMORY)
    fits = int((MEMORY - OUTSIDE - WEIGHTS - WORKSPACES) / ((more + unseen) * ROW))
    assert (0.8 if unseen else 0.96) * fits <= found["batch"] <= fits
    assert len(tried) <= largest.TRIES
    assert found["tries"] == [(batch, batch <= fits) for batch in tried]
    assert tried[0] == pytest.approx(fits * (more + unseen), rel=0.01)
    refused = [batch for batch in tried if batch > fits]
    assert refused == sorted(refused, reverse=True)


@pytest.mark.parametrize(("fits", "tried"), [(13, [13]), (12, [13, 11, 12])])
def test_a_batch_that_is_known_is_tried_first(monkeypatch, fits, tried):
    monkeypatch.setattr(largest, "planned", lambda *_: 15)
    monkeypatch.setattr(largest, "weights_of", lambda *_: WEIGHTS)
    peak = MEMORY / 1e9

    def measured(case):
        return {"peak_GB": peak} if case.batch <= fits else {"failed": child.OUT_OF_MEMORY}

    found = largest.search(replace(STEP, batch=LARGEST), measured, 2 * MEMORY, known=13)
    assert [batch for batch, _ in found["tries"]] == tried
    assert (found["batch"], found["planned"]) == (fits, 15)


def test_a_search_ends_with_what_is_no_lack_of_memory(monkeypatch):
    monkeypatch.setattr(largest, "planned", lambda *_: 7)
    found = largest.search(replace(STEP, batch=LARGEST), lambda case: {"failed": "no such thing"}, MEMORY)
    assert (found["failed"], found["batch"]) == ("no such thing", 7)


@pytest.mark.parametrize("way", mostly_at_night(["dense", "op", "snapkv", "ours"], 2))
def test_a_step_is_measured(way):
    with without_compiler():
        setting = "" if way == "dense" else "0.7"
        figures = child.answer({"case": replace(STEP, way=way, setting=setting).described(), "allocatable": 0})
    assert figures["tokens_per_s"] == pytest.approx(2e3 / figures["ms"])
    assert figures["device"] == "CPU"
    kinds = kernels.by_kind(figures["kernels"], sum(figures["kernels"].values()))
    assert kinds["matmul"] > 0
    assert sum(kinds.values()) == pytest.approx(sum(figures["kernels"].values()))


def test_a_first_token_is_measured():
    figures = child.answer({"case": Case("first token", "eager", **TINY).described(), "allocatable": 0})
    assert figures["first_token_ms"] > 0


def test_generate_is_measured_and_a_missing_peer_is_a_reason():
    case = Case("generate", "eager", new_tokens=10, **TINY)
    figures = child.answer({"case": case.described(), "allocatable": 0})
    assert set(figures["tokens_per_s_over"]) == {"10"}
    assert figures["first_token_ms"] > 0
    missing = child.answer({"case": replace(case, way="quantized hqq").described(), "allocatable": 0})
    assert "HQQ" in missing["failed"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when")])
def test_a_lack_of_memory_is_known(error):
    assert child.reason(error) == child.OUT_OF_MEMORY


def test_layers_that_are_not_compressed_are_no_row(monkeypatch):
    with without_compiler():
        case = Case("generate", "compile", "0.7", new_tokens=4, **TINY)
        monkeypatch.setattr("efficiency.measures.options", lambda setting: {"skip_layers": [0]})
        assert child.answer({"case": case.described(), "allocatable": 0})["failed"].startswith("RuntimeError: 1 of 2")


class PagedAttention:
    """FlashInfer's wrapper, by plain attention over all pages."""

    def __init__(self, batch, heads, *_):
        self.batch, self.group = batch, heads[0] // heads[1]

    def run(self, query, pages):
        key, value = (x.float().unflatten(0, (self.batch, -1)).transpose(1, 2).flatten(2, 3) for x in pages)
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, None].float(), *(x.repeat_interleave(self.group, 1) for x in (key, value))
        )
        return attended[:, :, 0].to(query.dtype)


def test_a_step_over_fp8_attends_to_all_pages_and_the_new_token(monkeypatch):
    monkeypatch.setattr(dense, "planned_flashinfer", PagedAttention)
    with without_compiler(), torch.no_grad():
        decoder = Fp8Decoder(build(config_of("tiny", 64)), batch=2, context=64)
        plain = [cache.float() for cache in decoder.caches]
        decoder.step()
    for before, after in zip(plain, decoder.caches, strict=True):
        changed = (before != after.float()).any(-1).any(2).any(0).nonzero().tolist()
        assert [page for page, _ in changed] == [3, 7]
        assert {place for _, place in changed} == {15}
    assert torch.equal(decoder.caches[-1][:, [3, 7], :, -1].float(), decoder.row[:, :, :, 0].to(FP8).float())
    with pytest.raises(ValueError, match="context=65 is not accepted; it must be a multiple of 16"):
        Fp8Decoder(None, 2, 65)


def row_of(case, **figures):
    return {**case.described(), "figures": {"device": "H100", **figures}}


def step(way, setting="", size=32, **figures):
    case = Case("step", way, setting, batch=size, context=8192)
    return row_of(case, **{"ms": 10.0, "peak_GB": 50.0, "kernels": {"gemm": 9.0}, "busy_ms": 9.0, **figures})


def generated(way, setting="", **figures):
    case = Case("generate", way, setting, shape="llama-2-7b", batch=4, context=2048, new_tokens=2048)
    return row_of(case, ms=9.0, peak_GB=20.0, **figures)


ROWS = [
    step("dense", tokens_per_s=3200.0),
    step("hf", tokens_per_s=800.0, peak_GB=55.0),
    step("op", "0.7", tokens_per_s=4000.0, peak_GB=30.0),
    step("ours", "0.7", tokens_per_s=2560.0, peak_GB=30.0),
    step("op", "0.7", size=4, tokens_per_s=700.0),
    row_of(Case("step", "dense", batch=4, context=8192), failed="more than 150 s"),
    step("dense", size=LARGEST, tokens_per_s=1e3, batch=10, tries=[[9, True], [10, True]], planned=9),
    step("op", "0.7", size=LARGEST, tokens_per_s=2.5e3, batch=25, tries=[[25, True]], planned=25),
    row_of(Case("loss", "ours", "0.7", shape="smollm2", new_tokens=64), **{"over_dense": 0.1, "+-": 0.01, "kl": 0.1}),
    generated("hf", first_token_ms=250.0, tokens_per_s=400.0, tokens_per_s_over={"512": 410.0}),
    generated("prepared", "0.5", first_token_ms=260.0, tokens_per_s=600.0, tokens_per_s_over={"512": 615.0}),
]


def test_gains_are_over_peers_of_the_same_size_and_device():
    found = tables.by_case(ROWS)
    over = {(line["way"], line["batch"]): line["over"] for line in tables.gains(found)}
    assert over["best dense step with our op, 0.7", "32"] == {"best dense step": 1.25, "HF compiled, static cache": 5.0}
    assert over["best dense step with our op, 0.7", "25 (largest, planned 25)"] == {"best dense step": 2.5}
    assert ("best dense step with our op, 0.7", "4") not in over
    elsewhere = [{**ROWS[0], "figures": ROWS[0]["figures"] | {"device": "H200"}}, *ROWS[1:]]
    over = {(line["way"], line["batch"]): line["over"] for line in tables.gains(tables.by_case(elsewhere))}
    assert over["best dense step with our op, 0.7", "32"] == {"HF compiled, static cache": 5.0}


def test_where_a_peer_is_better_is_said_with_both_figures():
    lines = tables.losing(tables.by_case(ROWS))
    told = [(line["way"], line["peer"], line["quantity"], line["theirs"], line["ours"]) for line in lines]
    assert told == [
        ("HF's model, our backend, 0.7", "best dense step", "tokens a second", 3200.0, 2560.0),
        ("prepare(model), 0.5", "HF compiled, static cache", "ms to the first token", 250.0, 260.0),
    ]
    assert (lines[0]["loss"], lines[1]["loss"]) == (0.1, None)


def test_the_papers_table_stands_beside_ours():
    (table,) = tables.table_14(tables.by_case(ROWS))
    assert table["paper"][2]["gains"][2048] == pytest.approx(95.120 / 79.185)
    assert [entry["gains"] for entry in table["here"]] == [{512: 1}, {512: 1.5}]


def test_calls_of_fewer_tokens_are_no_part_of_the_papers_table():
    short = generated("prepared", "0.7", first_token_ms=1.0, tokens_per_s=9.0, tokens_per_s_over={"128": 9.0})
    (table,) = tables.table_14(tables.by_case([*ROWS, short]))
    assert len(table["here"]) == 2
    assert tables.table_14(tables.by_case([short])) == []


def test_the_report_is_one_file(study, tmp_path):
    pytest.importorskip("matplotlib")
    from efficiency import report

    path = tmp_path / "all.yaml"
    cases = [Case.of(row).described() for row in ROWS]
    runs = [{"name": f"run {i}", "rows": [case]} for i, case in enumerate(cases)]
    path.write_text(json.dumps({"runs": runs}))
    page = report.html(read_study(path), ROWS)
    assert page.count("data:image/svg+xml;base64,") == 5
    assert "more than 150 s" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "There are no rows to compare yet" in report.html(study, [])


def test_a_document_gets_the_tables_between_its_marks(tmp_path):
    page, path = tmp_path / "page.md", tmp_path / "all.yaml"
    steps = [Case.of(row).described() for row in ROWS if row["measure"] == "step"]
    runs = [{"name": "steps", "rows": steps[:4]}, {"name": "none yet", "rows": steps[5:6]}]
    path.write_text(json.dumps({"runs": runs}))
    page.write_text(f"# Page\n{markdown.BEGIN}\nold\n{markdown.END}\nmore\n")
    for _ in range(2):
        markdown.replace(page, read_study(path), ROWS[:4])
    lines = page.read_text().splitlines()
    assert (lines[0], lines[1], lines[-2:]) == ("# Page", markdown.BEGIN, [markdown.END, "more"])
    assert "**steps** (shape llama-3-8b, batch 32, context 8192):" in lines
    assert "| best dense step with our op, 0.7 | 10 | 4000 | 30 | 1.25 | 5 |  |" in lines
    assert "tokens a second | best dense step | 3200 | 0 | HF's model, our backend, 0.7 | 2560" in page.read_text()
    assert "none yet" not in page.read_text()
    page.write_text("nothing")
    with pytest.raises(StudyError, match=r"page\.md has no lines <!-- efficiency study: begin"):
        markdown.replace(page, read_study(path), ROWS)
    with pytest.raises(StudyError, match=r"other\.md cannot be read"):
        markdown.around(page.with_name("other.md"))


def test_a_document_without_the_marks_is_refused_before_anything_is_measured(study, tmp_path, monkeypatch, capsys):
    path = tmp_path / "toy.yaml"
    monkeypatch.setattr(efficiency_study, "complete", lambda *_: pytest.fail("it is measured"))
    monkeypatch.setattr(sys, "argv", ["efficiency_study.py", str(path), "--markdown", str(tmp_path / "none.md")])
    with pytest.raises(SystemExit):
        efficiency_study.main()
    assert "none.md cannot be read" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_study_from_the_file_to_the_report(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(timing, "OUT", tmp_path / "out")
    path = tmp_path / "whole.yaml"
    path.write_text(
        STUDY.replace("limit_s: 5", "limit_s: 300").replace("limit_s: 30", "limit_s: 300")
        + "  - {name: most, measure: step, shape: tiny, batch: largest, context: 1024, memory_GB: 0.71,\n"
        + "     rows: [{way: dense}]}\n"
    )
    monkeypatch.setattr(sys, "argv", ["efficiency_study.py", str(path)])
    efficiency_study.main()
    rows = tables.by_case(efficiency_study.results_of(read_study(path)).rows)
    assert len(rows) == 9
    assert not [figures for figures in rows.values() if "failed" in figures]
    assert "data:image/svg" in (tmp_path / "out" / "efficiency_whole.html").read_text()
