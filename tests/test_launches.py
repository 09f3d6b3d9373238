"""Launching kernels: when they are compiled, and that an error is the launch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from mustafar_compile.lowering.launches import Launch, launch

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Kernel:
    """Notes what is done with it."""

    def __init__(self, name, noted):
        self.name, self.noted = name, noted

    def warmup(self, *, grid, **given):
        self.noted.append(("compile", self.name, grid, given))

    def __getitem__(self, grid):
        return lambda **given: self.noted.append(("launch", self.name, grid, given))


def test_kernels_are_compiled_together_before_the_first_of_them_is_launched():
    noted = []
    first, second, third = (Kernel(name, noted) for name in "abc")
    given = {"x": 1, "num_warps": 2}
    ab, ac = ([Launch(k, (3, 4), given) for k in pair] for pair in ((first, second), (first, third)))
    launch(ab, CUDA)
    assert noted == [(done, name, (3, 4), given) for done in ("compile", "launch") for name in "ab"]
    for launches, expected in ((ab, "LaLb"), (ac, "CaCcLaLc"), (ac, "LaLc")):
        noted.clear()
        launch(launches, CUDA)
        assert "".join(done[0].upper() + name for done, name, *_ in noted) == expected


def test_nothing_is_compiled_for_a_cpu():
    noted = []
    launch([Launch(Kernel("a", noted), (1,), {})], CPU)
    assert noted == [("launch", "a", (1,), {})]


@triton.jit
def _doubles(x):
    tl.store(x, tl.load(x) * 2)


@triton.jit
def _fails(x):
    tl.static_assert(False, "no such kernel")


class WithoutGPU:
    """What Triton asks a driver for to compile."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def test_an_error_is_that_of_the_launch(monkeypatch):
    """And leaves the others compiled, and Triton as it was."""
    launched = []
    monkeypatch.setattr(triton.runtime.driver, "_active", WithoutGPU())
    monkeypatch.setattr(type(_doubles), "__getitem__", lambda self, grid: lambda **given: launched.append(self))
    given = {"x": torch.zeros(4)}
    launch([Launch(_fails, (1,), given), Launch(_doubles, (1,), given)], CUDA)
    assert launched == [_fails, _doubles]
    assert [len(kernel.device_caches[0][0]) for kernel in launched] == [0, 1]
    with pytest.raises(triton.CompilationError, match="no such kernel"):
        _fails.warmup(grid=(1,), **given)
