"""Models by name: their config, or the whole of them with the tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import fail, first_line

ModelArgument = Annotated[str, typer.Argument(help="A name on the Hugging Face Hub, or a folder.", show_default=False)]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16.", show_default="by model, device"),
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda or cpu.", show_default="cuda where there is one")]
PromptOption = Annotated[str, typer.Option(help="A file with the prompt; - is standard input.", show_default=False)]

_DTYPES = ("float32", "float16", "bfloat16")
_WHAT = "MODEL takes a folder or a Hugging Face Hub name of a causal language model; gated ones need `hf auth login`"
_UNLOADABLE = (OSError, ValueError, KeyError, ImportError)


def read_config(name: str) -> Any:
    """The config of a model. Weights are not asked for."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except _UNLOADABLE as error:
        fail(f"cannot read the config of {name}: {first_line(error)}\n{_WHAT}")


def load_model(name: str, device: Any, dtype: Any) -> Any:
    """A model with its weights, in eval mode."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except _UNLOADABLE as error:
        fail(f"cannot load {name}: {first_line(error)}\n{_WHAT}")
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except _UNLOADABLE as error:
        fail(f"{name} has no tokenizer that can be loaded: {first_line(error)}")


def device_of(name: str | None) -> Any:
    """The device that is asked for, else the best one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"--device {name}: {first_line(error)}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        fail(f"--device {name}: PyTorch finds no GPU here; --device cpu works everywhere")
    return device


def dtype_of(name: str | None, default: Any) -> Any:
    """The dtype that is asked for."""
    import torch

    if name is None:
        return default
    if name not in _DTYPES:
        raise typer.BadParameter(f"--dtype {name} is not accepted; it must be one of {', '.join(_DTYPES)}")
    return getattr(torch, name)


def config_dtype(name: str | None, config: Any) -> Any:
    """The dtype that is asked for, else that of the checkpoint."""
    import torch

    own = getattr(config, "dtype", None)
    return dtype_of(name, own if isinstance(own, torch.dtype) else torch.bfloat16)


def running_dtype(name: str | None, device: Any) -> Any:
    """The dtype that is asked for, else float32 on a CPU and bfloat16 elsewhere."""
    import torch

    return dtype_of(name, torch.float32 if device.type == "cpu" else torch.bfloat16)


def read_prompt(path: str) -> str:
    """The text of a file, or of standard input."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read the prompt {path}: {first_line(error)}")
    if not text.strip():
        fail(f"the prompt {path} is empty")
    return text


def encode(text: str, tokenizer: Any, model: Any, new_tokens: int, most: int | None = None) -> Any:
    """Ids [1, tokens] of a prompt that is to go on, checked against the positions that the model has.

    most: tokens of it that are taken.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :most]
    if ids.shape[1] > 1 and ids[0, -1] == tokenizer.eos_token_id:
        ids = ids[:, :-1]  # some tokenizers end every text
    check_room(model, ids.shape[1], new_tokens)
    return ids.to(model.device)


def check_room(model: Any, tokens: int, new_tokens: int) -> None:
    """Fail where a model was not made for so many tokens."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens + new_tokens > limit:
        fail(f"the prompt has {tokens} tokens; with {new_tokens} new ones that is more than the {limit} of this model")
