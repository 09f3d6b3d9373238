"""``calibrate``: a budget of bytes, spread so that a model loses least on a few texts of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import check_value
from ..lowering.buffers import CACHE_DTYPES
from ..lowering.format import CHUNK, CODES
from .budget import Budget
from .errors import Reader
from .measured import Measured
from .sensitivity import attentions_and_gradients


def calibrate(
    model: Any,
    prompts: Sequence[str | Tensor | Sequence[int]],
    *,
    bytes: float = 0.375,
    tokenizer: Any = None,
    codes: Sequence[str] = CODES,
    window: int = 32,
    by_head: bool = False,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Budget:
    """Spread a budget of bytes over layers, keys and values, and codes, so that ``model`` loses least on ``prompts``.

    Each prompt takes one dense forward and one backward, without gradients of weights, and then attention of 256 of its
    queries for each candidate. The method is told in ``calibration/errors.py``. On a CPU the result is always the same;
    on a GPU it is but for how torch rounds sums.

    model: of transformers, causal. Layers with a sliding window stay dense and have no share in the budget, nor have
    those whose head_dim is no multiple of 8. It may be prepared or compiled already: here it runs as it is.
    prompts: texts, or ids of tokens, int64 [T] or [1, T], of more than ``window`` tokens each. One or two of 1000 to
    2000 tokens will do, if they are such as the model will read. tokenizer: for texts.
    bytes: stored over dense bytes of a pruned token, in (0, 1]; the window comes on top. codes: those that may be used,
    of "none", "int8" and "int4". window: as in ``Settings``. by_head: spread it over the KV heads of each layer, too,
    in two groups at most, as a decode step launches the kernels of each group. dtype: of the cache, by default that of
    the model. progress: whether to show it, on stderr.

    Raises TypeError for other prompts or a text without a tokenizer, ValueError for a value out of range, prompts that
    are too short, a budget that is too small for the least that can be stored, and a model without attention that can
    be stored, NotImplementedError for attention with a softcap, with sinks or in chunks, and for layers that share a
    cache.
    """
    check_value("bytes", bytes, isinstance(bytes, int | float) and 0 < bytes <= 1, "a number in (0, 1]")
    check_value("by_head", by_head, isinstance(by_head, bool), "True or False")
    return measured(model, prompts, tokenizer, codes, window, dtype, progress).budget(bytes, codes, by_head)


def measured(
    model: Any,
    prompts: Sequence[str | Tensor | Sequence[int]],
    tokenizer: Any,
    codes: Sequence[str],
    window: int,
    dtype: torch.dtype | None,
    progress: bool,
) -> Measured:
    """What ``calibrate`` measures, for budgets of any size."""
    dtype = model.dtype if dtype is None else dtype
    check_value("codes", codes, bool(codes) and set(codes) <= set(CODES), f"some of {', '.join(map(repr, CODES))}")
    check_value("window", window, isinstance(window, int) and window >= 1, "an integer of at least 1")
    check_value("dtype", dtype, dtype in CACHE_DTYPES, f"one of {', '.join(map(str, CACHE_DTYPES))}")
    texts = _encoded(prompts, tokenizer, window)
    found = Measured(window, codes, dtype)
    with _plain(model), _shown(progress, len(texts)) as show:
        for text in texts:
            ids = text.to(model.device, copy=True)  # what was made in inference mode cannot be saved for backward
            for reader, layer, part in _readers(model, ids, window):
                found.add(reader, layer)
                show(part)
            found.texts += 1
    if not found.shapes:
        raise ValueError(
            f"mustafar: nothing of {type(model).__name__} can be stored: no layer attends by transformers' "
            f"AttentionInterface, without a sliding window and with a head_dim that is a multiple of {CHUNK}"
        )
    return found


def _readers(model: Any, ids: Tensor, window: int) -> Iterator[tuple[Reader, int, float]]:
    """What each layer reads of a text, the layer's number, and how far it is then, up to 1."""
    found = attentions_and_gradients(model, ids)
    if len({attention.key.data_ptr() for attention, _ in found}) < len(found):
        raise NotImplementedError("mustafar: some layers of the model share a cache; calibrate cannot weigh them")
    fitting = [pair for pair in found if all(x.shape[-1] % CHUNK == 0 for x in (pair[0].key, pair[0].value))]
    for i, (attention, gradient) in enumerate(fitting, 1):
        with torch.no_grad():
            yield Reader(attention, gradient, window), attention.layer, i / len(fitting)


def _encoded(prompts: Any, tokenizer: Any, window: int) -> list[Tensor]:
    """Ids int64 [T] of each prompt."""
    if isinstance(prompts, str | Tensor) or not isinstance(prompts, Sequence) or not prompts:
        raise TypeError(f"mustafar: prompts must be a list of texts or of ids of tokens; given is {prompts!r}")
    texts = []
    for prompt in prompts:
        if isinstance(prompt, str) and tokenizer is None:
            raise TypeError("mustafar: calibrate needs a tokenizer for prompts that are texts")
        ids = torch.as_tensor(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
        ids = ids.squeeze(0) if ids.dim() == 2 else ids
        if ids.dim() != 1 or ids.dtype.is_floating_point:
            raise TypeError(
                f"mustafar: ids of tokens must be integers [T] or [1, T]; given are {list(ids.shape)} {ids.dtype}"
            )
        if len(ids) <= window:
            raise ValueError(f"mustafar: a prompt of {len(ids)} tokens has none outside the window of {window}")
        texts.append(ids.long())
    return texts


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Within it the model runs as it is: uncompiled, without dropout, with gradients."""
    training = model.training
    with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        try:
            model.eval()
            yield
        finally:
            model.train(training)


@contextmanager
def _shown(progress: bool, texts: int) -> Iterator[Any]:
    """A progress bar over so many texts. Yields a function that takes what part of the text is done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task, done = bar.add_task("calibrating", total=texts), 0

        def show(part: float) -> None:
            nonlocal done
            bar.update(task, completed=done + part)
            done += part == 1

        yield show
