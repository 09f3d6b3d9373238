"""Graphs that are compiled in pieces: they compute what the whole does, and a model's layers are compiled once."""

from __future__ import annotations

import copy
import functools
import operator
import weakref

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from compilers import without_compiler
from models import hf_model, prompt
from mustafar_compile import _compat, backend, explain
from mustafar_compile.calling.in_pieces import InPieces
from mustafar_compile.hugging_face import generate_over_static_caches
from mustafar_compile.patterns.rewriting.pieces import pieces_of
from nightly import at_night
from reference import pruned_generation

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
LAYERS, SHAPE = 8, (2, 1, 4, 8)
OPS = {"attend": 3, "add": 2, "mul": 2, "view": 1, "constant": 1}


def graph_of(layer, writes, results):
    """A graph of layers that are alike: values that begin as inputs go in, and the last values that they make come out.

    layer: (op, places of its arguments, counted from the last value). writes: (input, value) at the end.
    """
    graph, mode = Graph(), FakeTensorMode()
    inputs = [graph.placeholder(f"x{i}") for i in range(4)]
    for node in inputs:
        node.meta["val"] = mode.from_tensor(torch.empty(SHAPE))
    values = list(inputs)
    for _ in range(LAYERS):
        for op, places in (*layer, ("attend", (0, 1, 2))):
            taken = [values[-1 - place] for place in places]
            match op:
                case "attend":
                    node = graph.call_function(SDPA, tuple(taken))
                case "view":
                    node = graph.call_function(aten.view.default, (taken[0], list(SHAPE)))
                case "constant":
                    node = graph.call_function(aten.add.Tensor, (taken[0], graph.get_attr("constant")))
                case _:
                    node = graph.call_function(getattr(aten, op).Tensor, tuple(taken))
            values.append(node)
    for base, value in dict(writes).items():
        graph.call_function(aten.copy_.default, (inputs[base], values[4 + value % (len(values) - 4)]))
    graph.output((*(values[4 + i % (len(values) - 4)] for i in results), None, 7))
    return GraphModule({"constant": torch.full((1,), 0.5)}, graph)


def layers():
    calls = [st.tuples(st.just(op), st.tuples(*[st.integers(0, 3)] * arity)) for op, arity in OPS.items()]
    return st.lists(st.one_of(calls), max_size=5)


