"""Train a model for the accuracy study: a Llama of bytes with KV heads of 128 channels that does the study's tasks.

    python benchmarks/train_study_model.py --out benchmarks/out/study_model

It reads the Python source that is installed (the standard library, torch, transformers and what they bring along), with
facts and the tasks of ``accuracy/tasks.py`` in it; the modules that the study reads are left out. Seven minutes on one
H100. The weights are saved in bfloat16, in files of at most 15 MB (47 MB in all).
"""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import accuracy  # noqa: F401  # finds the examples
import train_tiny_llama as base
from accuracy.case import Case
from accuracy.dialects import Code
from accuracy.readings import Questions
from accuracy.tasks import TASKS, Prompts

MODEL = base.MODEL | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
PACKAGES = "torch", "transformers", "sympy", "numpy", "networkx", "setuptools", "pip"
STAGES = (
    base.Stage(until=0.20, length=512, share=0.7, facts_per_kib=6.0),
    base.Stage(until=0.45, length=1536, share=0.7, facts_per_kib=4.0),
    base.Stage(until=1.00, length=4608, share=0.7, facts_per_kib=2.0),
)
TASK_SHARE = 0.6  # of the sequences; the others are as the demo's model has them
TASK_BYTES = 1000  # of a sequence for each task in it
WORD_BYTES = 28  # of a line of a list
LENGTHS = 1024, 2048, 4096
DIALECT = Code()


def corpus() -> bytes:
    """All source but what the study reads."""
    found = [spec.origin for name in PACKAGES if (spec := importlib.util.find_spec(name)) and spec.origin]
    sources = [path.read_bytes() for origin in found for path in sorted(Path(origin).parent.rglob("*.py"))]
    random.Random(0).shuffle(sources)
    end = bytes([base.FILE_END])
    return base.read_modules(held_out=False) + b"".join(source.replace(b"\r\n", b"\n") + end for source in sources)


def sequence(rng: random.Random, text: bytes, stage: base.Stage) -> tuple[bytes, bytes]:
    """One sequence of ``stage.length + 1`` bytes, and a mark for each byte of an answer."""
    if rng.random() >= TASK_SHARE:
        return base.training_sequence(rng, text, stage)
    length = stage.length + 1
    start = rng.randrange(len(text) - length)
    inserts: list[base.Insert] = []
    for _ in range(max(1, rng.randint(0, 2 * length // TASK_BYTES))):
        inserts += task_lines(rng, rng.choice(list(TASKS)), length)
    return base.squeezed(text[start : start + length], inserts)


def task_lines(rng: random.Random, name: str, length: int) -> list[base.Insert]:
    """The lines of one task somewhere in so many bytes, and the question with its answer behind them."""
    task = TASKS[name](rng, DIALECT, rng.random())
    distance = math.exp(rng.uniform(math.log(min(200, length / 2)), math.log(length)))
    start = rng.uniform(0, length - distance)
    inserts: list[base.Insert] = [(start + place * distance, fact.encode(), b"") for place, fact in task.facts]
    if task.pieces:
        listed = "".join(task.pieces[: int(min(distance, length / 2) / WORD_BYTES)])
        inserts.append((start, listed.encode(), b""))
    answer = "".join(task.asked.answers)
    question = base.asking(task.asked.said.encode(), answer, DIALECT.end(task.asked))
    return [*inserts, (start + distance, *question)]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, prompts: int) -> None:
    """Print what the model can do over a dense cache."""
    print(f"held-out modules: {base.bits_per_byte(model, base.read_modules(held_out=True)):.3f} bits/byte", flush=True)
    made = Prompts(ByT5Tokenizer(extra_ids=0), DIALECT)
    for name in TASKS:
        for length in LENGTHS:
            asked = [made.prompt(name, length, seed / prompts, seed) for seed in range(prompts)]
            figures = Questions(model, asked).row(Case())
            print(f"{name}, {length} bytes: {figures['score']:.1%} right, {figures['nats']:.3f} nats", flush=True)


def main() -> None:
    """Run from the command line."""
    args = base.parser(__doc__, minutes=7.0).parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    text = corpus()
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {len(text) / 1e6:.0f} MB of source", flush=True)
    recipe = base.Recipe(sequence, STAGES, learning_rate=1.5e-3, weight_decay=0.1)
    steps, tokens = base.train(model, text, recipe, args)
    print(f"{steps} steps, {tokens / 1e6:.0f} M tokens", flush=True)
    ByT5Tokenizer(extra_ids=0).save_pretrained(args.out)
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size="15MB")
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    evaluate(saved, args.prompts // 10 or 1)


if __name__ == "__main__":
    main()
