"""Every private torch or transformers name that the project uses, in one place.

Each name is probed when this module is imported (by the backend, never by ``import mustafar_compile``), so that an
unsupported version fails with one clear error and not deep inside a compilation.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import CodeType, FrameType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch

_SUPPORTED = "torch 2.11 to 2.15 and transformers 5.17 to 5.24"


def _probe(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"mustafar_compile needs {module}.{name}, which torch {torch.__version__} does not have; "
            f"supported: {_SUPPORTED}"
        ) from error


compile_fx: Callable = _probe("torch._inductor.compile_fx", "compile_fx")
inductor_config = _probe("torch._inductor", "config")
functorch_config = _probe("torch._functorch", "config")
_probe("torch._functorch.config", "enable_autograd_cache")
list_mode_options: Callable[..., dict] = _probe("torch._inductor", "list_mode_options")
TracingContext = _probe("torch._guards", "TracingContext")
FakeTensor = _probe("torch._subclasses", "FakeTensor")
FakeTensorMode = _probe("torch._subclasses", "FakeTensorMode")
AttrSource = _probe("torch._dynamo.source", "AttrSource")
_LocalSource = _probe("torch._dynamo.source", "LocalSource")
_is_the_object = _probe("torch._dynamo.guards", "GuardBuilder").ID_MATCH
_has_as_many = _probe("torch._dynamo.guards", "GuardBuilder").SEQUENCE_LENGTH
_DynamoContext = _probe("torch._dynamo.eval_frame", "_TorchDynamoContext")
_dynamo_log = _probe("torch._dynamo.convert_frame", "log")
ConstantSource = _probe("torch._dynamo.source", "ConstantSource")
skip_code: Callable = _probe("torch._dynamo.eval_frame", "skip_code")
maybe_mark_dynamic: Callable = _probe("torch._dynamo", "maybe_mark_dynamic")
_swap_tensors: Callable[[torch.Tensor, torch.Tensor], None] = _probe("torch._C", "_swap_tensor_impl")
_storage_uses: Callable[[int], int] = _probe("torch._C", "_storage_Use_Count")
StorageWeakRef = _probe("torch.multiprocessing.reductions", "StorageWeakRef")
forbid_data_pointer: Callable[[torch.Tensor], None] = _probe("torch._C", "_set_throw_on_mutable_data_ptr")
return_and_correct_aliasing: Callable = _probe("torch.utils._python_dispatch", "return_and_correct_aliasing")
holds_tensors: Callable[[Any], bool] = _probe("torch.utils._python_dispatch", "is_traceable_wrapper_subclass")
_probe("torch.nn", "Module")._compiled_call_impl  # noqa: B018
foreach_copy: Callable = _probe("torch", "_foreach_copy_")
tree_map: Callable = _probe("torch.utils._pytree", "tree_map")
tree_leaves: Callable = _probe("torch.utils._pytree", "tree_leaves")
enter_autocast: Callable = _probe("torch.amp.autocast_mode", "_enter_autocast")
exit_autocast: Callable = _probe("torch.amp.autocast_mode", "_exit_autocast")
inference_mode_calls = [
    _probe("torch.autograd.grad_mode", name) for name in ("_enter_inference_mode", "_exit_inference_mode")
]

cpp_code_cache = _probe("torch._inductor.codecache", "CppCodeCache")
cpp_compiler: Callable[[], str] = _probe("torch._inductor.cpp_builder", "get_cpp_compiler")

dynamo_config = _probe("torch._dynamo", "config")
_dynamo_counters = _probe("torch._dynamo.utils", "counters")
_compiled_versions: Callable = _probe("torch._dynamo.eval_frame", "_debug_get_cache_entry_list")
_enable_python_dispatcher: Callable = _probe("torch._dispatch.python", "enable_python_dispatcher")
_FunctionalTensor = _probe("torch._subclasses.functional_tensor", "FunctionalTensor")
_FunctionalTensorMode: Any = _probe("torch._subclasses.functional_tensor", "FunctionalTensorMode")
_without_keys: Callable = _probe("torch._C", "_ExcludeDispatchKeyGuard")
_keys: Callable = _probe("torch._C", "DispatchKeySet")
_functionalize = _probe("torch._C", "DispatchKey").Functionalize
_pre_dispatch = _probe("torch._C", "DispatchKey").PreDispatch
_has_kernel: Callable[[str, str], bool] = _probe("torch._C", "_dispatch_has_kernel_for_dispatch_key")
_of_keys: Callable = _probe("torch._C", "_ForceDispatchKeyGuard")
_included: Callable = _probe("torch._C", "_dispatch_tls_local_include_set")
_excluded: Callable = _probe("torch._C", "_dispatch_tls_local_exclude_set")
TorchDispatchMode: Any = _probe("torch.utils._python_dispatch", "TorchDispatchMode")
_is_data_mutated: Callable = _probe("torch", "_functionalize_has_data_mutation")
_is_storage_changed: Callable = _probe("torch", "_functionalize_was_storage_changed")
_sync: Callable = _probe("torch", "_sync")
_from_functional_tensor: Callable = _probe("torch", "_from_functional_tensor")
_make_fx: Callable = _probe("torch.fx.experimental.proxy_tensor", "make_fx")
_tracing: Callable = _probe("torch._guards", "tracing")
_preserve_node_meta: Callable = _probe("torch.fx.traceback", "preserve_node_meta")
_InstructionTranslator = _probe("torch._dynamo.symbolic_convert", "InstructionTranslator")
_functorch_depth: Callable = _probe("torch._C._functorch", "get_dynamic_layer_stack_depth")
_functorch_back_to: Callable = _probe("torch._C._functorch", "pop_dynamic_layer_stack_and_undo_to_depth")
enter_vmap: Callable = _probe("torch._functorch.predispatch", "_vmap_increment_nesting")
leave_vmap: Callable = _probe("torch._functorch.predispatch", "_vmap_decrement_nesting")


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


# Builds of torch without CUDA lack what the next two need, so that is probed only then.


def is_allocated_by_torch(storage: torch.UntypedStorage) -> bool:
    """Whether the CUDA memory of ``storage`` comes from torch's allocator."""
    return _probe("torch._C", "_has_Standard_Deleter")(storage._cdata)


