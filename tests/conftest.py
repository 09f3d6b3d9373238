"""Hypothesis profiles: HYPOTHESIS_PROFILE=long searches further; CI runs the same examples every time."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", max_examples=20, deadline=None, derandomize="CI" in os.environ)
settings.register_profile("long", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=""))])
def device(request) -> str:
    """Every device that this machine has."""
    return request.param
