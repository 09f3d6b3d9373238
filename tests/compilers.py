"""What stands behind the backend in tests."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch._functorch.aot_autograd import aot_module_simplified

from mustafar_compile import _compat


def _run_traced(gm, example_inputs):
    """AOTAutograd without Inductor: functionalised and decomposed all the same, but no C++ is compiled."""

    def eager(graph, _):
        def boxed(args):
            inputs = list(args)
            args.clear()
            return graph(*inputs)

        boxed._boxed_call = True
        return boxed

    return aot_module_simplified(gm, example_inputs, fw_compiler=eager)


@contextmanager
def without_inductor():
    """Rewritten graphs run as traced ATen. Most tests are about rewriting and do not need machine code."""
    original = _compat.compile_fx
    _compat.compile_fx = _run_traced
    torch._dynamo.reset()
    try:
        yield
    finally:
        _compat.compile_fx = original
        torch._dynamo.reset()
