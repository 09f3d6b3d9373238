# SPDX-License-Identifier: Apache-2.0
"""Train the tiny byte-level Llama that the demo uses.

The model reads Python source code, byte by byte. Its text is the standard
library of the Python that runs this script, so nothing is downloaded. Real
code alone seldom needs bytes from far back, so a part of the sequences also
carry facts and, later, lines that ask for them:

    SERVICE_PORTS["orchid"] = "7f3a91"
    ...
    assert SERVICE_PORTS["orchid"] == "7f3a91"

The value is random, so the model can only know it from its KV cache. That
makes it a fair test for a compressed cache.

    python examples/train_tiny_llama.py --minutes 1 --out examples/tiny_llama

On one H200 one minute is enough. More is worse: the standard library is small,
and after some twenty passes the model begins to learn it by heart (a run of five
minutes, with a weight decay of 0.1, ended at 2.9 bits per byte on the held-out
modules instead of 1.2). The script also runs on a CPU, very slowly.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import string
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

# Modules that the model never trains on: the demo and the evaluation use them.
HELD_OUT = ("textwrap", "heapq", "bisect", "shlex")
# Folders with tests, other people's code, or tables instead of code.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
    "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "_bundled",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "stringprep", "entities", "__phello__")

# Sizes: 3.9 million parameters, 7.8 MB in bfloat16.
MODEL = {
    "vocab_size": 259,  # ByT5Tokenizer: pad, eos, unk, then the 256 bytes
    "hidden_size": 256,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
BYTE_OFFSET = 3  # a byte b is the token b + 3
FILE_END = 0  # this byte ends each file and becomes the eos token

WARMUP_STEPS = 200
VALUE_WEIGHT = 5.0  # a byte of an asked-for value counts as much as five others
LOG_EVERY = 100  # steps

TABLES = ("SERVICE_PORTS", "BUILD_IDS", "USER_TOKENS", "COLOR_CODES", "SHELF_LABELS", "ROUTE_KEYS")
WORDS = """
    acorn amber anchor apple arrow aspen badger bamboo basil beacon birch bison breeze bridge
    candle canyon carbon castle cedar cherry cobalt comet copper coral cotton crane crystal daisy
    delta desert dragon eagle ember falcon fennel fern finch forest fossil fox galaxy garden garnet
    ginger glacier granite harbor hazel heron honey indigo iris island ivory jade jasper juniper
    kestrel lagoon lantern lark lemon lilac lotus lynx magnet maple marble meadow meteor mint moss
    nectar nickel oak oasis olive onyx opal orbit orchid otter owl panda pearl pebble pepper pine
    planet plum poplar prairie quartz quill rabbit raven reef river robin rocket rose ruby saffron
    sage salmon sapphire shadow silver sparrow spruce stone summit sunset swan tango thistle thunder
    tiger timber topaz tulip tundra turtle valley velvet violet walnut willow winter wolf zebra zephyr
""".split()  # noqa: SIM905
VALUE_LENGTH = 6
VALUE_ALPHABET = string.ascii_lowercase + string.digits

EVAL_DISTANCES = (500, 1500, 3000)
EVAL_LENGTH = 3600  # bytes of a retrieval prompt
EVAL_FACTS = 8  # facts in a prompt; the query asks for one of them


@dataclass(frozen=True)
class Stage:
    """A part of the training time with one sequence length."""

    until: float  # share of the time when the stage ends
    length: int  # bytes a sequence
    share: float  # share of the sequences that carry facts
    facts_per_kib: float  # mean number of facts in 1024 bytes of such a sequence


# Retrieval forms fast where sequences are short and full of facts; after that
# the model only has to learn to reach further.
STAGES = (
    Stage(until=0.25, length=512, share=0.7, facts_per_kib=6.0),
    Stage(until=0.50, length=1536, share=0.6, facts_per_kib=4.0),
    Stage(until=1.00, length=4608, share=0.6, facts_per_kib=2.0),
)


Insert = tuple[float, bytes, bytes]  # where, a line, and marks on its bytes (b"": none)


# --- Text ---------------------------------------------------------------------


def read_modules(held_out: bool) -> bytes:
    """Source of the standard library: the held-out modules, or all the others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if SKIPPED_FOLDERS.intersection(folders) or path.name.startswith(SKIPPED_PREFIXES):
            continue
        is_held_out = path.stem.removeprefix("test_") in HELD_OUT
        if is_held_out == held_out:
            sources.append(path.read_bytes().replace(b"\r\n", b"\n"))
    random.Random(0).shuffle(sources)
    return b"".join(source + bytes([FILE_END]) for source in sources)


