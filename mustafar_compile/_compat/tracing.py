"""Tracing: fake inputs, and graphs of functional ATen before dispatch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .dynamo import TracingContext
from .probe import probe
from .tensors import TorchDispatchMode, holds_tensors

FakeTensor = probe("torch._subclasses", "FakeTensor")
FakeTensorMode = probe("torch._subclasses", "FakeTensorMode")
enter_autocast: Callable = probe("torch.amp.autocast_mode", "_enter_autocast")
exit_autocast: Callable = probe("torch.amp.autocast_mode", "_exit_autocast")
inference_mode_calls = [
    probe("torch.autograd.grad_mode", name) for name in ("_enter_inference_mode", "_exit_inference_mode")
]
enter_vmap: Callable = probe("torch._functorch.predispatch", "_vmap_increment_nesting")
leave_vmap: Callable = probe("torch._functorch.predispatch", "_vmap_decrement_nesting")
_enable_python_dispatcher: Callable = probe("torch._dispatch.python", "enable_python_dispatcher")
_FunctionalTensor = probe("torch._subclasses.functional_tensor", "FunctionalTensor")
_FunctionalTensorMode: Any = probe("torch._subclasses.functional_tensor", "FunctionalTensorMode")
_without_keys: Callable = probe("torch._C", "_ExcludeDispatchKeyGuard")
_keys: Callable = probe("torch._C", "DispatchKeySet")
_functionalize = probe("torch._C", "DispatchKey").Functionalize
_pre_dispatch = probe("torch._C", "DispatchKey").PreDispatch
_has_kernel: Callable[[str, str], bool] = probe("torch._C", "_dispatch_has_kernel_for_dispatch_key")
_of_keys: Callable = probe("torch._C", "_ForceDispatchKeyGuard")
_included: Callable = probe("torch._C", "_dispatch_tls_local_include_set")
_excluded: Callable = probe("torch._C", "_dispatch_tls_local_exclude_set")
_is_data_mutated: Callable = probe("torch", "_functionalize_has_data_mutation")
_is_storage_changed: Callable = probe("torch", "_functionalize_was_storage_changed")
_sync: Callable = probe("torch", "_sync")
_from_functional_tensor: Callable = probe("torch", "_from_functional_tensor")
_make_fx: Callable = probe("torch.fx.experimental.proxy_tensor", "make_fx")
_tracing: Callable = probe("torch._guards", "tracing")
_preserve_node_meta: Callable = probe("torch.fx.traceback", "preserve_node_meta")
_functorch_depth: Callable = probe("torch._C._functorch", "get_dynamic_layer_stack_depth")
_functorch_back_to: Callable = probe("torch._C._functorch", "pop_dynamic_layer_stack_and_undo_to_depth")


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The mode that the fake tensors among ``values`` belong to, a context manager."""
    return next(x for x in values if isinstance(x, FakeTensor)).fake_mode


@contextmanager
def fake_results(values: Iterable[Any]) -> Iterator[None]:
    """Within it, ops give fake results, in the mode of the fake tensors among ``values``.

    Without Python's dispatcher, matmul of torch 2.11 asks for each size as a number, which a symbolic one then is.
    """
    with fake_mode_of(values), _enable_python_dispatcher():
        yield


def fakify(example_inputs: Sequence[Any], stand_in: Callable[[int, Any], Any | None]) -> tuple[Any, list[Any]]:
    """Fake copies of graph inputs over the ShapeEnv of the compilation in progress, and their mode.

    A fresh FakeTensorMode is used: the placeholders' own fakes belong to a mode whose metadata tracing may have
    changed. ``stand_in(i, x)`` may return a fake of its own for input ``i``, as a function of no arguments.
    """
    context = TracingContext.get()
    mode = FakeTensorMode(shape_env=context.fake_mode.shape_env)
    fakes = []
    for i, x in enumerate(example_inputs):
        make = stand_in(i, x)
        if make is not None:
            with mode:
                fakes.append(make())
        elif isinstance(x, torch.Tensor):
            symbolic = context.tensor_to_context.get(x)
            source = symbolic.tensor_source if symbolic is not None else None
            fakes.append(mode.from_tensor(x, static_shapes=symbolic is None, symbolic_context=symbolic, source=source))
        else:
            fakes.append(x)
    return mode, fakes


def _functional_mode() -> Any:
    """Torch's mode, in which tensors that are made of others act by their own rules, where they do in eager mode.

    Torch's would refuse them here. An op of another library that consists of others is replaced by them; torch's would
    keep it and warn. It is an object of torch's very class, by which ops that take functions (flex_attention) know it.
    """
    mode = _FunctionalTensorMode(pre_dispatch=True, export=True)
    mode.__torch_dispatch__ = functools.partial(_functionally, mode)
    return mode


