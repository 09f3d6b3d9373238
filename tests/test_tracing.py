"""Tracing to functional ATen in one run of a graph: what ``aot_export_module`` gives in two."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from mustafar_compile import _compat
from mustafar_compile.patterns.graph.calls import call_before


def writes_through_views(x, y):
    x.view(-1)[3:7].add_(1)
    y[:, 1] = x[0, 0]
    return x + y, y.t()


def writes_nothing(x, y):
    z = x.clone()
    z.mul_(2)
    return z, x, x[0]


def returns_what_it_writes(x, y):
    return y.index_copy_(0, torch.tensor([1]), x[:1]), y.sum(), y.shape[0]


def attends(x, y):
    q = x.view(1, 1, *x.shape)
    return (F.scaled_dot_product_attention(q, q, q, is_causal=True), F.layer_norm(y, y.shape[-1:]))


def fakes(symbolic):
    """A mode and its tensors, and like Dynamo their symbolic sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    tensors = [mode.from_tensor(torch.randn(4, 6), static_shapes=not symbolic) for _ in range(2)]
    return mode, [*tensors, *([*tensors[0].shape, *tensors[1].shape] if symbolic else [])]


def described(graph):
    """Its ops, their arguments as numbers of ops, and the sizes of their results."""
    places = {node: i for i, node in enumerate(graph.nodes)}

    def line(node):
        arguments = map_arg((node.args, node.kwargs), lambda x: f"%{places[x]}")
        return node.op, str(node.target) * (node.op != "placeholder"), str(arguments), str(node.meta.get("val"))

    return [line(node)[: 4 if node.op == "call_function" else 3] for node in graph.nodes]


@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("function", [writes_through_views, writes_nothing, returns_what_it_writes, attends])
def test_the_graph_is_that_of_an_export(function, symbolic):
    class Module(nn.Module):
        def forward(self, *given):
            return function(*given[:2])

    with torch.no_grad():
        expected, signature = aot_export_module(Module(), fakes(symbolic)[1], trace_joint=False, pre_dispatch=True)
    mode, given = fakes(symbolic)
    with _compat.tracing.tracing_functionally(mode):
        actual, written = _compat.tracing.make_functional_fx(lambda x, y, *sizes: function(x, y), given)
    assert described(actual.graph) == described(expected.graph)
    assert [signature.user_inputs[i] for i in written] == list(signature.user_inputs_to_mutate.values())


@pytest.mark.parametrize("relay", [lambda x: x.transpose_(0, 1), lambda x: x.unsqueeze_(0), lambda x: x.set_(x + 1)])
def test_an_input_that_is_laid_out_anew_is_refused(relay):
    mode, given = fakes(symbolic=False)
    with (
        _compat.tracing.tracing_functionally(mode),
        pytest.raises(RuntimeError, match="an input gets another shape or storage"),
    ):
        _compat.tracing.make_functional_fx(lambda x, y: (relay(x) * 2, y), given)


def test_calls_that_are_added_leave_sizes_symbolic():
    _, (x, *_) = fakes(symbolic=True)
    graph = torch.fx.Graph()
    given = graph.placeholder("x")
    given.meta["val"] = x
    place = graph.output(given)
    columns = call_before(place, torch.ops.aten.permute.default, given, [1, 0])
    product = call_before(place, torch.ops.aten.matmul.default, given, columns)
    assert all(
        isinstance(_compat.symbols.symbolic_expression(size), sympy.Symbol) for size in product.meta["val"].shape
    )
