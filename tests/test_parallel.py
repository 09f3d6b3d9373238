"""Models of whose layers each rank holds a part: tensor parallelism over two processes on a CPU."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import parallel_checks as checks
from models import hf_model, prompt
from nightly import at_night
from ranks import SECONDS, made_once, outcomes, results_of
from reference import pruned_generation

STEPS = [("prefill", "decode")]
ONE_LAYER = {"num_hidden_layers": 1}


def hf(*case, **changes):
    return functools.partial(checks.tokens_of, **changes), *case


DAILY = {
    "dynamic": hf("llama", "dynamic", 0.7, **ONE_LAYER),
    "static": hf("llama", "static", 0.0, **ONE_LAYER),
    "own": (checks.own_loop, 0.7),
    "recorded": (checks.recorded,),
    "not recorded": (checks.not_recorded,),
    "other settings": (checks.other_settings,),
    "heads of ranks": (checks.heads_of_ranks,),
    "a refused setting": (checks.a_refused_setting,),
    "another reason": (checks.another_reason,),
    "another graph": (checks.another_graph,),
    "the same reason": (checks.the_same_reason,),
    "a silent rank": (checks.a_silent_rank,),
    "parts on disk": (checks.parts_on_disk,),
    "one report": (checks.one_report,),
    "a killed rank": (checks.a_killed_rank,),
}


@functools.cache
def daily():
    """What two ranks got of all checks. They are started once."""
    return made_once("two_ranks", lambda: results_of(DAILY))


def of_both(name):
    return [results.get(name) for results in daily()]


def expected(sparsity, family="llama", padded=True, **changes):
    """Tokens of one process: by the oracle."""
    with torch.no_grad(), pruned_generation(sparsity, sparsity, checks.WINDOW):
        inputs = prompt(padded=padded)
        return hf_model(family, **changes).generate(**inputs, max_new_tokens=checks.NEW, do_sample=False)


@pytest.mark.parametrize(("name", "sparsity"), [("dynamic", 0.7), ("static", 0.0)])
def test_hugging_face_models(name, sparsity):
    for tokens, phases, (mine, together), _ in of_both(name):
        assert torch.equal(tokens, expected(sparsity, **ONE_LAYER))
        assert phases == STEPS
        assert together == 2 * mine


def test_an_own_loop():
    for tokens, phases in of_both("own"):
        assert torch.equal(tokens, expected(0.7, padded=False, **ONE_LAYER))
        assert phases == STEPS


def test_recordings_with_collectives():
    for tokens, phases, *_, recordings, watched in of_both("recorded"):
        assert torch.equal(tokens, expected(0.7, **ONE_LAYER))
        assert phases == STEPS
        assert recordings == 1
        assert watched == [SECONDS] * (checks.NEW - 2), "each step but the first, which is not recorded"


def test_other_settings_end_all_ranks_with_one_error():
    for error in of_both("other settings"):
        assert "RanksDisagreeError" in error
        assert "They differ in key_sparsity. Rank 0: 0.5. Rank 1: 0.7." in error


def test_heads_that_ranks_have_are_not_known_by_their_numbers():
    for error in of_both("heads of ranks"):
        assert "key_sparsity by KV head is given for a graph of which 2 ranks have a part each" in error


def test_an_error_of_one_rank_is_told_to_the_others():
    other, failed = of_both("a refused setting")
    assert "rank 1 could not compile a graph that waits for other ranks: ValueError: mustafar: window=0" in other
    assert "RanksDisagreeError" not in failed


def test_another_reason_ends_all_ranks_with_one_error():
    for error in of_both("another reason"):
        assert "They differ in attention 0" in error
        assert "Rank 1: gradients are enabled" in error


def test_other_collectives_end_all_ranks_with_one_error():
    for error in of_both("another graph"):
        assert "They differ in collectives. Rank 0: 1 all_reduce. Rank 1: 2 all_reduce." in error


def test_ranks_with_the_same_reason_run_dense():
    for reasons in of_both("the same reason"):
        assert reasons == ["gradients are enabled; compile and run under torch.no_grad()"]


def test_a_rank_that_compiles_nothing_is_waited_for_as_long_as_the_group_waits():
    (error, seconds), _ = of_both("a silent rank")
    assert "rank 1 compiled none" in error
    assert checks.SHORT <= seconds < 4 * checks.SHORT


def test_a_killed_rank_ends_the_others():
    error, seconds = of_both("a killed rank")[0]
    assert error
    assert seconds < 5 * checks.SHORT


def test_parts_are_loaded_by_the_ranks_that_saved_them():
    for rank, (same, error) in enumerate(of_both("parts on disk")):
        assert same == [True, True]
        assert "has no part rank-0-of-1 of a KV cache; it has" in error, rank


def test_one_rank_prints_the_report_and_what_is_different():
    first, second = of_both("one report")
    assert second == ["", ""]
    assert "1 of 1 attention layers compressed" in first[0]
    assert first[0].endswith("the same on all 2 ranks\n")
    assert first[1].endswith("note: of rank 0\nrank 1: note: of rank 1\n")


def test_ranks_that_do_not_wait_by_nccl_are_not_recorded():
    for launching in of_both("not recorded"):
        (text,) = launching
        assert text.endswith("CUDA graphs: its ranks wait for each other by gloo; accepted is nccl")


HEADS = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
NIGHTLY = [
    ("qwen3", "static", 2, {}),
    ("mixtral", "dynamic", 2, {}),
    ("llama", "static", 3, HEADS),
    ("llama", "dynamic", 2, {"compiler": nullcontext}),
]


@pytest.mark.parametrize(("family", "cache", "ranks", "changes"), at_night(NIGHTLY))
def test_other_models(family, cache, ranks, changes):
    sizes = {name: size for name, size in changes.items() if name != "compiler"}
    for result in results_of({"": hf(family, cache, 0.7, **changes)}, ranks):
        tokens, phases, *_ = result[""]
        assert torch.equal(tokens, expected(0.7, family, **sizes))
        assert phases == 2 * STEPS


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
GPUS = torch.cuda.device_count()
needs_two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
ON_GPUS = {"dynamic": 0.7, "static": 0.0}


@needs_two_gpus
def test_errors_on_gpus():
    names = ["other settings", "another reason", "another graph", "a silent rank", "parts on disk"]
    first, second = results_of({name: DAILY[name] for name in names}, on_gpus=True, seconds=90)
    for name in names[:3]:
        assert all("They differ in" in result[name] for result in (first, second)), (name, first[name], second[name])
    assert "rank 1 compiled none" in first["a silent rank"][0]
    assert all(result["parts on disk"][0] == [True, True] for result in (first, second)), first["parts on disk"]


@needs_two_gpus
@pytest.mark.parametrize("cache", ON_GPUS)
def test_steps_on_gpus_are_cuda_graphs_with_collectives(cache):
    check = hf("llama", cache, ON_GPUS[cache], compiler=nullcontext, **ONE_LAYER)
    for result in results_of({cache: check}, on_gpus=True, seconds=100):
        tokens, phases, _, launching = result[cache]
        assert torch.equal(tokens, expected(ON_GPUS[cache], **ONE_LAYER))
        assert phases == STEPS
        assert launching == ["decode steps run as CUDA graphs"]


KILLED = Path(__file__).with_name("killed_rank.py")


def environment(on):
    return {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"CUDA_VISIBLE_DEVICES": ""} if on == "cpus" else {})


on_each = pytest.mark.parametrize("on", [pytest.param("gpus", marks=needs_two_gpus), *at_night(["cpus"])])


@on_each
def test_torchrun_ends_all_when_a_rank_is_killed_in_mid_generation(on):
    ((code, text),) = outcomes([([*TORCHRUN, KILLED], environment(on))], seconds=180)
    assert code != 0
    assert "the second rank is killed" in text
    assert "Signal 9 (SIGKILL)" in text
    assert "went on" not in text


@on_each
def test_a_rank_ends_by_itself_when_the_other_is_killed_in_mid_generation(on, tmp_path):
    """Where no launcher ends it. Of a CUDA graph that waits for others, a thread sees how long it does."""
    alike = environment(on) | {"WORLD_SIZE": "2", "STORE": f"file://{tmp_path}/store"}
    ranks = [([sys.executable, KILLED], alike | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    (code, text), (killed, text_of_killed) = outcomes(ranks, seconds=180)
    assert killed == -signal.SIGKILL, text_of_killed
    assert code not in (0, killed)
    assert "went on" not in text
    if on == "gpus":
        assert "a decode step has waited for other ranks for 30 s" in text


@pytest.mark.nightly
@pytest.mark.parametrize(("ranks", "heads"), [(4, {}), (2, HEADS)])
def test_heads_that_cannot_be_dealt_out_are_an_error_of_transformers(ranks, heads):
    for result in results_of({"": hf("llama", "dynamic", 0.7, **ONE_LAYER, **heads)}, ranks):
        assert "is invalid for input of size" in result[""]


@pytest.mark.nightly
@pytest.mark.parametrize("way", ["own", "hf"])
def test_the_example(way):
    if way == "hf":
        pytest.importorskip("accelerate")
    given = [checks.EXAMPLE, "--ways", way, "--new-tokens", "6"]
    out = subprocess.run([*TORCHRUN, *given], capture_output=True, text=True, check=True).stdout
    assert f"{way}, compressed: '7f3a91'" in out
    assert "tokens are the same on all ranks: True" in out
    assert "6 of 6 attention layers compressed" in out


@pytest.mark.nightly
def test_ranks_that_hang_say_where():
    with pytest.raises(RuntimeError, match="took longer than 20 s") as caught:
        results_of({"dreaming": (checks.a_long_sleep,)}, seconds=20)
    assert all(f"--- rank {rank}" in str(caught.value) for rank in range(2))
    assert "in a_long_sleep" in str(caught.value)