def free_storage(storage: torch.UntypedStorage, message: str) -> None:
    """Free the CUDA memory of ``storage``. Every later access to it raises RuntimeError with ``message``."""
    free = _probe("torch._C", "_free_And_Remove_DeleterFn")
    forbid = _probe("torch._C", "_set_storage_data_ptr_access_error_msg")
    free(storage._cdata)
    forbid(storage._cdata, message)


# Torch may be built without distributed, and its packages take a while to load.


def groups_in(x: Any) -> Sequence[Any]:
    """The process groups of a group, a device mesh or a DTensor, none of anything else."""
    distributed = torch.distributed
    if isinstance(x, distributed.ProcessGroup):
        return [x]
    mesh = getattr(x, "device_mesh", x)
    return mesh.get_all_groups() if isinstance(mesh, distributed.DeviceMesh) else []


def group_named(name: str) -> Any:
    """The process group of a name, None where there is none."""
    with suppress(ValueError, LookupError, RuntimeError):
        return _probe("torch.distributed.distributed_c10d", "_resolve_process_group")(name)
    return None


def backend_of(name: str, device: torch.device) -> str | None:
    """What carries out the collectives of a group on ``device``, such as "nccl"; None where there is no such group."""
    group = group_named(name)
    return None if group is None else group._get_backend(device).name()


def store_of(group: Any) -> Any:
    """The store by which the ranks of ``group`` found each other."""
    return _probe("torch.distributed.distributed_c10d", "_get_process_group_store")(group)


def timeout_of(group: Any) -> float:
    """Seconds that a rank of ``group`` waits for others at most."""
    backends = [group._get_backend(device) for device in group._device_types]
    timeouts = [backend.options._timeout for backend in backends if hasattr(backend, "options")]
    return min(timeouts, default=torch.distributed.default_pg_timeout).total_seconds()


def storage_number(tensor: torch.Tensor) -> int:
    """A number of the storage of ``tensor``, which no other has as long as there is a ``StorageWeakRef`` to it."""
    return tensor.untyped_storage()._cdata


def is_alone_in_memory(tensor: torch.Tensor) -> bool:
    """Whether no other tensor holds the storage of ``tensor``."""
    return _storage_uses(tensor.untyped_storage()._cdata) == 2  # the tensor's and that of the storage as Python sees it


def give_version_counter(tensor: torch.Tensor) -> None:
    """Make ``tensor``, which was made in inference mode, one with a version counter, over the same memory.

    Raises RuntimeError where C++ holds the tensor.
    """
    with torch.inference_mode(False):
        twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        twin.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    _swap_tensors(tensor, twin)


