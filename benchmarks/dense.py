"""Dense attention for one decode step in every way that the machine offers: what ours competes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import ON_GPU, graphed, median_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
PAGE = 16  # tokens of a page of FlashInfer's cache
_reported: set[str] = set()


def _sdpa(backend: SDPBackend) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])

    return attention


def _packed(attention: Attention) -> Attention:
    """The query heads of a KV head as so many query tokens: without a mask that is the same attention."""

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, _, head_dim = query.shape
        rows = query.reshape(batch, key.shape[1], heads // key.shape[1], head_dim)
        return attention(rows, key, value).reshape(batch, heads, 1, value.shape[3])

    return packed


def sdpa_attentions() -> dict[str, Attention]:
    """PyTorch's own, by name."""
    if not ON_GPU:
        return {"math": _sdpa(SDPBackend.MATH)}
    plain = {name: _sdpa(backend) for name, backend in _BACKENDS.items()}
    return plain | {f"{name}, packed": _packed(attention) for name, attention in plain.items()}


def flex_attention() -> Attention:
    """FlexAttention, which generates a kernel for the shape that it sees."""
    from torch.nn.attention import flex_attention as flex

    torch._dynamo.reset()  # after eight shapes it would give up and run the slow uncompiled code
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, enable_gqa=query.shape[1] != key.shape[1])


def planned_flashinfer(
    batch: int, heads: tuple[int, int], tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """FlashInfer's decode step over a cache of ``dtype``: pages [2, pages, KV heads, PAGE, D], row by row of the batch.

    heads: of the query, in bfloat16, and KV heads. Raises ImportError where FlashInfer is not installed.

    Without tensor cores: with them, version 0.6.0 took 97 s to compile for an H100 and ran at less than half the speed.
    Not in a CUDA graph: replayed, that version reads what is not its own.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=False)
    pages = tokens // PAGE
    of_request = torch.arange(batch + 1, dtype=torch.int32, device=device) * pages
    page = torch.arange(batch * pages, dtype=torch.int32, device=device)
    filled = torch.full((batch,), PAGE, dtype=torch.int32, device=device)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": dtype}
    wrapper.plan(of_request, page, filled, heads[0], heads[1], head_dim, PAGE, **types)
    return wrapper


def flashinfer(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """FlashInfer over the same tokens in pages of ``dtype``. Raises as ``planned_flashinfer`` does."""
    batch, heads, tokens, head_dim = key.shape
    wrapper = planned_flashinfer(batch, (query.shape[1], heads), tokens, head_dim, dtype, key.device)
    paged = tuple(
        x.view(batch, heads, -1, PAGE, head_dim).transpose(1, 2).reshape(-1, heads, PAGE, head_dim).to(dtype)
        for x in (key, value)
    )
    rows = query[:, :, 0].contiguous()
    return lambda: wrapper.run(rows, paged)


def measure(query: Tensor, key: Tensor, value: Tensor, flex: bool = False) -> dict[str, float]:
    """Milliseconds of each way that works, all but FlashInfer's in a CUDA graph.

    flex: FlexAttention too, which takes seconds to compile.
    """
    found = measured(sdpa_attentions() | ({"flex": flex_attention()} if flex else {}), query, key, value)
    paged = _time_flashinfer("flashinfer", query, key, value, key.dtype)
    return found | ({"flashinfer": paged} if paged is not None else {})


def measured(ways: dict[str, Attention], query: Tensor, key: Tensor, value: Tensor) -> dict[str, float]:
    """Milliseconds, in a CUDA graph, of those of ``ways`` that work. Raises RuntimeError where none does."""
    times = {
        name: _time(name, lambda attention=attention: graphed(lambda: attention(query, key, value)))
        for name, attention in ways.items()
    }
    found = {name: time for name, time in times.items() if time is not None}
    if not found:
        raise RuntimeError("no dense attention runs here")
    return found


def measure_fp8(query: Tensor, key: Tensor, value: Tensor) -> float | None:
    """Milliseconds of attention over a dense cache in fp8 (e4m3); None where nothing has it."""
    return _time_flashinfer("flashinfer, fp8", query, key, value, torch.float8_e4m3fn)


def _time_flashinfer(name: str, query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> float | None:
    whole_pages = ON_GPU and key.shape[2] % PAGE == 0
    return _time(name, lambda: flashinfer(query, key, value, dtype)) if whole_pages else None


def _time(name: str, make: Callable[[], Callable[[], Tensor]]) -> float | None:
    """Milliseconds of what ``make`` returns. Not every way takes every shape and dtype; each reason is printed once."""
    try:
        return median_ms(make())
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        reason = f"dense attention by {name} is left out: {type(error).__name__}: {first_line}"
        if reason not in _reported:
            print(reason, flush=True)
        _reported.add(reason)
        return None
