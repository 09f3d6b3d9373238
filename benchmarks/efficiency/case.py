"""One row of the efficiency study: what is measured, in which way, at which size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import llama
from study_files import StudyCase

from mustafar_compile.lowering.format import CODES
from mustafar_compile.settings import PRESETS, read_options

LARGEST = "largest"
PEERS = {
    "eager": "HF eager",
    "inductor": "HF, model.compile()",
    "hf": "HF compiled, static cache",
    "quantized": "QuantizedCache, quanto, 4 bits",
    "quantized hqq": "QuantizedCache, HQQ, 4 bits",
    "quantized fp8": "QuantizedCache, fp8",
    "dense": "best dense step",
    "flashinfer fp8": "best dense step, FlashInfer over fp8",
}
AT_THE_SAME_BYTES = {"snapkv": "SnapKV at the bytes of"}
"""Peers that have a setting of ours: as many bytes as it takes."""

OURS = {
    "ours": "HF's model, our backend,",
    "op": "best dense step with our op,",
    "compile": 'model.compile("mustafar"),',
    "prepared": "prepare(model),",
}
_QUANTIZED = "quantized", "quantized hqq", "quantized fp8"
MEASURES: dict[str, tuple[str, ...]] = {
    "step": ("hf", "dense", "flashinfer fp8", "snapkv", "ours", "op"),
    "first token": ("eager", "inductor", "compile"),
    "generate": ("eager", "inductor", "hf", *_QUANTIZED, "snapkv", "compile", "prepared"),
    "loss": ("quantized", "snapkv", "ours"),
}
"""Measures, and the ways that each knows."""


@dataclass(frozen=True)
class Case(StudyCase):
    """What a row is about.

    setting: of our ways, see ``options``. layers: 0 for all of the shape. batch: a number, or ``LARGEST``. context:
    tokens of the prompt, or of the filled cache. new_tokens: of generate. memory_GB: what the card is to have, 0 for
    all that it has. Raises ValueError for what is not accepted.
    """

    measure: str
    way: str
    setting: str = ""
    shape: str = "llama-3-8b"
    layers: int = 0
    batch: int | str = 1
    context: int = 4096
    new_tokens: int = 0
    memory_GB: float = 0

    def __post_init__(self) -> None:
        self._check("measure", self.measure in MEASURES, f"one of {', '.join(MEASURES)}")
        self._check("way", self.way in MEASURES[self.measure], f"one of {', '.join(MEASURES[self.measure])}")
        self._check("batch", self.batch == LARGEST or _at_least(self.batch, 1), f'at least 1, or "{LARGEST}"')
        self._check("context", _at_least(self.context, 64), "at least 64")
        self._check("layers", _at_least(self.layers, 0), "at least 1, or 0 for all")
        least = 3 if self.measure in ("generate", "loss") else 0
        a_size = isinstance(self.memory_GB, int | float) and self.memory_GB >= 0
        self._check("memory_GB", a_size, "a number, or 0 for all")
        self._check("new_tokens", _at_least(self.new_tokens, least), f"at least {least}")
        if self.way in PEERS:
            self._check("setting", not self.setting, f"left out for {self.way}")
        else:
            object.__setattr__(self, "setting", str(self.setting))
            options(self.setting)

    @property
    def label(self) -> str:
        """The way, as tables and plots call it."""
        return PEERS[self.way] if self.way in PEERS else f"{(AT_THE_SAME_BYTES | OURS)[self.way]} {self.setting}"

    def __str__(self) -> str:
        """All fields that are not at their defaults, in one line."""
        return ", ".join(f"{name} {value}" for name, value in self.described().items())

    @property
    def is_ours(self) -> bool:
        """Whether the cache is compressed by this package."""
        return self.way in OURS

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Equal for cases that may be compared."""
        return self.measure, self.shape, self.layers, self.batch, self.context, self.new_tokens, self.memory_GB


def options(setting: str) -> dict[str, Any]:
    """A setting as options of the backend: a preset, or a sparsity of keys and values with or without a code.

    "0.7" or "0.5 int8". Raises ValueError for another text.
    """
    sparsity, _, code = setting.partition(" ")
    try:
        if setting in PRESETS:
            found: dict[str, Any] = {"preset": setting}
        else:
            found = {"key_sparsity": float(sparsity), "value_sparsity": float(sparsity)}
            found |= {"key_code": code, "value_code": code} if code else {}
        read_options(None, found)
    except ValueError:
        accepted = f"a preset ({', '.join(PRESETS)}), or a sparsity in [0, 1), with a code ({', '.join(CODES)}) or not"
        raise ValueError(f"setting={setting!r} is not accepted; it must be {accepted}") from None
    return found | {"window": llama.WINDOW}


def _at_least(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
