"""What a compiled graph is foretold to need, rule by rule. ``test_planning.py`` has it beside what one allocates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from mustafar_compile.planning import fusion

ROWS = sympy.Symbol("rows", positive=True)
SQUARE, WIDER, BACK = torch.ones(4, 4), torch.ones(4, 32), torch.ones(32, 4)


def columns(function: Callable[[Tensor], Tensor], kept: int = 1) -> sympy.Expr:
    """Columns of float32 that stand at most in a function of a matrix of four. kept: of places that could be taken."""
    module = type("Module", (torch.nn.Module,), {"forward": lambda self, x: function(x)})()
    rows = {0: torch.export.Dim("rows")}
    gm = torch.export.export(module, (torch.ones(7, 4),), dynamic_shapes={"x": rows}).graph_module
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "KEPT", sympy.Integer(kept))
        return fusion.peak(gm, inputs, {7: ROWS}) / (4 * ROWS)


def gated(x: Tensor) -> Tensor:
    return (F.silu(x @ WIDER) * (x @ WIDER)) @ BACK


def stream(layers: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for _ in range(layers):
            x = x + F.softmax(x, -1) @ SQUARE
        return x

    return run


def side_by_side(x: Tensor) -> Tensor:
    x = x @ WIDER
    return torch.relu(x) @ BACK + torch.sigmoid(x) @ BACK


def test_elementwise_ops_make_only_what_a_product_reads():
    assert columns(lambda x: torch.relu(2 * x + 1) @ SQUARE) == 4 + 4
    assert columns(lambda x: (2 * x + 1).sum(-1)) == 1


def test_elementwise_ops_may_take_the_place_of_what_they_read_last():
    assert columns(gated, kept=1) == 3 * 32
    assert columns(gated, kept=0) == 2 * 32
    assert columns(torch.relu, kept=0) == 4  # what is given is not written


def test_views_and_joining_with_nothing_make_nothing():
    assert columns(lambda x: torch.cat([x.new_empty(0, 4), x @ SQUARE]).view(-1, 2, 2).transpose(1, 2)) == 4
    assert columns(lambda x: torch.cat([x.new_empty(0, 4), x @ SQUARE]) @ SQUARE) == 4 + 4


@pytest.mark.parametrize("layers", range(1, 8))
def test_a_residual_stream_is_summed_once_there_is_much_to_read(layers):
    """A product is kept for each layer, up to the third: x and four products are more than four buffers to read."""
    assert columns(stream(layers)) == 4 * min(layers + 1, 5)


def test_elementwise_ops_that_read_the_same_run_at_once():
    assert columns(side_by_side) == 3 * 32


def test_what_is_returned_with_four_dims_is_the_cache():
    assert columns(lambda x: (x @ SQUARE).view(1, 1, -1, 4)) == 0
    assert columns(lambda x: x @ SQUARE) == 4


def test_a_graph_within_a_graph_has_no_formula():
    def branches(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    with pytest.raises(fusion.UnknownMemoryError, match="graph"):
        columns(branches)