def _functionally(mode: Any, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
    kwargs = kwargs or {}
    if composed := _with_parts(types):
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            raise TypeError(f"attention takes a {composed[0].__name__}, {_MADE_OF_OTHERS}; give it plain tensors")
        with mode, _without_keys(_keys(_pre_dispatch)), _BackBeforeAutograd():
            return func(*args, **kwargs)
    if func.namespace not in ("aten", "prim"):
        with mode:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return _FunctionalTensorMode.__torch_dispatch__(mode, func, types, args, kwargs)


class _BackBeforeAutograd(TorchDispatchMode):
    """Behind autograd, where rules of tensors that are made of others run: leads what they do with plain ones back."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if _with_parts(types):
            return NotImplemented
        for device in self.autocast:  # a graph has no way to say that the op is not for autocast any more
            if not torch.is_autocast_enabled(device) and _has_kernel(func.name(), f"Autocast{device.upper()}"):
                raise TypeError(
                    f"under autocast, {func} runs on parts of {_MADE_OF_OTHERS}; convert the model to the dtype instead"
                )
        before = _keys(_pre_dispatch)
        with _of_keys(_included() | before, _excluded() - before):
            return func(*args, **kwargs or {})


_MADE_OF_OTHERS = "a tensor that is made of other tensors"


def _with_parts(types: Sequence[type]) -> list[type]:
    """Those of ``types`` whose tensors are made of others."""
    return [kind for kind in types if kind is not _FunctionalTensor and hasattr(kind, "__tensor_flatten__")]


@contextmanager
def tracing_functionally(fake_mode: Any) -> Iterator[None]:
    """Within it, ``make_functional_fx`` can trace."""
    with _tracing_anew(fake_mode), _functional_mode():
        yield


@contextmanager
def _tracing_anew(fake_mode: Any) -> Iterator[None]:
    """A graph enters and leaves the levels of functorch by calls; those that a failure leaves open are closed."""
    depth = _functorch_depth()
    try:
        with fake_mode, _preserve_node_meta(), torch.no_grad(), _tracing(None), _enable_python_dispatcher():
            yield
    finally:
        _functorch_back_to(depth)


def make_dispatched_fx(function: Callable[..., Sequence[Any]], fakes: Sequence[Any]) -> torch.fx.GraphModule:
    """Trace ``function`` to the ATen that its ops become in a vmap, keeping node metadata."""
    with _tracing_anew(fake_mode_of(fakes)):
        return _make_fx(function)(*fakes)


def make_functional_fx(
    function: Callable[..., Sequence[Any]], fakes: Sequence[Any]
) -> tuple[torch.fx.GraphModule, list[int]]:
    """Trace ``function`` to functional pre-dispatch ATen, keeping node metadata.

    Returns the graph and which inputs ``function`` writes; the new values of those are the first results. As
    ``aot_export_module``, in one run of the function where that takes two. Raises RuntimeError for an input that gets
    another shape or storage.
    """
    written: list[int] = []

    def functional(*args: Any) -> tuple[Any, ...]:
        with _without_keys(_keys(_functionalize)):  # as AOTAutograd does
            wrapped = [_FunctionalTensor.to_functional(x) if isinstance(x, torch.Tensor) else x for x in args]
            results = [_unwrapped(x) for x in function(*wrapped)]
            tensors: list[tuple[int, Any]] = [(i, x) for i, x in enumerate(wrapped) if isinstance(x, torch.Tensor)]
            for i, x in tensors:
                laid_out_anew = x.shape != args[i].shape or x.stride() != args[i].stride()
                if laid_out_anew or _is_storage_changed(x.elem):
                    raise RuntimeError("an input gets another shape or storage")
            written[:] = [i for i, x in tensors if _is_data_mutated(x.elem)]
            return (*[_unwrapped(wrapped[i]) for i in written], *results)

    graph = _make_fx(functional, pre_dispatch=True)(*fakes)
    graph.graph.eliminate_dead_code()
    return graph, written


def _unwrapped(x: Any) -> Any:
    if holds_tensors(x):
        raise TypeError(f"a result is a {type(x).__name__}, {_MADE_OF_OTHERS}; let the model return plain ones")
    if not isinstance(x, _FunctionalTensor):
        return x
    _sync(x)
    return _from_functional_tensor(x.elem)
