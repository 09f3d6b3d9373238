# SPDX-License-Identifier: Apache-2.0
"""Generate with a dense KV cache and with compressed ones, and compare them.

    python examples/quickstart.py
    python examples/quickstart.py --model meta-llama/Llama-3.2-1B --prompt notes.txt --new-tokens 128 --sparsity 0.7

Without --prompt the text is a part of the standard library's ``textwrap``. A few lines near its start state facts, and
each of several prompts asks for another one at the end. Facts and questions are thousands of bytes apart, so the
small model beside this file can only answer from its KV cache. It was never trained on that module.

--model smollm2 asks a pretrained model about a long text instead, see ``smollm2.py``.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

import mustafar_compile
import smollm2
from quickstart_results import Prompt, Result, show

TINY_MODEL = Path(__file__).resolve().parent / "tiny_llama"
# The names are of equal length, and so are the prompts: what is compiled for the first one serves all.
FACTS = {
    'SERVICE_PORTS["onyx"]': "7f3a91",
    'BUILD_IDS["sapphire"]': "k20x8d",
    'COLOR_CODES["garnet"]': "c41e7b",
    'ROUTE_KEYS["lantern"]': "m5q09z",
}
SOURCE_CHARACTERS = 3600
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Stopwatch:
    """A streamer for ``generate`` that notes when each token comes."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.times: list[float] = []
        self.on_token = on_token

    def put(self, _: Any) -> None:
        """Called once with the prompt and then with each new token."""
        if self.times:
            self.on_token()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""

    def decode_times(self) -> list[float]:
        """Seconds of each step after the first token."""
        return [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]


# Input


def fact_prompts() -> list[Prompt]:
    """Source code with facts near its start, once for each question at its end."""
    source = inspect.getsource(textwrap)
    source = source[: source.index(inspect.getsource(textwrap.shorten))][-SOURCE_CHARACTERS:]
    lines = source.splitlines(keepends=True)[1:]
    for place, (name, value) in enumerate(FACTS.items()):
        lines.insert(1 + 4 * place, f'{name} = "{value}"\n')
    code = "".join(lines)
    return [Prompt(f'{code}assert {name} == "', value) for name, value in FACTS.items()]


def read_prompts(path: str | None, model: str, tokenizer: Any) -> list[Prompt]:
    """The prompts to run: the file's text ("-" is standard input) or the built-in ones."""
    if path is None:
        if model == smollm2.NAME:
            return [Prompt(text, answer, question) for text, question, answer in smollm2.questions(tokenizer)]
        return fact_prompts()
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read the prompt {path}: {error}")
    if not text.strip():
        fail(f"the prompt {path} is empty")
    return [Prompt(text)]


def load(name: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    try:
        if name == smollm2.NAME:
            model, tokenizer = smollm2.load(dtype)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        fail(
            f"cannot load {name}: {first_line(error)}\n--model takes a folder or a Hugging Face Hub name of a causal "
            "language model; gated ones need `hf auth login` first"
        )
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        fail(f"cannot use device {device}: {first_line(error)}")


def encode(tokenizer: Any, model: Any, prompts: Sequence[Prompt], new_tokens: int) -> list[torch.Tensor]:
    """Token ids of each prompt, checked against the positions that the model has."""
    special = not isinstance(tokenizer, ByT5Tokenizer)  # a byte tokenizer would end the prompt with its end-of-text
    encoded = [tokenizer(p.text, add_special_tokens=special, return_tensors="pt").input_ids for p in prompts]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(ids.shape[1] for ids in encoded)
    if limit is not None and longest + new_tokens > limit:
        fail(
            f"the prompt has {longest} tokens; with {new_tokens} new ones that is more than the {limit} of this model "
            "(--prompt takes another text)"
        )
    return [ids.to(model.device) for ids in encoded]


# Generating


def generate(
    console: Console, label: str, model: Any, tokenizer: Any, inputs: Sequence[torch.Tensor], new_tokens: int
) -> Result:
    """Greedy decoding of each prompt on its own."""
    outputs, watches = [], []
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=len(inputs) * new_tokens)
        for ids in inputs:
            watches.append(Stopwatch(lambda: progress.advance(task)))
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                return_dict_in_generate=True,
                streamer=watches[-1],
            )
            outputs.append(output.sequences[0, ids.shape[1] :].tolist())
    try:
        cache = mustafar_compile.cache_stats(output.past_key_values)
    except TypeError as error:
        fail(f"this model keeps no KV cache of the usual kind: {error}")
    first = watches[0].times
    return Result(
        label,
        outputs,
        [tokenizer.decode(tokens) for tokens in outputs],
        cache,
        statistics.median(seconds for watch in watches for seconds in watch.decode_times()),
        first[-1] - first[0],
    )


def compare(console: Console, args: argparse.Namespace, model: Any, tokenizer: Any, inputs: Any) -> list[Result]:
    """One dense result, then one for each sparsity."""
    console.print("\n[bold]dense[/]: plain PyTorch, not compiled")
    results = [generate(console, "dense", model, tokenizer, inputs, args.new_tokens)]
    for share in args.sparsity:
        label = f"sparsity {share:g}"
        console.print(f"[bold]{label}[/]: compiling first")
        torch._dynamo.reset()
        mustafar_compile.prepare(model, key_sparsity=share, value_sparsity=share, window=args.window)
        with mustafar_compile.explain() as report:
            results.append(generate(console, label, model, tokenizer, inputs, args.new_tokens))
        console.print(Text(str(report)))
    return results


# The command line


def first_line(error: BaseException) -> str:
    """An error as one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fail(message: str) -> NoReturn:
    """Leave with a message."""
    sys.exit(f"quickstart: {message}")


def sparsity(text: str) -> float:
    """A sparsity from the command line."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def count(text: str) -> int:
    """A number of at least 1 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def parse_args() -> argparse.Namespace:
    """The command line, with defaults that fit the machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--model", default=str(TINY_MODEL), help="folder, Hub name or smollm2, see smollm2.py (default: tiny_llama)"
    )
    parser.add_argument("--prompt", metavar="FILE", help="text to continue, - for standard input (default: built in)")
    parser.add_argument("--new-tokens", type=count, default=64, help="tokens to generate (default: 64)")
    parser.add_argument(
        "--sparsity", type=sparsity, nargs="+", default=[0.5, 0.7], help="of keys and values (default: 0.5 0.7)"
    )
    parser.add_argument("--window", type=count, default=32, help="latest tokens kept dense (default: 32)")
    parser.add_argument("--device", default=device, help=f"(default here: {device})")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, else bfloat16)")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def main() -> None:
    """Run the comparison."""
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(f"loading {args.model} ({args.dtype}, {args.device})", highlight=False, markup=False)
    model, tokenizer = load(args.model, args.device, DTYPES[args.dtype])
    prompts = read_prompts(args.prompt, args.model, tokenizer)
    inputs = encode(tokenizer, model, prompts, args.new_tokens)
    longest = max(ids.shape[1] for ids in inputs)
    console.print(
        f"{len(inputs)} prompt(s) of up to {longest} tokens, {args.new_tokens} new tokens each", highlight=False
    )
    show(console, prompts, compare(console, args, model, tokenizer, inputs))


if __name__ == "__main__":
    main()
