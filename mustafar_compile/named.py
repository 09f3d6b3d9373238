"""The backend as ``torch.compile`` finds it by its name, loaded when that is first asked for."""

from __future__ import annotations

import atexit

from .backend import mustafar
from .reporting.explain import warn_if_nothing_was_compiled

__all__ = ["mustafar"]

# torch.compile(model).generate() never comes to the backend, so that it was chosen in vain is only known at the end.
atexit.register(warn_if_nothing_was_compiled)