def random_fact(rng: random.Random, used: set[str]) -> tuple[bytes, bytes, str]:
    """A line that states a fact, the beginning of a line that asks for it, and the value."""
    while True:
        if rng.random() < 0.6:
            name = rng.choice(WORDS)
        else:
            name = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 8)))
        entry = f'{rng.choice(TABLES)}["{name}"]'
        if entry not in used:
            break
    used.add(entry)
    value = "".join(rng.choices(VALUE_ALPHABET, k=VALUE_LENGTH))
    return f'{entry} = "{value}"\n'.encode(), f'assert {entry} == "'.encode(), value


def asking(ask: bytes, value: str, end: str = '"\n') -> tuple[bytes, bytes]:
    """A line that asks and answers, and marks on the bytes of the value."""
    line = ask + (value + end).encode()
    return line, bytes(len(ask)) + b"\1" * len(value) + bytes(len(end))


def insert_lines(text: bytes, inserts: list[Insert]) -> tuple[bytes, bytes]:
    """Put lines into the text, and tell their marks.

    Lines go to the line start before `where`, so the text around them stays intact.
    """
    parts, marks, done = [], [], 0
    for where, line, mark in sorted(inserts, key=lambda insert: insert[0]):
        cut = max(done, text.rfind(b"\n", 0, int(where)) + 1)
        parts += [text[done:cut], line]
        marks += [bytes(cut - done), mark or bytes(len(line))]
        done = cut
    parts.append(text[done:])
    marks.append(bytes(len(text) - done))
    return b"".join(parts), b"".join(marks)


def squeezed(text: bytes, inserts: list[Insert]) -> tuple[bytes, bytes]:
    """As `insert_lines`, with so much less of the text that its length stays. Lines move along with the text."""
    length = len(text)
    room = max(0, length - sum(len(line) for _, line, _ in inserts))
    inserts = [(where * room / length, line, mark) for where, line, mark in inserts]
    sequence, marks = insert_lines(text[:room], inserts)
    return sequence[:length], marks[:length]


def training_sequence(rng: random.Random, corpus: bytes, stage: Stage) -> tuple[bytes, bytes]:
    """One sequence of `stage.length + 1` bytes, and a mark for each byte of an asked-for value."""
    length = stage.length + 1
    start = rng.randrange(len(corpus) - length)
    text = corpus[start : start + length]
    if rng.random() >= stage.share:
        return text, bytes(length)

    inserts: list[Insert] = []
    used: set[str] = set()
    mean = stage.facts_per_kib * length / 1024
    for _ in range(rng.randint(1, max(1, round(2 * mean - 1)))):
        fact, ask, value = random_fact(rng, used)
        query = asking(ask, value)
        # Log-uniform distances: short ones are easy and show the way to long ones.
        distance = math.exp(rng.uniform(math.log(32), math.log(length)))
        where = rng.uniform(0, length - distance)
        inserts.append((where, fact, b""))
        inserts.append((where + distance, *query))
        if rng.random() < 0.5:
            inserts.append((rng.uniform(where + 1, length), *query))
    # Repeats of earlier text help the heads that copy to form.
    for _ in range(rng.randint(0, 2)):
        size = rng.randint(30, 300)
        first = rng.randrange(length - size)
        inserts.append((rng.uniform(first + size, length), text[first : first + size] + b"\n", b""))
    return squeezed(text, inserts)