@given(
    layer=layers(),
    writes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99)), max_size=3),
    results=st.lists(st.integers(0, 99), min_size=1, max_size=3),
)
@example(layer=[("view", (3,))], writes=[(0, 1)], results=[3])  # a view of what is written is read later
@example(layer=[("add", (1, 1))], writes=[(0, 3), (1, 0)], results=[2, 2])
@example(layer=[("add", (0, 0)), ("view", (0,)), ("view", (2,))], writes=[(3, 0), (0, 2)], results=[0])
@example(layer=[("view", (0,))], writes=[(3, 3)], results=[0])  # one piece gives a view of an input, its like a copy
@settings(max_examples=25, deadline=None)
def test_pieces_compute_what_the_whole_graph_does(layer, writes, results):
    whole = graph_of(layer, writes, results)
    torch.manual_seed(0)
    inputs = [torch.randn(SHAPE) for _ in range(4)]
    expected_inputs = [x.clone() for x in inputs]
    expected = whole(*expected_inputs)
    cut = copy.deepcopy(whole)
    with torch.no_grad():
        pieces = pieces_of(cut, inputs)
    assume(pieces)
    actual = InPieces(cut, pieces, as_they_are(pieces))(*inputs)
    assert expected[-2:] == tuple(actual[-2:]) == (None, 7)
    for a, b in zip([*expected[:-2], *expected_inputs], [*actual[:-2], *inputs], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def as_they_are(pieces):
    """The pieces by their kind, not compiled."""
    modules = {piece.kind: piece.as_module() for piece in pieces}
    return {kind: lambda given, module=module: module(*given) for kind, module in modules.items()}


def chain(layer, inputs=1):
    """A graph in which ``layer(graph, number, x, inputs)`` makes of a value the next, for each of its layers."""
    graph, mode = Graph(), FakeTensorMode()
    given = [graph.placeholder(f"x{i}") for i in range(inputs)]
    whole = mode.from_tensor(torch.empty(inputs, *SHAPE))
    for node, part in zip(given, whole, strict=True):
        node.meta["val"] = part
    x = given[0]
    for number in range(LAYERS):
        x = layer(graph, number, x, given)
    graph.output((x,))
    return GraphModule({}, graph)


def attend(graph, number, x, inputs):
    return graph.call_function(SDPA, (x, x, x))


def scale_by_number(graph, number, x, inputs):
    return attend(graph, number, graph.call_function(aten.mul.Tensor, (x, number)), inputs)


def write_beside(graph, number, x, inputs):
    """Into a tensor of which attention reads another part."""
    graph.call_function(aten.copy_.default, (inputs[number], x))
    return graph.call_function(SDPA, (inputs[number], inputs[number + 1], x))


def cast_within(graph, number, x, inputs):
    region = graph.call_function(_compat.tracing.enter_autocast, ("cpu", torch.bfloat16, True, True))
    x = attend(graph, number, x, inputs)
    graph.call_function(_compat.tracing.exit_autocast, (region,))
    return x


@pytest.mark.parametrize(
    ("layer", "count", "kinds"),
    [(attend, LAYERS, 2), (scale_by_number, 0, 0), (write_beside, 0, 0), (cast_within, 0, 0)],
)
def test_a_graph_is_cut_where_layers_are_alike_and_all_that_they_do_is_seen(layer, count, kinds):
    inputs = 1 if layer in (attend, scale_by_number) else LAYERS + 1
    pieces = pieces_of(chain(layer, inputs), [torch.empty(SHAPE)] * inputs)
    assert (len(pieces), len({piece.kind for piece in pieces})) == (count, kinds)


def test_an_input_is_written_in_the_piece_that_makes_what_is_written():
    """As the counts of a static cache are, of which the first piece reads a view each, to compare them."""

    def count(graph, number, x, inputs):
        if number == 0:
            for given in inputs[1:]:
                x = graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.view.default, (given, SHAPE))))
        x = graph.call_function(aten.mul.Tensor, (x, x))
        counted.append((inputs[number + 1], graph.call_function(aten.add.Tensor, (inputs[number + 1], 1))))
        x = attend(graph, number, x, inputs)
        for write in counted if number == LAYERS - 1 else ():
            graph.call_function(aten.copy_.default, write)
        return x

    counted = []
    graph = chain(count, LAYERS + 1)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta["val"] = node.meta["val"].clone()  # memory of its own
    pieces = pieces_of(graph, [torch.empty(SHAPE)] * (LAYERS + 1))
    assert [sum(node.target is aten.copy_.default for node in piece.nodes) for piece in pieces] == [1] * LAYERS


def test_an_input_is_not_written_before_a_view_of_it_is_read():
    def read_late(graph, number, x, inputs):
        if number == 0:
            late.append(graph.call_function(aten.view.default, (inputs[0], SHAPE)))
            late.append(graph.call_function(aten.exp.default, (x,)))
        x = attend(graph, number, x, inputs)
        if number == LAYERS - 1:
            x = graph.call_function(aten.add.Tensor, (x, late[0]))
            graph.call_function(aten.copy_.default, (inputs[0], late[1]))
        return x

    late = []
    graph = chain(read_late)
    given = torch.randn(SHAPE)
    (expected,) = graph(given.clone())
    pieces = pieces_of(graph, [given])
    modules = as_they_are(pieces)
    (result,) = InPieces(graph, pieces, modules)(given.clone()) if pieces else graph(given.clone())
    torch.testing.assert_close(result, expected)


def test_what_no_later_attention_needs_stays_in_its_piece():
    """As keys and values of a prompt do, which are compressed behind their attention."""

    def leave(graph, number, x, inputs):
        doubled = graph.call_function(aten.add.Tensor, (x, x))
        x = graph.call_function(SDPA, (x, doubled, doubled))
        results.append(graph.call_function(aten.exp.default, (doubled,)))
        return x

    results = []
    graph = chain(leave)
    graph.graph.output_node().args = ((*graph.graph.output_node().args[0], *results),)
    pieces = pieces_of(graph, [torch.empty(SHAPE)])
    assert [len(piece.gives) for piece in pieces] == [2] * LAYERS  # the result of attention, and what is left


