"""lm-evaluation-harness with our settings: against eager models over pruned caches. Model and tasks are local."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from compilers import without_compiler
from mustafar_compile import explain
from reference import pruned_generation

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: see the extra `integrations`")

from lm_eval.tasks import TaskManager  # noqa: E402

from mustafar_compile.integrations.lm_eval import MustafarLM, cli_evaluate  # noqa: E402

pytestmark = pytest.mark.nightly

MODEL = Path(__file__).parent.parent / "examples" / "tiny_llama"
SPARSITY, WINDOW = 0.7, 8
SETTINGS = {"key_sparsity": SPARSITY, "value_sparsity": SPARSITY, "window": WINDOW}
FACTS = {"orchid": "7f3a91", "onyx": "40c2de"}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {facts}}}}}
test_split: test
doc_to_text: '{{{{text}}}}'
target_delimiter: ''
"""
GENERATION = """
output_type: generate_until
doc_to_target: '{{answer}}'
generation_kwargs: {until: ['"'], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: '{{[answer, other]}}'
doc_to_target: 0
metric_list: [{metric: acc}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A folder of two tasks over the same facts: one generates, one compares log-likelihoods."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    table = "".join(f'SERVICE_PORTS["{name}"] = "{value}"\n' for name, value in FACTS.items())
    lines = [
        {"text": f'{table}\nassert SERVICE_PORTS["{name}"] == "', "answer": value, "other": value[::-1]}
        for name, value in FACTS.items()
    ]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, rest in (("generation", GENERATION), ("choice", CHOICE)):
        text = TASK.format(name=f"facts_{name}", facts=folder / "facts.jsonl") + rest
        (folder / f"{name}.yaml").write_text(text)
    return folder


def evaluated(model: str, tasks: Path, **arguments) -> dict:
    """What the harness says of each document: the answers to a task that generates, log-likelihoods of choices."""
    given = {"pretrained": str(MODEL), "dtype": "float32", "device": "cpu", "add_bos_token": False, **arguments}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["facts_generation", "facts_choice"]
    result = lm_eval.simple_evaluate(model, given, names, task_manager=manager, bootstrap_iters=0)
    return {name: [sample["filtered_resps"] for sample in result["samples"][name]] for name in names}


def test_a_task_says_what_the_pruned_model_says(tasks):
    """Greedy text of the oracle, and log-likelihoods of the oracle step by step."""
    with without_compiler(), explain() as report:
        ours = evaluated("mustafar", tasks, **SETTINGS)
    assert report.matched
    assert not report.missed
    with pruned_generation(SPARSITY, SPARSITY, WINDOW):
        eager = evaluated("hf", tasks)  # whose log-likelihoods are dense: there is no step in one forward
    assert ours["facts_generation"] == eager["facts_generation"]
    likelihoods = of_choices(ours)
    assert (likelihoods - of_choices(eager)).abs().max() > 1e-2
    torch.testing.assert_close(likelihoods, step_by_step(tasks), rtol=1e-3, atol=1e-3)


def of_choices(said: dict) -> torch.Tensor:
    """Log-likelihoods [documents, choices]."""
    return torch.tensor([[choice[0] for choice in document] for document in said["facts_choice"]])


def step_by_step(tasks: Path) -> torch.Tensor:
    """The log-likelihood of each choice, a token at a time over a pruned cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        AutoTokenizer.from_pretrained(MODEL),
    )
    found = []
    for line in (tasks / "facts.jsonl").read_text().splitlines():
        fact = json.loads(line)
        context = len(tokenizer(fact["text"], add_special_tokens=False)["input_ids"])
        for choice in (fact["answer"], fact["other"]):
            text = tokenizer(fact["text"] + choice, add_special_tokens=False, return_tensors="pt")
            ids, past, total = text["input_ids"], None, 0.0
            with torch.no_grad(), pruned_generation(SPARSITY, SPARSITY, WINDOW):
                for i in range(ids.shape[1] - 1):
                    out = model(ids[:, i : i + 1], past_key_values=past, use_cache=True)
                    past = out.past_key_values
                    total += out.logits[0, -1].log_softmax(-1)[ids[0, i + 1]].item() if i + 1 >= context else 0
            found.append(total)
    return torch.tensor(found).view(-1, 2)


def test_at_sparsity_0_it_is_the_model_of_the_harness(tasks):
    with without_compiler():
        ours = evaluated("mustafar", tasks, key_sparsity=0, value_sparsity=0, window=WINDOW)
    dense = evaluated("hf", tasks)
    assert ours["facts_generation"] == dense["facts_generation"]
    torch.testing.assert_close(of_choices(ours), of_choices(dense), rtol=1e-4, atol=1e-4)


def test_the_command_line(tasks, tmp_path, monkeypatch):
    model = ",".join(f"{k}={v}" for k, v in {"pretrained": MODEL, "dtype": "float32", **SETTINGS}.items())
    arguments = f"run --model mustafar --model_args {model} --tasks facts_choice --device cpu".split()
    arguments += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    with without_compiler():
        cli_evaluate()
    [result] = (tmp_path / "out").rglob("results*.json")
    assert "facts_choice" in json.loads(result.read_text())["results"]


def test_settings_are_checked_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="key_sparsity=1 is not accepted"):
        MustafarLM("no/such/model", key_sparsity=1)
