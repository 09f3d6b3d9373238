"""What a user can set, and how ``mode=`` and ``options=`` of torch.compile are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, get_origin

from .by_number import ByHead, ByLayer, ByNumber, leaves, read
from .calibration.budget import Budget
from .errors import UnknownLayerError, check_value
from .lowering.format import CODES
from .lowering.strategies import strategies_of

PerLayer = Any
"""One value for all; or by layer, a list or a mapping, in which that of a layer may be one by KV head. In a
``Settings`` these are ``ByLayer`` and ``ByHead``."""

ROLES = ("key", "value")


class Way(NamedTuple):
    """How keys or values are stored."""

    sparsity: float
    code: str
    strategy: str


@dataclass(frozen=True)
class Settings:
    """Settings of the backend. Pass them to torch.compile as ``options={"key_sparsity": 0.7}``.

    Those of keys and of values may differ by layer: ``[0.3, 0.7, 0.7]``, an entry for each layer from 0 on, or
    ``{0: 0.3, "default": 0.7}``. UnknownLayerError where a layer that is to be compressed has no value or no number,
    and where a layer is named that the model does not have. In a layer they may differ by KV head likewise:
    ``{0: {0: 0.3, "default": 0.7}, "default": 0.7}``. UnknownHeadError where a head has no value or is not there, and
    where ranks have some of the heads each. Each set of heads that differs costs a decode step kernels of its own.

    key_sparsity: fraction of each pruned key that is dropped, in [0, 1). 0 keeps everything.
    value_sparsity: the same for values.
    key_code: how kept elements of keys are stored: "none" as they are, "int8" or "int4" in so many bits, relative to
        the largest magnitude of their row.
    value_code: the same for values.
    key_strategy: by what the elements of keys that are kept are chosen: "magnitude", "output-aware" or "think".
    value_strategy: the same for values: "magnitude", "think", "channel-magnitude" or "channel-output-aware". Either
        may be the name of a strategy of yours (``register_strategy``).
    window: latest tokens that stay dense and exact, at least 1.
    skip_layers: numbers of the attention layers that are left dense, counted from 0.
    strict: raise NothingMatchedError for a graph in which no attention could be rewritten. A graph with neither
        attention nor parameters (a sampling helper, say) is not judged.
    release_dense: give back the CUDA memory of dense caches of the caller once they are compressed. ReleaseError is
        raised where it cannot be given back; whatever else touches such a cache later raises RuntimeError.
    raise_errors: raise the error where a graph cannot be traced, matched or rewritten. Otherwise it runs as it is, and
        a warning says so. For debugging.
    """

    key_sparsity: PerLayer = 0.5
    value_sparsity: PerLayer = 0.5
    key_code: PerLayer = "none"
    value_code: PerLayer = "none"
    key_strategy: PerLayer = "magnitude"
    value_strategy: PerLayer = "magnitude"
    window: int = 32
    skip_layers: frozenset[int] = field(default_factory=frozenset)
    strict: bool = False
    release_dense: bool = False
    raise_errors: bool = False

    def __post_init__(self) -> None:
        for name in ("key_sparsity", "value_sparsity"):
            self._check_each(name, lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
        for name in ("key_code", "value_code"):
            self._check_each(name, lambda value: value in CODES, f"one of {', '.join(map(repr, CODES))}")
        for role in ("key", "value"):
            names = strategies_of(role)
            self._check_each(f"{role}_strategy", names.__contains__, f"one of {', '.join(map(repr, names))}")
        check_value("window", self.window, _is_count(self.window) and self.window >= 1, "an integer of at least 1")
        for name in ("strict", "release_dense", "raise_errors"):
            value = getattr(self, name)
            check_value(name, value, isinstance(value, bool), "True or False")
        layers = self.skip_layers
        iterable = isinstance(layers, set | frozenset | list | tuple | range)
        accepted = iterable and all(_is_count(layer) and layer >= 0 for layer in layers)
        check_value("skip_layers", layers, accepted, "a collection of layer numbers from 0 on")
        object.__setattr__(self, "skip_layers", frozenset(layers))

    def _check_each(self, name: str, accepts: Callable[[Any], bool], wanted: str) -> None:
        """Check the value of a setting, or that of each layer."""
        value = read(name, getattr(self, name), ByLayer, ByHead)
        object.__setattr__(self, name, value)
        for place, each in leaves(name, value):
            check_value(place, each, accepts(each), wanted)

    def at(self, name: str, layer: int | None = None) -> Any:
        """The value of a setting for a layer, a ``ByHead`` where its heads differ.

        layer: may be left out where all have the same.
        """
        value = getattr(self, name)
        if not isinstance(value, ByLayer):
            return value
        if layer is None and value.numbered:
            raise UnknownLayerError(f"{name} differs by layer, and no layer is named")
        return value.at(layer, name)

    def of_layer(self, layer: int | None) -> dict[str, Any] | None:
        """All that may differ by layer, None where the layer stays dense."""
        if layer in self.skip_layers:
            return None
        return {name: self.at(name, layer) for name in (f"{role}_{what}" for role in ROLES for what in Way._fields)}

    def ways(self, layer: int | None, heads: int) -> list[tuple[Way, Way]] | None:
        """How keys and values of each KV head of a layer are stored, None where it stays dense.

        Raises UnknownHeadError where settings are for other heads than the ``heads`` that there are.
        """
        values = self.of_layer(layer)
        if values is None:
            return None
        each = {
            name: value.of_each(heads, f"{name} of layer {layer}") if isinstance(value, ByHead) else [value] * heads
            for name, value in values.items()
        }
        of_role = ([each[f"{role}_{what}"] for what in Way._fields] for role in ROLES)
        key, value = ([Way(*way) for way in zip(*fields, strict=True)] for fields in of_role)
        return list(zip(key, value, strict=True))

    def strategies(self, role: str) -> set[str]:
        """Those of "key" or "value" that any layer or head has."""
        return {value for _, value in leaves("", getattr(self, f"{role}_strategy"))}

    def by_layer(self) -> list[str]:
        """What of the settings goes by the number of a layer, as text."""
        skipped = [f"skip_layers={sorted(self.skip_layers)}"] if self.skip_layers else []
        return skipped + [f"{name} by layer" for name, value in self.given_by_layer().items() if value.numbered]

    def by_head(self) -> list[str]:
        """What of the settings goes by the number of a KV head, by name."""
        numbered = self.given_by_layer().items()
        return [name for name, value in numbered if any(isinstance(x, ByHead) for _, x in value.items())]

    def named_layers(self) -> dict[str, set[int]]:
        """The layers that each setting names, if it names any."""
        named = {name: {layer for layer, _ in value.numbered} for name, value in self.given_by_layer().items()}
        return {name: layers for name, layers in (named | {"skip_layers": set(self.skip_layers)}).items() if layers}

    def given_by_layer(self) -> dict[str, ByLayer]:
        """The settings that were given by layer, by name, be it with a default alone."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, ByLayer)}