@dataclass(frozen=True)
class Recipe:
    """What a model is trained on, and how hard."""

    sequence: Callable[[random.Random, bytes, Stage], tuple[bytes, bytes]]  # as `training_sequence`
    stages: tuple[Stage, ...]
    learning_rate: float
    weight_decay: float


# The weight decay is high, because the text is small and seen many times.
RECIPE = Recipe(training_sequence, STAGES, learning_rate=2e-3, weight_decay=0.6)


class Batches(IterableDataset):
    """Endless batches of bytes: uint8 [2, batch, length + 1], sequences and marks."""

    def __init__(self, recipe: Recipe, corpus: bytes, stage: Stage, batch_size: int, seed: int) -> None:
        self.recipe, self.corpus, self.stage = recipe, corpus, stage
        self.batch_size, self.seed = batch_size, seed

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed} {self.stage.length} {worker.id if worker else 0}")
        while True:
            pairs = [self.recipe.sequence(rng, self.corpus, self.stage) for _ in range(self.batch_size)]
            flat = bytearray(b"".join([s for s, _ in pairs] + [m for _, m in pairs]))
            yield torch.frombuffer(flat, dtype=torch.uint8).view(2, self.batch_size, -1)


def to_tokens(data: torch.Tensor) -> torch.Tensor:
    """Bytes to the ids of ByT5Tokenizer, with the end of a file as eos."""
    return torch.where(data == FILE_END, MODEL["eos_token_id"], data.long() + BYTE_OFFSET)


# --- Training -----------------------------------------------------------------


def token_losses(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor):
    """Loss in nats of each token, and whether the token was the best guess."""
    logits = F.linear(hidden, head).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets), logits.argmax(-1) == targets


