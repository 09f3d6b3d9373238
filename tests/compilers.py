"""What stands behind the backend in tests, and how to read what it makes."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager

import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses import FakeTensor

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


def _as_compiled(compile_graph):
    """Graphs refuse buffers of other sizes than their examples had: Inductor builds on those that are no symbols.

    They run without gradients if they were compiled so. Examples that the backend makes are fakes, with symbols for
    what may change; those of Dynamo are the first inputs.
    """

    def compile_checked(gm, example_inputs):
        compiled, gradients = compile_graph(gm, example_inputs), torch.is_grad_enabled()
        known = [(i, x.shape) for i, x in enumerate(example_inputs) if isinstance(x, FakeTensor)]

        def run(*args):
            for i, shape in known:
                given = args[i].shape
                fits = all(not isinstance(n, int) or n == m for n, m in zip(shape, given, strict=True))
                assert fits, f"{list(given)} instead of {list(shape)}"
            with torch.set_grad_enabled(gradients):
                return compiled(*args)

        return run

    return compile_checked


@contextmanager
def _in_place_of_inductor(compile_graph):
    original = _compat.inductor.compile_fx
    _compat.inductor.compile_fx = _as_compiled(compile_graph)
    torch._dynamo.reset()
    try:
        yield
    finally:
        _compat.inductor.compile_fx = original
        torch._dynamo.reset()


def without_inductor():
    """Rewritten graphs run as traced ATen. Most tests are about rewriting and do not need machine code."""
    return _in_place_of_inductor(_run_traced)


def without_compiler():
    """Rewritten graphs run op by op as they are, which takes half the time to set up."""
    return _in_place_of_inductor(lambda gm, example_inputs: gm)


def allocations(code: str, blocks: int) -> list[int]:
    """Bytes of every buffer that Inductor's code allocates. The one symbol in its sizes is the number of blocks."""
    found = re.findall(r"empty_strided_\w+\(\((.*?)\), \(.*?\), torch\.(\w+)\)", code)
    numbers = [(re.sub(r"\bs\d+\b", str(blocks), shape), getattr(torch, dtype)) for shape, dtype in found]
    return [math.prod(eval(f"[{shape}]")) * dtype.itemsize for shape, dtype in numbers]