PRESETS: dict[str, dict[str, Any]] = {
    "safe": {"key_sparsity": 0.0, "value_sparsity": 0.0, "key_code": "int8", "value_code": "int8"},
    "balanced": {"key_sparsity": 0.0, "value_sparsity": 0.5, "key_code": "int4", "value_code": "int4"},
    "small": {"key_sparsity": 0.5, "value_sparsity": 0.7, "key_code": "int4", "value_code": "int4"},
}
"""Settings that go well together, by name: ``options={"preset": "balanced"}``. What is given beside it goes before it.

Keys suffer more from pruning than values do, so they keep more. ``README.md`` has the bytes and the measured loss.
"""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def setting_names() -> list[str]:
    """Names of all settings."""
    return [f.name for f in fields(Settings)]


def read_options(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
    """Split torch.compile's ``mode`` and ``options`` into our settings and patches of Inductor's config.

    torch.compile takes one or the other, so a mode may also stand among the options. Raises ValueError for an unknown
    mode, preset or option, naming what is accepted, for two modes, an option that is there twice, a value of another
    type than Inductor's option has, and for what is no budget.
    """
    from . import _compat

    options = dict(options or {})
    inner = options.pop("mode", None)
    if mode is not None and inner is not None and mode != inner:
        raise ValueError(f"mustafar: two modes are given, {mode!r} and, as an option, {inner!r}; accepted is one")
    mode = mode if inner is None else inner
    modes = _compat.inductor.list_mode_options()
    if mode is not None and mode not in list(modes):
        raise ValueError(f"mustafar: mode {mode!r} is unknown; accepted are {', '.join(map(repr, modes))}")
    inductor = dict(modes[mode]) if mode is not None else {}
    if mode == "max-autotune-no-cudagraphs":
        inductor["triton.cudagraphs"] = False  # which Inductor has by default, and we have not
    ours = _settings_by_name(options)
    known = _compat.inductor.config.get_config_copy()
    given = {str(key).replace("-", "_"): key for key in options}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if given[name] != key:
            raise ValueError(f"mustafar: {name} is given twice, as {key!r} and as {given[name]!r}")
        if name in setting_names():
            ours[name] = value
        elif name in known:
            _check_type(name, value, _compat.inductor.config.get_type(name))
            inductor[name] = value
        else:
            raise ValueError(
                f"mustafar: option {key!r} is unknown; accepted are preset, budget, {', '.join(setting_names())} and "
                "the keys of torch._inductor.config (torch._inductor.list_options() lists them)"
            )
    return Settings(**ours), inductor


def _check_type(name: str, value: Any, kind: Any) -> None:
    """Refuse a value that torch.compile would refuse for an option of Inductor; it checks types that are plain."""
    if get_origin(kind) is None:
        check_value(name, value, isinstance(value, kind), f"of type {getattr(kind, '__name__', kind)}")


def _settings_by_name(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that a preset or a budget among the options stands for; takes it out of them."""
    preset, budget = options.pop("preset", None), options.pop("budget", None)
    if preset is not None and budget is not None:
        raise ValueError("mustafar: a preset and a budget are given; accepted is one of them")
    if preset is not None and preset not in list(PRESETS):
        raise ValueError(f"mustafar: preset {preset!r} is unknown; accepted are {', '.join(map(repr, PRESETS))}")
    if budget is not None:
        return Budget.of(budget).settings()
    return {} if preset is None else dict(PRESETS[preset])


def merged_options(
    function: str, mode: str | None, options: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Settings]:
    """What ``function`` was given, as options of the backend, and as they are read. settings: its keywords.

    Raises ValueError as ``read_options`` does, and for a keyword that is no setting; TypeError where options are no
    mapping.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{function}: options={options!r} is not accepted; it must be a mapping of names to values")
    unknown = settings.keys() - {"preset", "budget", *setting_names()}
    if unknown:
        raise ValueError(
            f"{function}: unknown setting {', '.join(sorted(unknown))}; accepted are {', '.join(setting_names())}, "
            "preset, budget, mode and options"
        )
    merged = {**(options or {}), **settings}
    read, _ = read_options(mode, merged)
    if merged.get("budget") is not None:
        merged = Budget.of(merged.pop("budget")).settings() | merged
    for name in merged:
        value = getattr(read, name.replace("-", "_"), None)
        if isinstance(value, ByNumber):
            merged[name] = value.plain()  # transformers writes a CompileConfig as JSON
    return (merged if mode is None else merged | {"mode": mode}), read
