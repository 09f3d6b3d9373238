"""Generating for the commands that run a model, token by token, with what it cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One call of ``generate``.

    tokens: the new ones, of the first row. first_seconds: to the first token, with compiling where that was needed.
    step_seconds: of a later token, the median. cache: ``CacheStats`` as a dict, None for a cache of another kind.
    peak_bytes: what torch allocated on the GPU at most, 0 on a CPU.
    """

    tokens: list[int]
    first_seconds: float
    step_seconds: float
    cache: dict[str, int] | None
    peak_bytes: int


class Stopwatch:
    """A streamer for ``generate``: notes when each token comes and hands it on."""

    def __init__(self, on_token: Callable[[list[int]], None]) -> None:
        self.times = [time.perf_counter()]
        self._on_token = on_token
        self._prompt = True

    def put(self, ids: Any) -> None:
        """Called once with the prompt, and then with each token."""
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self._on_token(ids.tolist())

    def end(self) -> None:
        """Called after the last token."""

    @property
    def steps(self) -> list[float]:
        """Seconds of each token after the first."""
        return [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]


def run(
    model: Any,
    ids: Any,
    *,
    new_tokens: int,
    on_token: Callable[[list[int]], None] = lambda new: None,
    stop: bool = True,
    cache: Any = None,
) -> tuple[Run, Any]:
    """Greedy decoding of ``ids`` [batch, tokens]: what it cost, and what ``generate`` returned.

    on_token: given the new tokens of each step, one for each row. stop: at the end-of-text token. cache: of earlier
    tokens of ``ids``.
    """
    import torch

    on_gpu, watch = ids.device.type == "cuda", Stopwatch(on_token)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    given = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True, "streamer": watch}
    given |= {} if stop else {"min_new_tokens": new_tokens}
    given |= {} if cache is None else {"past_key_values": cache}
    padding = model.generation_config.pad_token_id
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0 if padding is None else padding, **given
        )
    return Run(
        tokens=out.sequences[0, ids.shape[1] :].tolist(),
        first_seconds=watch.times[1] - watch.times[0],
        step_seconds=statistics.median(watch.steps or [0.0]),
        cache=_stats(out.past_key_values),
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
    ), out


def _stats(cache: Any) -> dict[str, int] | None:
    from ..cache.stats import cache_stats

    try:
        return asdict(cache_stats(cache))
    except TypeError:
        return None