def test_values_are_let_go_when_no_piece_needs_them_any_more():
    graph, given = chain(attend), torch.ones(SHAPE)
    pieces = pieces_of(graph, [given])

    def watched(call):
        def run(arguments):
            made = [weakref.ref(x) for x in arguments if x is not given]
            results = call(arguments)
            arguments.clear()
            assert not any(x() is not None for x in made)
            return results

        return run

    compiled = {kind: watched(call) for kind, call in as_they_are(pieces).items()}
    InPieces(graph, pieces, compiled)(given)


def attend_beside_a_transposed_sum(graph, number, x, inputs):
    columns = graph.call_function(aten.transpose.int, (x, 2, 3))
    twice = graph.call_function(aten.add.Tensor, (columns, columns))
    seen = attend(graph, number, x, inputs)
    rows = graph.call_function(aten.transpose.int, (twice, 2, 3))
    return graph.call_function(aten.add.Tensor, (seen, rows))


def test_what_goes_from_piece_to_piece_is_contiguous():
    """Inductor lays values out as decompositions do, which may differ from the trace that was cut."""
    graph, given, strided = chain(attend_beside_a_transposed_sum), torch.rand(SHAPE), []

    def watched(call):
        return lambda arguments: strided.extend(x for x in arguments if not x.is_contiguous()) or call(arguments)

    pieces = pieces_of(graph, [given])
    (result,) = InPieces(graph, pieces, {kind: watched(call) for kind, call in as_they_are(pieces).items()})(given)
    torch.testing.assert_close(result, graph(given)[0])
    assert not strided


def test_attention_is_given_as_it_lies_in_memory(monkeypatch):
    """As its query lies: [B, L, H, D], behind a projection."""
    monkeypatch.setitem(globals(), "SHAPE", (2, 3, 4, 8))
    graph, given, taken = chain(attend), torch.rand(2, 4, 3, 8).transpose(1, 2), []
    (node,) = graph.graph.find_nodes(op="placeholder")
    node.meta["val"] = node.meta["val"].transpose(1, 2).contiguous().transpose(1, 2)

    def watched(call):
        return lambda arguments: taken.extend(arguments) or call(arguments)

    pieces = pieces_of(graph, [given])
    InPieces(graph, pieces, {kind: watched(call) for kind, call in as_they_are(pieces).items()})(given)
    assert len(taken) == LAYERS
    assert all(x.transpose(1, 2).is_contiguous() for x in taken)


def test_what_inductor_gives_can_be_called_with_a_list_that_it_empties():
    found = []

    def compile_boxed(gm, inputs):
        found.append(_compat.inductor.boxed(_compat.inductor.compile_fx(gm, inputs)))
        return gm

    with torch.no_grad():
        torch.compile(torch.mm, backend=compile_boxed)(torch.eye(2), torch.eye(2))  # needs no C++
        arguments = [torch.full((2, 2), 3.0), torch.eye(2)]
        (result,) = found[0](arguments)
    assert torch.equal(result, torch.full((2, 2), 3.0))
    assert not arguments


@pytest.mark.parametrize("cache", ["static", *at_night(["dynamic"])])
def test_the_layers_of_a_model_are_compiled_once(cache, monkeypatch):
    """As ``prepare`` sets a model up on a GPU, and over a dynamic cache: prompts and steps of three pieces each."""
    plain, compiled = hf_model(num_hidden_layers=5), []
    model = copy.deepcopy(plain)
    with torch.no_grad(), without_compiler(), monkeypatch.context() as watched:
        compile_graph = _compat.inductor.compile_fx
        watched.setattr(_compat.inductor, "compile_fx", lambda *given: compiled.append(given) or compile_graph(*given))
        if cache == "static":
            generate_over_static_caches(model)
        model.compile(backend=functools.partial(backend.mustafar, options={"window": 4}))
        for length, graphs in ((9, 2), (13, 4 if cache == "static" else 3)):
            inputs, how = prompt(length=length), {"max_new_tokens": 6, "do_sample": False}
            with pruned_generation(0.5, 0.5, 4):
                expected = plain.generate(**inputs, **how)
            with explain() as report:
                actual = model.generate(**inputs, **how)
            assert torch.equal(actual, expected)
            assert len(compiled) == 3 * graphs, report


def test_a_graph_of_sizes_alone_stays_whole():
    """As between two breaks of a graph: no value of it is a tensor."""
    graph = Graph()
    size = graph.placeholder("size")
    graph.output((graph.call_function(operator.add, (size, 1)),))
    assert pieces_of(GraphModule({}, graph), [3]) == []
