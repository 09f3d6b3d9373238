"""Running a Dynamo graph to trace it again."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from mustafar_compile import _compat

from .nodes import located


class Interpreter(torch.fx.Interpreter):
    """Runs ``graph`` with the attributes of ``gm``. An error gets a note of the line of the model that it comes from.

    It enters autocast where the graph does: tracing alone notes the calls, and dtypes inside would miss the casts.
    It enters no inference mode: what is made in there is like what is made without gradients.
    Floats are numbers in it, such as a scale, also where Dynamo was told to make all that it can symbolic.
    """

    def __init__(self, gm: GraphModule, graph: Graph) -> None:
        super().__init__(gm, graph=graph)
        self.extra_traceback = False  # it makes another error of a KeyError; the line is noted by ``located``
        self.regions: list[torch.autocast] = []

    def run(self, *args: Any, **options: Any) -> Any:
        try:
            return super().run(*args, **options)
        finally:  # what a failure leaves open
            while self.regions:
                self._leave()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _compat.tracing.enter_autocast:
            self.regions.append(torch.autocast(*args))
            return self.regions[-1].__enter__()
        if target is _compat.tracing.exit_autocast:
            return self._leave()
        return None if target in _compat.tracing.inference_mode_calls else super().call_function(target, args, kwargs)

    def run_node(self, node: Node) -> Any:
        number = _compat.symbols.float_argument(node.meta.get("example_value")) if node.target == "item" else None
        with located(node):
            return super().run_node(node) if number is None else number

    def _leave(self) -> None:
        self.regions.pop().__exit__(None, None, None)
