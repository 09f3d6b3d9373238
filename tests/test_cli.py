"""The command line, on a tiny model in a folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from compilers import without_compiler
from models import hf_model
from mustafar_compile.cli import bench
from mustafar_compile.cli.app import COMMANDS, app
from mustafar_compile.cli.output import fail
from mustafar_compile.cli.plan import read_bytes
from mustafar_compile.cli.settings import option_value
from mustafar_compile.cli.streaming import Stream
from mustafar_compile.planning.footprint import BATCH, CONTEXT, CacheTensor, Footprint
from mustafar_compile.settings import read_options, setting_names

TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "tiny_llama" / "tokenizer_config.json"
EXACT = ("--key-sparsity", "0", "--value-sparsity", "0")


def saved(path: Path, layers: int) -> str:
    """A checkpoint whose tokens are bytes."""
    hf_model(num_hidden_layers=layers, vocab_size=259, max_position_embeddings=512).save_pretrained(path)
    shutil.copy(TOKENIZER, path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("one_layer"), 1)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("two_layers"), 2)


def run(*args, code: int = 0, given: str | None = None):
    with without_compiler():
        result = CliRunner().invoke(app, [str(arg) for arg in args], input=given)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def as_json(*args, given: str | None = None) -> dict:
    return json.loads(run(*args, "--json", given=given).stdout)


def test_calibrate_writes_a_budget_that_other_commands_take(folder, tmp_path):
    text, out = tmp_path / "text", tmp_path / "budget.json"
    text.write_text("def add(a, b):\n    return a + b\n" * 5)
    found = as_json("calibrate", folder, "--prompts", text, "--bytes", 0.5, "--out", out, "--tokens", 100)
    assert 0 < found["bytes"] <= 0.5
    given = read_options(None, {"budget": str(out)})[0]
    assert given.at("key_code", 0) == found["layers"]["0"]["key"]["code"]
    by_head = as_json(
        "calibrate", folder, "--prompts", text, "--bytes", 0.5, "--out", out, "--tokens", 100, "--by-head"
    )
    assert by_head["loss"] < found["loss"]
    assert read_options(None, {"budget": str(out)})[0].by_head()
    assert as_json("explain", folder, "--budget", out)["layers"][0]["reason"] == ""
    run("explain", folder, "--budget", text, code=2)
    run("calibrate", folder, "--prompts", text, "--codes", "int5", code=1)


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("key_sparsity", "0.7", 0.7),
        ("key_sparsity", "0.3,0.7", [0.3, 0.7]),
        ("key_sparsity", '{"0": 0.3, "default": 0.7}', {"0": 0.3, "default": 0.7}),
        ("key_sparsity", '{"0": [0.3, 0.7], "default": 0.7}', {"0": [0.3, 0.7], "default": 0.7}),
        ("key_code", "int8", "int8"),
        ("skip_layers", "0", [0]),
        ("skip_layers", "[0, 1]", [0, 1]),
        ("window", 8, 8),
    ],
)
def test_values_of_settings(option, text, value):
    assert option_value(option, text) == value


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "calibrate"])
def test_each_command_has_json_and_an_option_for_each_setting(command):
    text = run(command, "--help").stdout if command == "chat" else CliRunner().invoke(app, [command, "--help"]).stdout
    options = set(re.findall(r"--[\w-]+", text))
    assert {"--json", "--preset"} | {f"--{name.replace('_', '-')}" for name in setting_names()} <= options


def test_explain(two_layers):
    how = ("--skip-layers", "1", "--context", 320, "--dtype", "float16", "--preset", "small", "--key-strategy", "think")
    found = as_json("explain", two_layers, *how)
    first, second = found["layers"]
    assert (first["layer"], first["name"], first["reason"]) == (0, "model.layers.0.self_attn", "")
    assert first["phases"] == ["prefill", "decode"]
    assert first["kept"] == ["8/16 int4 by think", "8/16 int4"]
    assert first["dense_bytes"] == 2 * 321 * 2 * 16 * 2
    assert first["stored_bytes"] < first["dense_bytes"]
    assert "skip_layers" in second["reason"]


@pytest.mark.nightly
def test_explain_shows_layers_that_are_alike_in_one_row(two_layers):
    text = run("explain", two_layers).stdout
    assert "2 of 2 attention layers compressed" in text
    assert re.search(r"0-1 .* model\.layers\.\*\.self_attn .* prefill \+ decode", text)


@pytest.fixture
def measured(monkeypatch) -> None:
    """What ``test_planning.py`` measures, as numbers: it takes a while."""
    tensors = tuple(CacheTensor(0, role, 2, 16, torch.float32, None, True) for role in ("key", "value"))
    footprint = Footprint(10**6, tensors, 300 * BATCH * CONTEXT, BATCH * CONTEXT**2, 100 * BATCH, 512, 1)
    monkeypatch.setattr("mustafar_compile.planning.footprint.measure", lambda config, dtype: footprint)


@pytest.mark.usefixtures("measured")
def test_plan(folder):
    asked = ("--gpu-memory", "1GiB", "--context", 256, "--batch", 2, "--new-tokens", 10, "--window", 8)
    found = as_json("plan", folder, *asked)
    dense, *_, given = found["ways"]
    assert (dense["way"], given["way"]) == ("dense", "as given")
    assert dense["phases"]["prompt"]["cache"] == 2 * 2 * 266 * 2 * 16 * 4
    assert given["peak_bytes"] == max(sum(parts.values()) for parts in given["phases"].values())
    assert {"0.7", "preset safe", "preset balanced", "preset small"} < {way["way"] for way in found["ways"]}
    assert "context" in dense["formulas"]["prompt"]["cache"]


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("command", ["plan", "explain"])
def test_a_layer_that_the_model_does_not_have(folder, command):
    error = run(command, folder, "--key-sparsity", '{"0": 0.3, "5": 0.5, "default": 0.7}', code=1).stderr
    words = "key_sparsity names layer 5, which the model does not have; accepted are layers from 0 to 0"
    assert error.strip().endswith(f"{folder}: {words}")


@pytest.mark.usefixtures("measured")
def test_a_context_that_the_model_limits_is_named_so(folder):
    assert "512 (model's limit)" in run("plan", folder, "--context", 64).stdout


@pytest.mark.parametrize(
    ("text", "count"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5mib", 3 * 2**19), ("7", 7)]
)
def test_sizes(text, count):
    assert read_bytes(text) == count


def test_the_project_is_named_once(capsys):
    for message in ("bytes=5 is not accepted", "mustafar: bytes=5 is not accepted"):
        with pytest.raises(typer.Exit):
            fail(message)
        assert capsys.readouterr().err == "mustafar: bytes=5 is not accepted\n"


def test_generate_beside_dense(folder, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What is written here goes on. " * 4)
    how = ("--prompt", prompt, "--new-tokens", 6, "--compare")
    found = as_json("generate", folder, *how, *EXACT)
    assert found["prompt_tokens"] == 120  # a byte each, and none that ends the text
    assert found["dense"]["tokens"] == found["compressed"]["tokens"]
    assert len(found["dense"]["tokens"]) == 6
    assert found["dense"]["cache"]["compressed_tensors"] == 0
    assert found["compressed"]["cache"]["compressed_tensors"] == 2


@pytest.mark.nightly
def test_generate_streams_what_it_generates(folder):
    shown = run("generate", folder, "--prompt", "-", "--new-tokens", 9, *EXACT, given="Some text")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Some text", return_tensors="pt", add_special_tokens=False).input_ids
    tokens = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    assert shown.stdout == tokenizer.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}") + "\n"
    assert "of dense" in shown.stderr


def test_a_part_of_a_character_is_not_shown(capsys):
    with Stream() as stream:
        for text in ("a", "a\N{REPLACEMENT CHARACTER}", "aé", "aé!"):
            stream.update(text)
    assert capsys.readouterr().out == "aé!\n"


def test_chat_goes_on_from_its_cache(folder):
    """At sparsity 0 a reply is that to the whole conversation."""
    first, second = "Hello there", "And then"
    lines = run("chat", folder, "--new-tokens", 5, *EXACT, "--json", given=f"{first}\n{second}\n").stdout.splitlines()
    replies = [json.loads(line) for line in lines]
    text = f"{first}\n{replies[0]['reply']}\n{second}"
    again = as_json("generate", folder, "--prompt", "-", "--new-tokens", 5, *EXACT, given=text)
    assert replies[1]["reply"] == again["compressed"]["text"]
    assert replies[1]["tokens"] == again["prompt_tokens"] + 4


@pytest.mark.nightly
def test_bench(folder, monkeypatch):
    monkeypatch.setattr(bench, "_compile_dense", lambda model: None)
    found = as_json("bench", folder, "--context", 40, "--batch", 2, "--new-tokens", 4)
    for way, compressed in (("dense", 0), ("compressed", 2)):
        assert found[way]["step_seconds"] > 0
        assert found[way]["tokens_per_second"] == pytest.approx(2 / found[way]["step_seconds"])
        assert found[way]["cache"]["compressed_tensors"] == compressed


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("explain", "./no/model"), 1, "cannot read the config of ./no/model"),
        (("explain", "MODEL", "--window", 0), 2, "window=0 is not accepted"),
        (("explain", "MODEL", "--skip-layers", "x"), 2, "skip_layers='x' is not accepted"),
        (("explain", "MODEL", "--preset", "tiny"), 2, "preset 'tiny' is unknown"),
        (("explain", "MODEL", "--dtype", "int8"), 2, "--dtype int8 is not accepted"),
        (("plan", "MODEL", "--gpu-memory", "much"), 2, "'much' is no size"),
        (("generate", "MODEL", "--prompt", "./no/file"), 1, "cannot read the prompt ./no/file"),
        (("generate", "MODEL", "--prompt", "-"), 1, "the prompt - is empty"),
        (("generate", "MODEL"), 2, "--prompt"),
        (("bench", "MODEL", "--context", 9999), 1, "more than the 512 of this model"),
        (("generate", "./no/model", "--prompt", __file__), 1, "no/model"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_what_is_wrong_is_said(args, code, text, folder):
    result = CliRunner().invoke(app, [folder if arg == "MODEL" else str(arg) for arg in args], env={"COLUMNS": "200"})
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(folder):
    result = CliRunner().invoke(app, ["explain", folder, "--device", "cuda"])
    assert (result.exit_code, "no GPU" in result.stderr) == (1, True)


def test_a_folder_without_a_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / TOKENIZER.name).unlink()
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "model"), "--prompt", __file__])
    assert (result.exit_code, "has no tokenizer" in result.stderr) == (1, True)


def test_a_module_that_runs():
    made = subprocess.run(
        [sys.executable, "-m", "mustafar_compile", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in made.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("exp", ["explain"]),
        ("bench M --key-s", ["--key-sparsity", "--key-strategy"]),
        ("chat M --preset s", ["safe", "small"]),
    ],
)
def test_a_shell_completes_commands_options_and_names(words, found):
    asked = {"_MUSTAFAR_COMPLETE": "complete_bash", "COMP_WORDS": f"mustafar {words}"}
    asked["COMP_CWORD"] = str(len(words.split()))
    assert CliRunner().invoke(app, env=asked, prog_name="mustafar").stdout.split() == found
