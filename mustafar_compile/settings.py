"""What a user can set, and how ``mode=`` and ``options=`` of torch.compile are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .lowering.format import CODES
from .lowering.strategies import STRATEGIES_OF


@dataclass(frozen=True)
class Settings:
    """Settings of the backend. Pass them to torch.compile as ``options={"key_sparsity": 0.7}``.

    key_sparsity: fraction of each pruned key that is dropped, in [0, 1). 0 keeps everything.
    value_sparsity: the same for values.
    key_code: how kept elements of keys are stored: "none" as they are, "int8" or "int4" in so many bits, relative to
        the largest magnitude of their row.
    value_code: the same for values.
    key_strategy: by what the elements of keys that are kept are chosen: "magnitude", "output-aware" or "think".
    value_strategy: the same for values: "magnitude", "think", "channel-magnitude" or "channel-output-aware".
    window: latest tokens that stay dense and exact, at least 1.
    skip_layers: numbers of the attention layers that are left dense, counted from 0.
    strict: raise NothingMatchedError for a graph in which no attention could be rewritten. A graph with neither
        attention nor parameters (a sampling helper, say) is not judged.
    release_dense: give back the CUDA memory of dense caches of the caller once they are compressed. ReleaseError is
        raised where it cannot be given back; whatever else touches such a cache later raises RuntimeError.
    raise_errors: raise the error where a graph cannot be traced, matched or rewritten. Otherwise it runs as it is, and
        a warning says so. For debugging.
    """

    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    key_code: str = "none"
    value_code: str = "none"
    key_strategy: str = "magnitude"
    value_strategy: str = "magnitude"
    window: int = 32
    skip_layers: frozenset[int] = field(default_factory=frozenset)
    strict: bool = False
    release_dense: bool = False
    raise_errors: bool = False

    def __post_init__(self) -> None:
        for name in ("key_sparsity", "value_sparsity"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
        for name in ("key_code", "value_code"):
            value = getattr(self, name)
            _check(name, value, value in CODES, f"one of {', '.join(map(repr, CODES))}")
        for role, names in STRATEGIES_OF.items():
            value = self.strategy(role)
            _check(f"{role}_strategy", value, value in names, f"one of {', '.join(map(repr, names))}")
        _check("window", self.window, _is_count(self.window) and self.window >= 1, "an integer of at least 1")
        for name in ("strict", "release_dense", "raise_errors"):
            value = getattr(self, name)
            _check(name, value, isinstance(value, bool), "True or False")
        layers = self.skip_layers
        iterable = isinstance(layers, set | frozenset | list | tuple | range)
        accepted = iterable and all(_is_count(layer) and layer >= 0 for layer in layers)
        _check("skip_layers", layers, accepted, "a collection of layer numbers from 0 on")
        object.__setattr__(self, "skip_layers", frozenset(layers))

    def sparsity(self, role: str) -> float:
        """The sparsity of "key" or "value"."""
        return self.key_sparsity if role == "key" else self.value_sparsity

    def code(self, role: str) -> str:
        """The code of "key" or "value"."""
        return self.key_code if role == "key" else self.value_code

    def strategy(self, role: str) -> str:
        """The strategy of "key" or "value"."""
        return self.key_strategy if role == "key" else self.value_strategy


PRESETS: dict[str, dict[str, Any]] = {
    "safe": {"key_sparsity": 0.0, "value_sparsity": 0.0, "key_code": "int8", "value_code": "int8"},
    "balanced": {"key_sparsity": 0.5, "value_sparsity": 0.7, "key_code": "int8", "value_code": "int8"},
    "small": {"key_sparsity": 0.5, "value_sparsity": 0.7, "key_code": "int4", "value_code": "int4"},
}
"""Settings that go well together, by name: ``options={"preset": "balanced"}``. What is given beside it goes before it.

Keys suffer more from pruning than values do, so they keep more. ``README.md`` has the bytes and the measured loss.
"""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, given: Any, accepted: bool, wanted: str) -> None:
    if not accepted:
        raise ValueError(f"mustafar: {name}={given!r} is not accepted; it must be {wanted}")


def setting_names() -> list[str]:
    """Names of all settings."""
    return [f.name for f in fields(Settings)]


def read_options(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
    """Split torch.compile's ``mode`` and ``options`` into our settings and patches of Inductor's config.

    torch.compile takes one or the other, so a mode may also stand among the options. Raises ValueError for an unknown
    mode, preset or option, naming what is accepted, and for two modes.
    """
    from . import _compat

    options = dict(options or {})
    inner = options.pop("mode", None)
    if mode is not None and inner is not None and mode != inner:
        raise ValueError(f"mustafar: two modes are given, {mode!r} and, as an option, {inner!r}; accepted is one")
    mode = mode if inner is None else inner
    modes = _compat.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"mustafar: mode {mode!r} is unknown; accepted are {', '.join(map(repr, modes))}")
    inductor = dict(modes[mode]) if mode is not None else {}
    if mode == "max-autotune-no-cudagraphs":
        inductor["triton.cudagraphs"] = False  # which Inductor has by default, and we have not
    preset = options.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"mustafar: preset {preset!r} is unknown; accepted are {', '.join(map(repr, PRESETS))}")
    ours: dict[str, Any] = {} if preset is None else dict(PRESETS[preset])
    known = _compat.inductor_config.get_config_copy()
    for key, value in options.items():
        name = key.replace("-", "_")
        if name in setting_names():
            ours[name] = value
        elif name in known:
            inductor[name] = value
        else:
            raise ValueError(
                f"mustafar: option {key!r} is unknown; accepted are preset, {', '.join(setting_names())} and the keys "
                "of torch._inductor.config (torch._inductor.list_options() lists them)"
            )
    return Settings(**ours), inductor


def merged_options(
    function: str, mode: str | None, options: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``function`` was given, as options of the backend. settings: its keywords.

    Raises ValueError as ``read_options`` does, and for a keyword that is no setting.
    """
    unknown = settings.keys() - {"preset", *setting_names()}
    if unknown:
        raise ValueError(
            f"{function}: unknown setting {', '.join(sorted(unknown))}; accepted are {', '.join(setting_names())}, "
            "preset, mode and options"
        )
    merged = {**(options or {}), **settings}
    read_options(mode, merged)
    return merged if mode is None else merged | {"mode": mode}
