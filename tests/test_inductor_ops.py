"""The ops as Inductor compiles them: the results of the eager ops, and code that holds no dense copy of a cache."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from compilers import allocations
from mustafar_compile.lowering import ops
from mustafar_compile.lowering.buffers import blocks_for
from mustafar_compile.lowering.format import BLOCK_TOKENS, Format
from nightly import at_night

BATCH, HEADS, WINDOW, CAPACITY, STEPS = 1, 2, 8, 520, 3  # a block leaves the window


@pytest.fixture(autouse=True)
def _compile_what_is_there():
    """AOTAutograd's cache is keyed on the names of ops: it would bring back what they were before a change."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@dataclass
class Config:
    """What the generated code depends on."""

    dtype: torch.dtype
    group: int
    dims: tuple[int, int]  # of keys and values
    kept: tuple[int, int]
    static: bool
    mask: str | None = None
    value_strategy: str = "magnitude"

    def format(self, role: int) -> Format:
        strategy = self.value_strategy if role else "magnitude"
        return Format.interned(self.dims[role], self.kept[role], WINDOW, strategy=strategy)

    def text(self, role: int) -> str:
        return self.format(role).encode()

    def buffers(self, role: int, capacity: int, tokens: int) -> list[torch.Tensor]:
        dense = torch.randn(BATCH, HEADS, tokens, self.dims[role], dtype=self.dtype)
        buffers = list(ops.compress(dense, torch.tensor([tokens]), self.text(role), capacity))
        if not self.static:
            torch._dynamo.mark_dynamic(buffers[0], 2)
            torch._dynamo.mark_dynamic(buffers[1], 2)
        return buffers

    def token(self) -> list[torch.Tensor]:
        key, value = (torch.randn(BATCH, HEADS, 1, dim, dtype=self.dtype) for dim in self.dims)
        return [torch.randn(BATCH, HEADS * self.group, 1, self.dims[0], dtype=self.dtype), key, value]

    def mask_for(self, length: int) -> torch.Tensor | None:
        if self.mask == "bool":
            return torch.rand(BATCH, 1, 1, length) < 0.8
        return torch.randn(BATCH, HEADS * self.group, 1, length) if self.mask == "bias" else None


CONFIGS = {
    "float32, growing": Config(torch.float32, 2, (64, 64), (32, 32), static=False),
    "bfloat16, static, masked": Config(torch.bfloat16, 4, (128, 128), (40, 64), static=True, mask="bool"),
    "float16, growing, biased": Config(torch.float16, 1, (64, 32), (24, 16), static=False, mask="bias"),
    "bfloat16, growing, no whole words": Config(torch.bfloat16, 2, (80, 40), (40, 24), static=False),
    "bfloat16, static, values by channel": Config(
        torch.bfloat16, 4, (128, 128), (64, 16), static=True, mask="bool", value_strategy="channel-output-aware"
    ),
}


def clone(buffers):
    """Copies with the marks of the originals, which clone() drops."""
    copies = [buffer.clone() for buffer in buffers]
    for copy, buffer in zip(copies, buffers, strict=True):
        for dim in getattr(buffer, "_dynamo_dynamic_indices", ()):
            torch._dynamo.mark_dynamic(copy, dim)
    return copies


def decode(query, key, value, keys, values, formats, position, mask):
    return ops.decode_attention(query, key, value, keys, values, *formats, position, mask, None, 0.1)