@contextmanager
def compiled_calls(model: torch.nn.Module, replaced: Callable[[Callable], Callable]) -> Iterator[bool]:
    """Within it, calls of a module that ``model.compile`` compiled go to ``replaced(call)``. False where it did not."""
    call = model._compiled_call_impl
    if call is None:
        yield False
        return
    model._compiled_call_impl = replaced(call)
    try:
        yield True
    finally:
        model._compiled_call_impl = call


def takes_static_cache(model: Any) -> bool:
    """Whether a model of transformers can generate over a static cache."""
    flag = "_can_compile_fullgraph"
    if not hasattr(_probe("transformers", "PreTrainedModel"), flag):
        raise ImportError(f"mustafar_compile needs transformers' PreTrainedModel.{flag}; supported: {_SUPPORTED}")
    return getattr(model, flag)


def attention_implementation(model: Any) -> str:
    """By what name a model of transformers attends."""
    name = "_attn_implementation"
    if not hasattr(model.config, name):
        raise ImportError(f"mustafar_compile needs a transformers config's {name}; supported: {_SUPPORTED}")
    return getattr(model.config, name)


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


@contextmanager
def inductor_options(options: dict[str, Any], digest: str, traces_are_cached: bool = True) -> Iterator[None]:
    """Inductor's config with ``options`` set, and ``digest`` in the keys of its caches on disk.

    The key of AOTAutograd's cache names our ops but not their code, so after an upgrade stale code would run. This
    table is part of the key, and made for such digests. traces_are_cached: whether that cache is used. Inductor's own
    is in any case: its key is the graph of all that the ops became.
    """
    known = "unsafe_marked_cacheable_functions"
    changes = {**options, known: getattr(inductor_config, known) | {"mustafar_compile": digest}}
    traces = {} if traces_are_cached else {"enable_autograd_cache": False}
    with inductor_config.patch(changes), functorch_config.patch(traces):
        yield


def loops_of_cpus() -> dict[str, int]:
    """Options of Inductor for a graph on a CPU: as long a loop as newer torch admits there by itself.

    That of torch 2.11, 30 operations, is short of what expands a packed row, which would be stored as a dense one.
    """
    return {"realize_opcount_threshold": 50} if inductor_config.realize_opcount_threshold == 30 else {}


def symbolic_expression(size: torch.SymInt) -> Any:
    """The sympy expression of a symbolic size."""
    return size.node.expr


def hint(size: int | torch.SymInt) -> int:
    """The value that a symbolic size was traced with, without guarding on it."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def float_argument(value: Any) -> float | None:
    """The value of a float that Dynamo made symbolic, for which alone the graph is then; None for anything else."""
    return float(value) if isinstance(value, torch.SymFloat) and value.node.has_hint() else None


def guarded_owners(name: str) -> dict[str, Any]:
    """The objects that the compilation in progress guards on an attribute ``name`` of, by their path.

    A path is an expression such as "L['self'].attn".
    """
    scope = _scope()
    found = {}
    for guard in TracingContext.get().guards_context.dynamo_guards:
        path, _, attribute = guard.name.rpartition(".")
        if attribute == name and path not in found:
            with suppress(*_CANNOT_BE_READ):
                found[path] = eval(path, dict(scope))
    return found


def object_at(path: str) -> Any:
    """What an expression such as "L['self'].layers" leads to in the compilation in progress, None where it does not."""
    with suppress(*_CANNOT_BE_READ):
        return eval(path, dict(_scope()))
    return None


_CANNOT_BE_READ = (AttributeError, KeyError, IndexError, NameError, SyntaxError, TypeError)


def _scope() -> dict[str, Any]:
    """What the names of guards begin with."""
    translator = _InstructionTranslator.current_tx()
    return {"L": translator.f_locals, "G": translator.f_globals}


def bind_to_module() -> None:
    """Make the compilation in progress one for that module alone whose method it is of.

    Dynamo's recompile limit then counts the versions of a function for each module.
    """
    guards = TracingContext.get().guards_context.dynamo_guards
    for name, value in _InstructionTranslator.current_tx().f_locals.items():
        if isinstance(value, torch.nn.Module):
            guards.add(_LocalSource(name).make_guard(_is_the_object))


def guard_on_hooks(name: str) -> None:
    """Make the compilation in progress one for as many forward hooks as there are now on the modules that it concerns.

    Those that it guards on an attribute ``name`` of. By default Dynamo guards on hooks only where there are some.
    """
    owners = guarded_owners(name)
    guards = TracingContext.get().guards_context.dynamo_guards
    for guard in list(guards):
        path, _, attribute = guard.name.rpartition(".")
        if attribute == name and isinstance(owners.get(path), torch.nn.Module):
            hooks = AttrSource(guard.originating_source.base, "_forward_hooks")
            guards.add(hooks.make_guard(_has_as_many))


def has_hook_on_arguments(module: Any) -> bool:
    """Whether a forward hook of a module is given the keyword arguments of its forward."""
    return bool(getattr(module, "_forward_hooks_with_kwargs", None))


def runs_in_a_wrapper() -> bool:
    """Whether what is compiled now is a decorator's wrapper of ``forward``: one function for all that it decorates."""
    translator = _InstructionTranslator.current_tx()
    given = [x for value in translator.f_locals.values() for x in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(x, torch.nn.Module) and _wraps(translator.f_code, type(x).forward) for x in given)


