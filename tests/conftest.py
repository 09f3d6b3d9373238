"""Hypothesis profiles: HYPOTHESIS_PROFILE=long searches further; CI runs the same examples every time.

FUZZ_EXAMPLES is how far the long profile searches. A property takes so many examples, or half or a quarter where
each compiles a model. 2000 gives `make fuzz` 13,500 examples, 1,500 of them models, and 4,000 stateful runs, 2,000 of
them on 100 compiled models. FUZZ_SHARDS splits the slow ones into so many tests, for as many processes.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from mustafar_compile.lowering import builds
from mustafar_compile.lowering.strategies import STRATEGIES

# The only fixture that property tests take is `device`, a constant.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("default", max_examples=20, derandomize="CI" in os.environ, **_COMMON)
settings.register_profile(
    "long", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "500")), derandomize=False, **_COMMON
)
SHARDS = int(os.environ.get("FUZZ_SHARDS", "1"))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: no process is left with it when the others are done."""
    items.sort(key=lambda item: "in_the_interpreter" not in item.name)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it again after each compilation."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def sharded(examples: int) -> int:
    """How many of ``examples`` each shard takes. Seeds are random, so each takes others."""
    return -(-examples // SHARDS)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=""))]
)
def device(request) -> str:
    """Every device that this machine has."""
    return request.param


@pytest.fixture
def no_grad():
    """Without gradients, as models generate."""
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_dynamo(no_grad):
    """Nothing is compiled before the test nor stays compiled behind it, and it runs without gradients."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def uncompiled():
    """Rewritten graphs run op by op."""
    from compilers import without_compiler  # loads Inductor

    with without_compiler():
        yield


@pytest.fixture
def new_notices(monkeypatch) -> None:
    """No notice was given before."""
    monkeypatch.setattr("mustafar_compile.reporting.notices._given", set())


@pytest.fixture
def seeded() -> None:
    """Random numbers are the same each time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _strategies():
    """What a test registers is not known to the next."""
    known = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(known)


@pytest.fixture(autouse=True)
def _cpu_kernels(request, monkeypatch) -> None:
    """Without the mark ``native`` the portable code runs on a CPU: C++ is built for each dtype, head dim and group."""
    if "native" not in request.keywords:
        monkeypatch.setattr(builds, "why_not", lambda: "the tests ask for PyTorch")