@pytest.mark.parametrize("config", at_night(CONFIGS.values()), ids=CONFIGS)
def test_compiled_steps_equal_eager_ones_without_a_dense_copy(config):
    torch.manual_seed(0)
    formats = config.text(0), config.text(1)
    compiled, code = torch.compile(decode, fullgraph=True), ""
    for capacity in [CAPACITY] if config.static else [CAPACITY, 2 * CAPACITY]:
        tokens = capacity - 2
        eager = [config.buffers(role, capacity, tokens) for role in (0, 1)]
        mine = [clone(buffers) for buffers in eager]
        pointers = [buffer.data_ptr() for buffer in (*mine[0], *mine[1])]
        for n in range(STEPS):
            position = torch.tensor([tokens + n]) if config.static else None
            arguments, rest = config.token(), (formats, position, config.mask_for(2 * CAPACITY + STEPS))
            if code:
                out = compiled(*arguments, *mine, *rest)
            else:
                counters.clear()
                out, (code,) = run_and_get_code(compiled, *arguments, *mine, *rest)
            # Both sum in float32, in their own order, and round once.
            expected = decode(*arguments, *eager, *rest)
            torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(config.dtype).eps, atol=1e-6)
            for actual, wanted in zip((*mine[0], *mine[1]), (*eager[0], *eager[1]), strict=True):
                weights = actual.dtype == torch.float32 != config.dtype  # sums as well
                assert torch.allclose(actual, wanted, atol=1e-6) if weights else torch.equal(actual, wanted)
        assert [buffer.data_ptr() for buffer in (*mine[0], *mine[1])] == pointers
    assert counters["stats"]["unique_graphs"] == 1, "compiled again for another capacity"

    check_allocations(config, code)
    extern = set(re.findall(r"torch\.ops\.(aten\.\w+)", code))
    assert extern <= {"aten.cumsum", "aten.topk"}, f"{extern} may copy a cache"


def check_allocations(config, code):
    blocks = blocks_for(CAPACITY)
    sizes, slots = allocations(code, blocks), BLOCK_TOKENS * blocks
    assert max(sizes) >= 4 * BATCH * HEADS * slots, "no scores, one to a slot: is the pattern still right?"
    stored = [config.kept[role] * config.dims[role] // config.format(role).row_size for role in (0, 1)]
    packed = BATCH * HEADS * slots * min(stored) * config.dtype.itemsize
    assert max(sizes) < packed, f"a buffer of {max(sizes)} bytes; the packed values have {packed}"


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["bfloat16, static, masked", "bfloat16, static, values by channel"])
def test_a_gpus_limits_of_fusion_leave_no_dense_copy_either(name):
    """Inductor stores what takes more operations than a limit, which is lower for a GPU than for a CPU."""
    config = CONFIGS[name]
    buffers = [config.buffers(role, CAPACITY, CAPACITY - 2) for role in (0, 1)]
    rest = (config.text(0), config.text(1)), torch.tensor([CAPACITY - 2]), config.mask_for(CAPACITY)
    limits = {"realize_opcount_threshold": 30, "realize_acc_reads_threshold": 8}
    with torch._inductor.config.patch(limits):
        _, (code,) = run_and_get_code(torch.compile(decode, fullgraph=True), *config.token(), *buffers, *rest)
    check_allocations(config, code)


@pytest.mark.nightly
def test_compiled_compression_equals_the_eager():
    torch.manual_seed(0)
    dense, tokens = torch.randn(2, 2, 50, 24, dtype=torch.bfloat16), torch.tensor([40])
    dense[0, 0, 3, :7] = float("nan")
    dense[0, 1, 5] = 0
    text = Format.interned(24, 8, 4).encode()

    def both(dense, tokens):
        buffers = ops.compress(dense, tokens, text, 70)
        return *buffers, ops.decompress(buffers, text, 60)

    for actual, expected in zip(torch.compile(both, fullgraph=True)(dense, tokens), both(dense, tokens), strict=True):
        assert torch.equal(actual.nan_to_num(7), expected.nan_to_num(7))
    assert expected.shape == (2, 2, 60, 24)


@pytest.mark.nightly
def test_compiled_steps_set_the_extreme_flag():
    config = Config(torch.bfloat16, 1, (32, 32), (16, 16), static=True)
    compiled = torch.compile(decode, fullgraph=True)
    keys, values = (config.buffers(role, 64, 20) for role in (0, 1))
    for value, flag in ((1.0, 0), (2.0**97 * (1 - 2**-8), 0), (-(2.0**97), 1), (1.0, 1)):
        query, key, row = config.token()
        key[0, 1, 0, 31] = value
        compiled(query, key, row, keys, values, (config.text(0), config.text(1)), None, None)
        assert (keys[3][0, 2].item(), values[3][0, 2].item()) == (flag, 0)
