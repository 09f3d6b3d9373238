"""Settings: what is accepted, what is refused and with which words."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mustafar_compile import Settings
from mustafar_compile.settings import PRESETS, merged_options, read_options, setting_names

NAN, INF = float("nan"), float("inf")
SPARSITY, WINDOW = r"a number in \[0, 1\)", "an integer of at least 1"
LAYERS = "a collection of layer numbers from 0 on"


def test_the_defaults_are_the_papers():
    settings = Settings()
    assert (settings.key_sparsity, settings.value_sparsity, settings.window) == (0.5, 0.5, 32)
    assert settings.skip_layers == frozenset()
    assert settings.strict is False
    assert settings.release_dense is False
    assert settings.raise_errors is False


@pytest.mark.parametrize("name", ["key_sparsity", "value_sparsity"])
@pytest.mark.parametrize("value", [1, 1.0, -0.1, 2, NAN, INF, -INF, "0.5", None, True, False, {0.5}, 0.5j])
def test_sparsities_that_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"mustafar: {name}=.* is not accepted; it must be {SPARSITY}$") as error:
        Settings(**{name: value})
    assert f"{name}={value!r} " in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 1.0, 32.0, "32", None, True, NAN])
def test_windows_that_are_refused(value):
    with pytest.raises(ValueError, match=f"window=.* is not accepted; it must be {WINDOW}$") as error:
        Settings(window=value)
    assert f"window={value!r} " in str(error.value)


@pytest.mark.parametrize("name", ["key_code", "value_code"])
@pytest.mark.parametrize("value", ["int2", "INT8", None, 8, torch.int8])
def test_codes_that_are_refused(name, value):
    accepted = "one of 'none', 'int8', 'int4'"
    with pytest.raises(ValueError, match=f"mustafar: {name}=.* is not accepted; it must be {accepted}$"):
        Settings(**{name: value})


KEYS = "'magnitude', 'output-aware', 'think'"
VALUES = "'magnitude', 'think', 'channel-magnitude', 'channel-output-aware'"


@pytest.mark.parametrize(("name", "accepted"), [("key_strategy", KEYS), ("value_strategy", VALUES)])
def test_strategies_of_each_side(name, accepted):
    for strategy in accepted.replace("'", "").split(", "):
        assert Settings(**{name: strategy}).at(name) == strategy
    for value in ["output-aware" if name == "value_strategy" else "channel-magnitude", "THINK", None, 1]:
        with pytest.raises(ValueError, match=f"mustafar: {name}=.* is not accepted; it must be one of {accepted}$"):
            Settings(**{name: value})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_its_settings_are_and_gives_way(preset):
    settings, inductor = read_options(None, {"preset": preset})
    assert settings == Settings(**PRESETS[preset])
    assert inductor == {}
    settings, _ = read_options(None, {"value_code": "none", "preset": preset, "window": 8})
    assert settings == Settings(**PRESETS[preset] | {"value_code": "none", "window": 8})
    assert merged_options("prepare", None, None, {"preset": preset})[0] == {"preset": preset}


@pytest.mark.parametrize("preset", ["tiny", ["safe"]])
def test_a_preset_that_there_is_not(preset):
    wanted = re.escape(f"preset {preset!r} is unknown; accepted are 'safe', 'balanced', 'small'")
    with pytest.raises(ValueError, match=wanted):
        read_options(None, {"preset": preset})


@pytest.mark.parametrize("name", ["strict", "release_dense", "raise_errors"])
@pytest.mark.parametrize("value", [0, 1, None, "yes", []])
def test_switches_are_true_or_false(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.* is not accepted; it must be True or False$"):
        Settings(**{name: value})


@pytest.mark.parametrize("value", [3, "3", "01", None, [-1], [1.0], ["1"], [True], {0: 1}, [[1]], [None], {1.5}])
def test_skip_layers_that_are_refused(value):
    with pytest.raises(ValueError, match=f"skip_layers=.* is not accepted; it must be {LAYERS}$") as error:
        Settings(skip_layers=value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("layers", [[0, 2], (2, 0), {0, 2}, frozenset({0, 2}), range(0, 3, 2), [0, 2, 2]])
def test_skip_layers_may_be_any_collection(layers):
    assert Settings(skip_layers=layers).skip_layers == frozenset({0, 2})


@pytest.mark.parametrize("layers", [[], (), set(), range(0)])
def test_skipping_no_layer(layers):
    assert Settings(skip_layers=layers) == Settings()


@given(st.floats(0, 1, exclude_max=True) | st.just(0), st.floats(0, 1, exclude_max=True), st.integers(1, 2**20))
def test_all_that_is_in_range_is_accepted(key, value, window):
    settings = Settings(key_sparsity=key, value_sparsity=value, window=window)
    assert settings.at("key_sparsity") == key
    assert settings.at("value_sparsity") == value
    assert settings.window == window


def test_settings_compare_by_value_and_do_not_change():
    assert hash(Settings(skip_layers=[1])) == hash(Settings(skip_layers={1}))
    assert Settings(window=8) != Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().window = 8


def test_nothing_set_is_the_defaults():
    assert read_options(None, None) == (Settings(), {})
    assert read_options(None, {}) == (Settings(), {})


def test_options_are_told_apart():
    options = {"key_sparsity": 0.7, "max_autotune": True, "skip-layers": [0], "triton.cudagraphs": True, "strict": True}
    settings, inductor = read_options(None, options)
    assert settings == Settings(key_sparsity=0.7, skip_layers=[0], strict=True)
    assert inductor == {"max_autotune": True, "triton.cudagraphs": True}


def test_no_setting_hides_one_of_inductors():
    assert not set(setting_names()) & set(torch._inductor.config.get_config_copy())


def test_hyphens_are_read_as_torch_compile_reads_them():
    assert read_options(None, {"max-autotune": True, "value-sparsity": 0.1}) == (
        Settings(value_sparsity=0.1),
        {"max_autotune": True},
    )


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_are_those_of_torch(mode):
    settings, inductor = read_options(mode, None)
    off = {"triton.cudagraphs": False} if mode == "max-autotune-no-cudagraphs" else {}
    assert (settings, inductor) == (Settings(), torch._inductor.list_mode_options(mode) | off)
    assert read_options(None, {"mode": mode}) == (settings, inductor), "torch.compile takes a mode or options"


def test_two_modes_are_refused():
    assert read_options("default", {"mode": "default"}) == (Settings(), {})
    with pytest.raises(ValueError, match="two modes are given, 'default' and, as an option, 'max-autotune'; accepted"):
        read_options("default", {"mode": "max-autotune"})


def test_an_option_goes_before_the_mode():
    _, inductor = read_options("reduce-overhead", {"triton.cudagraphs": False})
    assert inductor["triton.cudagraphs"] is False
    read_again = read_options("reduce-overhead", None)[1]
    assert read_again["triton.cudagraphs"] is True, "torch's own table was changed"


@pytest.mark.parametrize("mode", ["", "fast", "Default", "max_autotune", 3, []])
def test_an_unknown_mode_names_the_known(mode):
    with pytest.raises(ValueError, match=re.escape(f"mustafar: mode {mode!r} is unknown; accepted are ")) as error:
        read_options(mode, None)
    for name in torch._inductor.list_mode_options():
        assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["sparsity", "Window", "keysparsity", "triton.nonsense", "", "block", 3, None])
def test_an_unknown_option_names_the_known(name):
    with pytest.raises(ValueError, match=f"^mustafar: option {name!r} is unknown; accepted are ") as error:
        read_options(None, {name: 1})
    for known in (*setting_names(), "torch._inductor.config"):
        assert known in str(error.value)


def test_a_bad_value_among_options_is_refused():
    with pytest.raises(ValueError, match="window=0 is not accepted"):
        read_options("max-autotune", {"max_autotune": True, "window": 0})


def test_an_option_in_two_spellings_is_refused():
    with pytest.raises(ValueError, match="key_sparsity is given twice, as 'key-sparsity' and as 'key_sparsity'"):
        read_options(None, {"key-sparsity": 0.3, "key_sparsity": 0.7})


@pytest.mark.parametrize(("name", "value"), [("triton.cudagraphs", "no"), ("max_autotune", 1), ("max-autotune", None)])
def test_values_of_another_type_than_inductors_are_refused(name, value):
    with pytest.raises(RuntimeError, match="Unexpected type"):
        torch.compile(torch.neg, options={name: value})
    wanted = f"{name.replace('-', '_')}={value!r} is not accepted; it must be of type bool"
    with pytest.raises(ValueError, match=wanted):
        read_options(None, {name: value})