def build_optimizer(model: LlamaForCausalLM, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def warmed_up(step: int, progress: float) -> float:
    """Share of the rate: linear warm-up by steps, times half a cosine by `progress`, the share of time gone."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress))
    return warmup * (0.02 + 0.98 * cosine)


def train(model: LlamaForCausalLM, corpus: bytes, recipe: Recipe, args: argparse.Namespace) -> tuple[int, int]:
    """Train until the time is over; returns the numbers of steps and of tokens."""
    device = torch.device(args.device)
    on_cuda = device.type == "cuda"
    losses_of = token_losses
    if on_cuda:
        # Layer by layer: it compiles once for all layers, and the causal mask
        # stays outside, where transformers leaves it out for fast attention.
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        losses_of = torch.compile(token_losses, dynamic=False)
    autocast = torch.autocast("cuda", torch.bfloat16) if on_cuda else contextlib.nullcontext()
    optimizer = build_optimizer(model, recipe, device)

    step = tokens = 0
    began = time.perf_counter()
    for stage in recipe.stages:
        batch_size = max(1, args.batch_tokens // stage.length)
        batches = DataLoader(
            Batches(recipe, corpus, stage, batch_size, args.seed),
            batch_size=None,
            num_workers=args.workers,
            pin_memory=on_cuda,
        )
        for batch in batches:
            progress = (time.perf_counter() - began) / (60 * args.minutes)
            if progress >= stage.until:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * warmed_up(step, progress)

            data, marks = batch.to(device, non_blocking=True)
            ids, marks = to_tokens(data), marks[:, 1:].float()
            with autocast:
                hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
                losses, hits = losses_of(hidden, model.lm_head.weight, ids[:, 1:].contiguous())
            weights = 1 + (VALUE_WEIGHT - 1) * marks
            ((losses * weights).sum() / weights.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + ids[:, 1:].numel()
            if step == 1:
                began = time.perf_counter()  # the first step compiles; it does not count

            if step % LOG_EVERY == 1:
                bits = losses.detach().mean().item() / math.log(2)
                recalled = ((hits * marks).sum() / marks.sum().clamp(min=1)).item()
                print(
                    f"{time.perf_counter() - began:6.1f} s  step {step:6d}  {tokens / 1e6:7.1f} M tokens"
                    f"  length {stage.length:4d}  {bits:.3f} bits/byte  value bytes {recalled:6.1%}",
                    flush=True,
                )
    return step, tokens


# --- Evaluation ---------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, text: bytes, window: int = 4096) -> float:
    """Mean loss in bits on the text, in windows that start with no context."""
    ids = to_tokens(torch.frombuffer(bytearray(text), dtype=torch.uint8)).to(model.device)
    total = count = 0
    for chunk in ids.split(window):
        logits = model(chunk[None], use_cache=False).logits[0]
        total += F.cross_entropy(logits[:-1].float(), chunk[1:], reduction="sum").item()
        count += len(chunk) - 1
    return total / count / math.log(2)


def retrieval_prompt(rng: random.Random, text: bytes, distance: int) -> tuple[bytes, str, int]:
    """Held-out source with facts, ending in a query; the value; its distance in bytes."""
    start = rng.randrange(len(text) - EVAL_LENGTH)
    text = text[start : start + EVAL_LENGTH]
    used: set[str] = set()
    fact, ask, value = random_fact(rng, used)
    others = [random_fact(rng, used)[0] for _ in range(EVAL_FACTS - 1)]
    # The other facts land anywhere; leave out of the tail what they add to it on average.
    tail = distance * EVAL_LENGTH / (EVAL_LENGTH + sum(map(len, others)))
    inserts = [(EVAL_LENGTH - tail, fact, b"")]
    inserts += [(rng.uniform(0, EVAL_LENGTH), other, b"") for other in others]
    prompt, _ = insert_lines(text[: text.rfind(b"\n") + 1], inserts)
    prompt = (prompt + ask)[-EVAL_LENGTH:]
    return prompt, value, len(prompt) - prompt.index(fact)


@torch.no_grad()
def retrieval_accuracy(model: LlamaForCausalLM, text: bytes, distance: int, prompts: int) -> tuple[float, float]:
    """Share of the values that greedy decoding gets fully right, and the mean distance.

    Greedy decoding writes the value exactly if and only if each of its bytes is
    the best guess after the true bytes before it, so one forward pass will do.
    """
    rng = random.Random(distance)
    correct = total_distance = 0
    for _ in range(prompts):
        prompt, value, far = retrieval_prompt(rng, text, distance)
        ids = to_tokens(torch.frombuffer(bytearray(prompt + value.encode()), dtype=torch.uint8))
        logits = model(ids[None].to(model.device), use_cache=False, logits_to_keep=VALUE_LENGTH + 1).logits
        guess = logits[0, :-1].argmax(-1).cpu()
        correct += torch.equal(guess, ids[-VALUE_LENGTH:])
        total_distance += far
    return correct / prompts, total_distance / prompts


MODEL_CARD = """\
---
license: apache-2.0
library_name: transformers
tags: [byte-level, demo]
---

# Tiny Llama for the demo

A very small byte-level Llama ({parameters:.1f} million parameters, {layers} layers, 4 query heads and
2 KV heads of size 64). It was made for the demo of this project only: it writes text that looks
like Python, and it recalls facts from far back in its prompt. It is of no other use.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("examples/tiny_llama")
model = AutoModelForCausalLM.from_pretrained("examples/tiny_llama", dtype="float32")
prompt = 'SERVICE_PORTS["orchid"] = "7f3a91"\\n\\nassert SERVICE_PORTS["orchid"] == "'
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
print(tokenizer.decode(output[0]))
```

Pass `add_special_tokens=False`, or the tokenizer ends the prompt with the end-of-text token.
The model saw sequences of at most {length} bytes.

## Training

    python examples/train_tiny_llama.py --minutes {minutes:g} --out examples/tiny_llama

- Text: the source of the standard library of Python {python} ({corpus:.1f} MB), without its tests and
  tables, and without {held_out}.
- Into more than half of the sequences the script puts facts such as `SERVICE_PORTS["orchid"] = "7f3a91"`
  and, later, lines that ask for them, such as `assert SERVICE_PORTS["orchid"] == "7f3a91"`. Names and
  values are random. The table is one of {tables}.
  Values have 6 characters out of `a-z` and `0-9`.
- {steps} steps and {tokens:.0f} million tokens; {minutes:g} min of training time on {hardware}, with PyTorch {torch}.

## Measured

Measured on {hardware} in float32, after the training, with the saved (bfloat16) weights.

- Held-out modules ({held_out}): {bits:.2f} bits per byte. The training time and
  the weight decay were chosen by this figure, so it is a little too good.
- Retrieval: the share of {prompts} prompts ({prompt_length} bytes of held-out source with {facts} facts) after
  which greedy decoding writes all 6 characters right.

| distance from fact to query (bytes) | mean distance | accuracy |
| ---: | ---: | ---: |
{rows}

## License

Apache-2.0. The text it learned from is the Python standard library.
"""


def evaluate(model: LlamaForCausalLM, args: argparse.Namespace) -> dict[str, object]:
    """Measure the saved model and print the figures."""
    text = read_modules(held_out=True)
    bits = bits_per_byte(model, text)
    print(f"held-out modules: {bits:.3f} bits/byte", flush=True)
    rows = []
    for distance in EVAL_DISTANCES:
        accuracy, mean = retrieval_accuracy(model, text, distance, args.prompts)
        print(f"retrieval at about {distance} bytes (mean {mean:.0f}): {accuracy:.1%}", flush=True)
        rows.append(f"| about {distance} | {mean:.0f} | {accuracy:.1%} |")
    return {"bits": bits, "rows": "\n".join(rows)}


def parser(description: str | None, minutes: float) -> argparse.ArgumentParser:
    """What can be said about a training."""
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=minutes, help="time for training, after the first step")
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--batch-tokens", type=int, default=65536 if on_cuda else 4608, help="bytes in a step")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1) if on_cuda else 0,
                        help="processes that make batches")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=200 if on_cuda else 4, help="retrieval prompts per distance")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    args = parser(__doc__, minutes=1.0).parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    corpus = read_modules(held_out=False)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(corpus) / 1e6:.1f} MB of source", flush=True)

    steps, tokens = train(model, corpus, RECIPE, args)

    ByT5Tokenizer(extra_ids=0).save_pretrained(args.out)
    model.to(torch.bfloat16).save_pretrained(args.out)
    # Measure what others will load, not what is in memory here.
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    assert AutoTokenizer.from_pretrained(args.out).decode([37 + BYTE_OFFSET]) == "%"
    figures = evaluate(saved, args)

    on_cuda = torch.device(args.device).type == "cuda"
    card = MODEL_CARD.format(
        parameters=parameters / 1e6,
        layers=MODEL["num_hidden_layers"],
        length=STAGES[-1].length,
        minutes=args.minutes,
        python=sysconfig.get_python_version(),
        corpus=len(corpus) / 1e6,
        held_out=", ".join(f"`{name}`" for name in HELD_OUT),
        tables=", ".join(f"`{name}`" for name in TABLES),
        steps=steps,
        tokens=tokens / 1e6,
        hardware=f"one {torch.cuda.get_device_name()}" if on_cuda else "a CPU",
        torch=torch.__version__.split("+")[0],
        prompts=args.prompts,
        prompt_length=EVAL_LENGTH,
        facts=EVAL_FACTS,
        **figures,
    )
    (args.out / "README.md").write_text(card)


if __name__ == "__main__":
    main()