def _wraps(code: CodeType, function: Any) -> bool:
    while hasattr(function, "__wrapped__"):
        if getattr(function, "__code__", None) is code:
            return True
        function = function.__wrapped__
    return False


def buffers_read() -> list[Any]:
    """The registered buffers, which may be None, that the compilation in progress guards on."""
    scope = _scope()
    names = {guard.name for guard in TracingContext.get().guards_context.dynamo_guards}
    found = []
    for name in names:
        if re.search(r"\._buffers\[[^]]*\]$", name):
            with suppress(*_CANNOT_BE_READ):
                found.append(eval(name, dict(scope)))
    return found


def patch_dynamo(**changes: Any) -> None:
    """Set entries of Dynamo's config while the function runs that is compiled now, from its next call on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        context = frame.f_locals.get("self")
        if isinstance(context, _DynamoContext):
            patch = _dynamo_patch(**changes)
            if patch not in context.enter_exit_hooks:
                context.enter_exit_hooks.append(patch)
            return
        frame = frame.f_back


@functools.cache
def _dynamo_patch(**changes: Any) -> Callable[[], Callable[[], None]]:
    """Sets entries of Dynamo's config and returns what sets them back."""
    return dynamo_config._make_closure_patcher(**changes)


def function_being_compiled() -> str:
    return _described(_InstructionTranslator.current_tx().f_code)


def _described(code: CodeType) -> str:
    return f"'{code.co_name}' ({code.co_filename}:{code.co_firstlineno})"  # as Dynamo says it


@contextmanager
def functions_given_up() -> Iterator[list[str]]:
    """A list that gets each function that Dynamo gives up on, as it has too many compiled versions."""
    found: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("torch._dynamo hit config."):
            found.append(cast(tuple, record.args)[2])
        return True

    _dynamo_log.addFilter(note)
    try:
        yield found
    finally:
        _dynamo_log.removeFilter(note)


_limits: WeakKeyDictionary[CodeType, int] = WeakKeyDictionary()
"""How many versions Dynamo makes at most of each function that the backend was given a graph of."""


def note_recompile_limit() -> None:
    """Note the limit of the function whose compilation is in progress."""
    _limits[_InstructionTranslator.current_tx().f_code] = dynamo_config.recompile_limit


def functions_at_recompile_limit() -> list[str]:
    """The functions of which the backend was given as many graphs as Dynamo makes versions."""
    return [_described(code) for code in _limits if _is_at_limit(code)]


def _is_at_limit(code: CodeType) -> bool:
    return len(_compiled_versions(code)) >= _limits.get(code, dynamo_config.recompile_limit)


def recompile_limit_hits() -> int:
    """How often Dynamo gave up on a function since it has too many compiled versions."""
    graph_breaks = _dynamo_counters["unimplemented"]
    known = list(graph_breaks.items())  # Dynamo may be counting meanwhile: it sees the frames that are called here
    return sum(count for reason, count in known if reason.startswith("Dynamo recompile limit exceeded"))


def function_at_recompile_limit() -> str | None:
    """The function on the Python stack that Dynamo gave up on, if any."""
    frame = sys._getframe(1) if recompile_limit_hits() else None
    while frame is not None:
        if _is_at_limit(frame.f_code):
            return _described(frame.f_code)
        frame = frame.f_back
    return None
