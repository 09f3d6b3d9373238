"""The kernels: the plain ones in Triton's interpreter; on a GPU both variants, against oracle and ``portable``."""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Copies, every_level

from cases import (
    BORDERS,
    INF,
    LAYOUTS,
    NAN,
    REWINDING,
    Cache,
    assert_close,
    assert_same_bits,
    assert_same_cache,
    assert_same_rows,
    attention,
    check_steps,
    compressed,
    counts_of,
    decompressed,
    hard_rows,
    make_case,
    make_mask,
    make_sinks,
    moves,
    partly_written,
    randn,
    row_holding,
    rows,
    seeds,
    sparsity_for,
    step_of,
    strided,
    weights_of,
    with_length,
)
from guarded import check_compress, check_decompress, check_step
from mustafar_compile.lowering import backends, native, ops, portable
from mustafar_compile.lowering.format import CODES, Format
from mustafar_compile.lowering.strategies.output_aware import OutputAware
from nightly import mostly_at_night
from pairwise import pairwise
from ragged import POSITIONS, check_ragged, check_ragged_cache
from reference import pruned_cache

pytest.importorskip("triton")
from mustafar_compile.lowering import kernels, weighing
from mustafar_compile.lowering.step import Step, Tuned

HALVES = (torch.bfloat16, torch.float16)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# Names of tests in ``interpreted_kernels.py``: each part takes those with its words and without those before it.
PARTS = ("equals_the_oracle or sink", "one_by_one or rewinds or rows or compress", "")


def interpret(*chosen):
    """Whether Triton interprets is decided when it is imported, so not in this process but in one of its own."""
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", file]
    how = {"env": os.environ | {"TRITON_INTERPRET": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([*command, *chosen], text=True, check=False, **how)
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("part", range(len(PARTS)), ids=lambda part: PARTS[part] or "the rest")
def test_the_plain_kernels_in_the_interpreter(part):
    chosen = [f"({PARTS[part]})"] if PARTS[part] else []
    interpret("-k", " and ".join([*chosen, *(f"not ({earlier})" for earlier in PARTS[:part])]))


@pytest.mark.nightly
def test_more_of_the_plain_kernels_in_the_interpreter():
    interpret("-m", "nightly")


# -------------------------------------------------------------------------------------------------- which kernel runs


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 20])
def test_the_tuned_kernel_serves_the_usual_shapes(head_dim, group, dtype):
    sparsest, densest = 8, head_dim // 2
    for kept in (sparsest, densest):
        for mask in ("none", "boolean", "additive"):
            tuned = step_of(head_dim, kept=kept, group=group, dtype=dtype, mask=mask).tuned()
            assert tuned is not None
            assert tuned.chunks * tuned.decode.heads >= group
            assert tuned.decode.shared_bytes <= 48 * 1024


@pytest.mark.parametrize(
    "how",
    [
        {"dtype": "fp32"},
        {"key_dim": 80},
        {"key_dim": 24},
        {"key_dim": 128, "value_dim": 80},
        {"key_dim": 80, "value_dim": 128},
        {"key_dim": 256, "kept": 256},  # more shared memory than there is
        {"key_dim": 256, "kept": 8, "value_kept": 256},
    ],
)
def test_the_tuned_kernel_serves_nothing_else(how):
    assert step_of(**how).tuned() is None


def test_fewer_warps_where_shared_memory_is_short():
    few, many = step_of(kept=120).tuned(), step_of(kept=64).tuned()
    assert (few.warps, many.warps) == (2, 4)


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("ptx", [True, False])
def test_which_caches_and_steps_have_kernels(ptx, monkeypatch):
    monkeypatch.setattr(backends, "runs_ptx", lambda device: ptx)
    forms = {d: Format.of(d, 0.5, 32) for d in (64, 80, 128, 256, 264)}
    for dtype in (torch.float32, *HALVES):
        for key, value in itertools.product((64, 80, 128, 256), repeat=2):
            served = ptx and dtype in HALVES and 80 not in (key, value)
            work = backends.Work(forms[key], forms[value], dtype, CUDA, group=4)
            assert backends.for_step(work) is (backends.TUNED if served else backends.PLAIN)
            assert backends.for_cache(forms[key], dtype, CUDA) is not backends.PORTABLE
    for codes in itertools.product(CODES, repeat=2):
        coded = [Format.of(80, sparsity, 32, code=code) for sparsity, code in zip((0.0, 0.5), codes, strict=True)]
        assert backends.for_step(backends.Work(*coded, torch.float32, CUDA, group=4)) is backends.PLAIN
        assert all(backends.for_cache(form, torch.float32, CUDA) is not backends.PORTABLE for form in coded)
    for form, dtype, device in [
        (forms[64], torch.float64, CUDA), (forms[64], torch.float32, CPU), (forms[264], torch.float16, CUDA),
    ]:  # fmt: skip
        assert backends.for_cache(form, dtype, device) is backends.PORTABLE
        for pair in ((form, forms[64]), (forms[64], form)):
            assert backends.for_step(backends.Work(*pair, dtype, device, group=4)) is backends.PORTABLE
    other_window = backends.Work(forms[64], Format.of(64, 0.5, 31), torch.float16, CUDA, group=4)
    assert backends.for_step(other_window) is backends.PORTABLE


def test_the_ops_leave_caches_that_differ_to_pytorch(monkeypatch):
    """Kernels take K and V, and a query, of one dtype, and as many heads of V as of K."""

    def kernel(*given):
        raise NotImplementedError("the kernel was called")

    monkeypatch.setattr(backends, "for_step", lambda work: backends.NATIVE)
    monkeypatch.setattr(native, "decode_attention", kernel)
    case = make_case()
    with pytest.raises(NotImplementedError, match="the kernel was called"):
        case.step()
    half, one = (make_case(dtype=torch.float16), make_case(heads=1, group=4))
    new = case.query, case.keys[:, :, -1:]
    for values in (half, one):
        value = values.values[:, :, -1:]
        out = attention(*new, value, case.past("key"), values.past("value"), scale=0.2)
        assert out.shape == case.query.shape
    attention(half.query, new[1], case.values[:, :, -1:], case.past("key"), case.past("value"), scale=0.2)


ROLES = "query", "key", "value"


class Launch:
    """In place of a kernel's module: notes the grid, the arguments by name and the options of each launch."""

    def __init__(self, module, launches):
        self.module, self.launches = module, launches

    def __getattr__(self, name):
        names = getattr(self.module, name).arg_names

        class Kernel:
            def __getitem__(_, grid):
                def launch(**given):
                    how = {n: given.pop(n) for n in [*given] if n not in names}
                    assert sorted(given) == sorted(names)
                    self.launches.append((name, grid, given, how))

                return launch

        return Kernel()


@pytest.fixture
def launches(monkeypatch):
    """What a step launches and copies, by the kernels of a GPU, which need none to be rendered."""
    noted = []
    monkeypatch.setattr(kernels, "runs_ptx", lambda device: True)
    monkeypatch.setattr(kernels, "_is_hopper", lambda device: True)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 132)
    for cls, name in ((Step, "append"), (Step, "portable"), (Step, "combine"), (Tuned, "kernel")):
        make = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *given, make=make: Launch(make(*given), noted))
    return noted


@pytest.mark.parametrize(
    ("group", "head_dim", "registers"),  # 80 channels have no tuned kernel
    [(4, 128, 168), (8, 128, 128), (20, 64, 128), (3, 80, None)],
)
@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 1, 400, dtype=torch.bool), torch.zeros(400)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("length", "checked"), [(None, True), (400, True), (400, False)])
def test_launches_fit_the_kernels(group, head_dim, registers, mask, with_sinks, length, checked, launches):
    cache = compressed(torch.randn(2, 4, 300, head_dim).bfloat16(), 300, 24, 32, 400, by=portable)
    query, row = (torch.zeros(2, heads, 1, 2 * head_dim).bfloat16()[..., ::2] for heads in (4 * group, 4))
    sinks = make_sinks(8 * group, 0)[::2] if with_sinks else None
    how = {"length": length, "checked": checked, "decode": kernels.decode_attention}
    with Copies(launches):
        out = attention(query, row, row, cache, cache, torch.tensor([300]), mask, sinks, 0.1, **how)
    assert out.shape == query.shape
    # A kernel that starts early waits for the one right ahead of it: a copy between two would be read half done.
    assert [name for name, *_ in launches[-3:]] == ["attend", "append", "combine"]
    assert len(launches) == 6 + with_sinks, "query, key, value and sinks are copied, as no rows lie side by side"
    launches = launches[-3:]
    assert all(x.is_contiguous() for x in (launches[0][2]["query"], launches[1][2]["key"], launches[1][2]["value"]))
    (_, grid, attend, how), (_, appending, append, early), (_, _, combine, late) = launches
    assert (sinks is None and combine["sinks"] is None) or torch.equal(combine["sinks"], sinks)
    assert sinks is None or combine["sinks"].is_contiguous()
    assert how.get("maxnreg") == registers
    assert early.get("launch_pdl", False) == late.get("launch_pdl", False) == (registers is not None)
    assert late.get("maxnreg") == (registers and 128)
    splits, parts = attend["splits"], combine["parts"]
    assert grid == (8 * (1 if registers is None else -(-group // 8)), splits)
    assert append["splits"] == splits
    assert append["length"] == (length or 13 * 32 + 32), "the slots of 13 blocks, and the window"
    checks_mask = checked and mask is not None and length is not None
    assert appending == (8, 1 + 4 + checks_mask), "of a static cache one more looks at the mask"
    assert parts == splits + 1 + 4, (
        "a part for each split, one for the leaving token, one for eight slots of the window"
    )
    assert attend["sums"].shape == (8, parts, group, head_dim)
    given = attend["mask"]
    strides = (attend["mask_batch"], attend["mask_head"], attend["mask_token"])
    assert (given is None) == (mask is None)
    assert given is None or (given.dtype != torch.bool and strides == given.stride()[:2] + given.stride()[3:])


@pytest.mark.parametrize(
    ("how", "head_dim", "copied"),
    [
        ("joined", 128, []),
        ("at odd places", 128, ["query"]),
        ("at odd places", 80, []),
        ("channels strided", 80, ROLES),
    ],
)
def test_rows_are_read_where_they_lie(how, head_dim, copied, launches):
    """As parts of what one product gives. The tuned kernel reads the query in words, of two channels."""
    shapes = zip(ROLES, (8, 4, 4), strict=True)
    given = {role: strided(torch.zeros(2, heads, 2, head_dim).bfloat16(), how) for role, heads in shapes}
    past = compressed(torch.zeros(2, 4, 300, head_dim).bfloat16(), 300, 24, 32, 400, by=portable)
    with Copies(launches):
        attention(*given.values(), past, past, torch.tensor([300]), decode=kernels.decode_attention)
    *copies, (_, _, attend, _), (_, _, append, _), _ = launches
    assert len(copies) == len(copied)
    for role, x in given.items():
        arguments = attend if role == "query" else append
        read = arguments[role]
        assert (read.data_ptr() != x.data_ptr()) == (role in copied)
        assert [arguments[f"{role}_{dim}"] for dim in ("batch", "head", "token")] == [*read.stride()[:3]]


def test_no_split_is_empty_and_waves_are_few():
    every = itertools.product((1, 3, 64, 1000), (1, 5, 4096), (1, 132), (2, 4), (1, 4))
    for rows_, blocks, multiprocessors, resident, a_round in every:
        splits = kernels._splits(rows_, blocks, multiprocessors, resident, a_round)
        assert 1 <= splits <= math.ceil(blocks / a_round)
        assert splits == 1 or splits * rows_ <= 4 * multiprocessors * resident


@pytest.mark.parametrize(
    ("rows_", "blocks", "splits"),
    [
        *[(8, 1024, 49), (32, 256, 12), (64, 512, 6), (128, 256, 3), (384, 256, 1), (768, 256, 1)],  # whole waves
        *[(256, 256, 3), (320, 128, 2), (512, 128, 3)],  # one split would leave multiprocessors idle
    ],
)
def test_splits_are_those_that_were_measured_to_be_fastest(rows_, blocks, splits):
    """On an H200, of 3 programs to a multiprocessor."""
    assert kernels._splits(rows_, blocks, 132, 3, 4) == splits


@pytest.mark.parametrize(
    ("head_dim", "parts", "channels"), [(128, 8, 128), (128, 9, 64), (80, 17, 32), (64, 71, 8), (32, 7, 32)]
)
def test_programs_share_the_channels_where_there_are_many_parts(head_dim, parts, channels):
    assert step_of(head_dim).channels_at_once(parts) == channels


# ------------------------------------------------------------------------------------------------------- on the GPU


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for; the rest varies from example to example."""

    dtype: torch.dtype
    dims: tuple[int, int]  # of K and V
    kept: tuple[int, int]
    group: int
    window: int
    mask: str | None = None
    position: bool = False
    softcap: float = 0.0
    sinks: bool = False
    queries: int = 1
    codes: tuple[str, str] = ("none", "none")

    def __str__(self):
        how = [
            "-".join(self.codes) * (self.codes != ("none", "none")),
            f"q{self.queries}" * (self.queries > 1),
            self.mask or "",
            "at" * self.position,
            "cap" * bool(self.softcap),
            "sinks" * self.sinks,
        ]
        sizes = "-".join(f"{k}of{d}" for k, d in zip(self.kept, self.dims, strict=True))
        return "-".join([str(self.dtype)[6:], sizes, f"g{self.group}", f"w{self.window}", *filter(None, how)])

    def case(self, batch, heads, tokens, seed, **how):
        key_sparsity, value_sparsity = (sparsity_for(d, k) for d, k in zip(self.dims, self.kept, strict=True))
        how = {"window": self.window, "softcap": self.softcap, "queries": self.queries} | how
        how["sinks"] = make_sinks(heads * self.group, seed, self.dtype) if self.sinks else None
        how |= {"key_sparsity": key_sparsity, "value_sparsity": value_sparsity}
        how |= {"key_code": self.codes[0], "value_code": self.codes[1]}
        return make_case(batch, heads, self.group, *self.dims, tokens, seed, self.dtype, **how)

    def position_of(self, case):
        return torch.tensor([case.written], device="cuda") if self.position else None


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Kernels of a shape take seconds to compile, so only the first are for every day.
SHAPES = [
    Shape(BF16, (128, 128), (64, 64), 4, 32),
    Shape(BF16, (128, 128), (40, 40), 4, 32, "bool", position=True),
    Shape(BF16, (128, 128), (64, 40), 8, 7, "bias"),
    Shape(BF16, (64, 64), (32, 32), 7, 40, "lowest"),
    Shape(FP16, (64, 128), (24, 72), 3, 33, "bool", softcap=20.0),
    Shape(BF16, (256, 256), (128, 128), 2, 32, "bool", sinks=True),
    Shape(BF16, (128, 128), (64, 40), 4, 32, queries=5, position=True),
    Shape(BF16, (64, 64), (32, 24), 8, 3, "bias", queries=16, sinks=True),
    Shape(BF16, (80, 80), (40, 24), 5, 32, "bool", queries=16, sinks=True),
    Shape(FP32, (128, 128), (64, 64), 4, 32, "bias", sinks=True),
    Shape(BF16, (128, 128), (128, 64), 4, 32, codes=("int8", "int4")),
    Shape(FP16, (128, 64), (64, 24), 2, 7, "bias", queries=4, codes=("int4", "int8")),
    Shape(BF16, (128, 128), (64, 64), 8, 32, softcap=20.0, codes=("none", "int8")),
    Shape(FP32, (64, 80), (64, 40), 4, 7, position=True, codes=("int8", "int4")),
    Shape(FP16, (128, 128), (64, 64), 1, 1, "-inf"),
    Shape(FP16, (64, 64), (8, 64), 2, 100, position=True),
    Shape(BF16, (64, 64), (32, 32), 8, 32, "bias", sinks=True),
    Shape(BF16, (96, 96), (48, 48), 4, 32, softcap=5.0),
    Shape(FP16, (256, 128), (8, 16), 16, 64),
    Shape(BF16, (128, 128), (128, 128), 16, 32, "bias", position=True),
    Shape(BF16, (32, 32), (16, 8), 1, 5),
    Shape(FP16, (128, 128), (40, 64), 1, 32, "bool", queries=4),
    Shape(BF16, (128, 128), (64, 64), 2, 100, queries=2, softcap=20.0, sinks=True),
    Shape(BF16, (80, 80), (40, 24), 4, 32, "bool"),
    Shape(FP16, (24, 24), (8, 16), 3, 7),
    Shape(FP32, (64, 80), (32, 40), 16, 7, position=True),
    Shape(FP32, (128, 128), (64, 64), 4, 7, queries=5, position=True),
    Shape(BF16, (128, 128), (40, 128), 4, 32, "bool", position=True, codes=("int4", "int4")),
    Shape(BF16, (80, 80), (40, 24), 5, 32, "-inf", sinks=True, queries=16, codes=("int8", "int4")),
    Shape(FP16, (24, 24), (8, 24), 3, 7, codes=("int4", "int4")),
]
TUNED = [s for s in SHAPES if s.dtype != FP32 and all(d % 32 == 0 for d in s.dims)]
EVERY_DAY = 14
WITH_VARIANTS = [(s, v) for s in SHAPES for v in ("tuned", "portable") if v == "portable" or s in TUNED]
variants = pytest.mark.parametrize(
    ("shape", "variant"),
    mostly_at_night(WITH_VARIANTS, sum(shape in SHAPES[:EVERY_DAY] for shape, _ in WITH_VARIANTS)),
    ids=[f"{s}-{v}" for s, v in WITH_VARIANTS],
)
tuned_and_portable = pytest.mark.parametrize("variant", ["tuned", "portable"])
some = settings(max_examples=max(25, settings.default.max_examples), deadline=None)

lengths = st.one_of(
    st.integers(1, 40), st.integers(1, 700), st.sampled_from([1, 2, 32, 33, 34, 64, 65, 66, 128, 129, 1025, 2500])
)


def decode(variant):
    return functools.partial(kernels.decode_attention, variant=variant)


def pasts(case):
    """The caches of K and V before the step, made on the CPU."""
    return [case.past(role).to("cuda") for role in ("key", "value")]


def copies(caches):
    return [cache.clone() for cache in caches]


def stepped(case, variant, position=None, caches=None):
    """The result of a step of ``case`` (on the CPU) on the GPU; the caches must become what ``portable`` makes."""
    ours = caches or pasts(case)
    theirs = [cache.to("cpu") for cache in ours]
    out = case.to("cuda").step(*ours, position, decode=decode(variant))
    at = position if position is None else position.cpu()
    for x, cache in zip((case.keys, case.values), theirs, strict=True):
        portable.append(x[:, :, case.written :], cache, cache.format, at)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_cache(mine, other)
    return out


def check(out, case):
    """``out`` is what the oracle says. It reckons on the GPU too, for speed."""
    assert_close(out, case.to("cuda"), rounds_weights=True)


@needs_gpu
@variants
@some
@given(data=st.data())
def test_a_step_equals_the_oracle(shape, variant, data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    tokens = data.draw(lengths) + shape.queries - 1
    scale = data.draw(st.sampled_from([None, 0.3, -0.1]))
    case = shape.case(batch, heads, tokens, data.draw(seeds), spare=data.draw(st.sampled_from([0, 1, 40, 5000])))
    case.scale = scale
    if shape.mask:
        query_heads, queries = heads * shape.group, shape.queries
        leading = data.draw(
            st.sampled_from([(), (1, 1, queries), (batch, 1, 1), (1, query_heads, 1), (batch, query_heads, queries)])
        )
        length = data.draw(st.sampled_from([tokens, tokens + 3, 1]))
        density = data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
        case.mask = make_mask(shape.mask, (*leading, length), data.draw(seeds), density)
        if shape.mask == "lowest":  # of the cache's dtype, as transformers makes it
            case.mask = case.mask.clamp(min=torch.finfo(shape.dtype).min).to(shape.dtype)
    caches = pasts(case)
    again = copies(caches)
    out = stepped(case, variant, shape.position_of(case), caches)
    check(out, case)
    assert_same_bits(case.to("cuda").step(*again, shape.position_of(case), decode=decode(variant)), out)
    for mine, other in zip(again, caches, strict=True):
        assert_same_cache(mine, other)


@needs_gpu
@variants
def test_many_tokens(shape, variant):
    """Several rounds of every split, and a batch that leaves one split a row."""
    for batch, tokens in ((1, 20_011), (64 // shape.group, 1500)):
        case = shape.case(batch, 4, tokens, seed=batch)
        if shape.mask:
            case.mask = make_mask(shape.mask, (batch, 1, 1, tokens), 1)
        check(stepped(case, variant, shape.position_of(case)), case)


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize("dtype", HALVES)
def test_every_token_is_read_exactly(variant, dtype):
    """A mask that allows one token to each head: its pruned row comes out, to the last bit, whatever the bits are."""
    head_dim, tokens, window, kv_heads, group = 128, 540, 32, 2, 8
    case = make_case(1, kv_heads, group, head_dim, head_dim, tokens, 3, dtype, window=window)
    patterns = torch.randperm(2**16, generator=torch.Generator().manual_seed(0)).to(torch.int32).to(torch.int16)
    patterns = patterns.view(dtype)
    tame = patterns[(patterns.float().abs() < 2.0**97) & ~patterns.isnan()]
    assert len(tame) > 2**15 * 1.2
    case.values = tame.repeat(3)[: case.values.numel()].view(case.values.shape).clone()
    rows_ = pruned_cache(case.values, 0.5, window)
    caches, query_heads = pasts(case), kv_heads * group
    assert not caches[1].counts[:, 2].any()
    at = torch.tensor([tokens - 1], device="cuda")
    moved = case.to("cuda")
    for first in range(0, tokens, group):
        allowed = [min(first + h % group, tokens - 1) for h in range(query_heads)]
        moved.mask = torch.zeros(1, query_heads, 1, tokens, dtype=torch.bool, device="cuda")
        moved.mask[0, range(query_heads), 0, allowed] = True
        out = moved.step(*caches, at, decode=decode(variant)).cpu()
        expected = torch.stack([rows_[0, h // group, t] for h, t in enumerate(allowed)])[None, :, None]
        # What float32 may lose of such numbers, the plain kernel with weights of 2^-24.
        below = 0 if dtype == torch.float16 else 2.0**-125 if variant == "tuned" else 2.0**-100
        torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=below)
        large = expected.float().abs() > below
        assert torch.equal(out[large], expected[large])


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize("dtype", [*HALVES, FP32])
def test_masks_that_leave_whole_splits_out(variant, dtype):
    case = make_case(2, 2, 4, 128, 128, 3000, 1, dtype, window=32)
    case.mask = torch.zeros(2, 8, 1, 3000, dtype=torch.bool)
    for head, allowed in enumerate([[0], [2999], [1500, 1501], [31, 32, 2967], [], range(2968), range(2968, 3000)]):
        case.mask[:, head, 0, list(allowed)] = True
    case.mask[1, 7, 0, ::37] = True
    out = stepped(case, variant)
    assert out[:, 4].count_nonzero() == 0
    assert out[0, 7].count_nonzero() == 0
    check(out, case)
    case.mask = torch.zeros(3000).masked_fill(~case.mask, -INF)
    check(stepped(case, variant), case)
    case.mask = torch.full((2, 1, 1, 3000), torch.finfo(dtype).min, dtype=dtype)  # nothing is left: all alike
    check(stepped(case, variant), case)


@needs_gpu
@tuned_and_portable
def test_scores_that_grow_and_fall_along_the_cache(variant):
    """The running maximum rises in every block, in one only, or never again."""
    for direction in (1, -1, 0):
        case = make_case(1, 2, 4, 64, 64, 4000, 2, BF16, key_sparsity=0.0, window=32, scale=1.0)
        slope = torch.linspace(-4, 4, 4000) * direction if direction else torch.zeros(4000)
        slope[1234] += 8 * (direction == 0)
        case.query = torch.ones_like(case.query)
        case.keys = (slope[None, None, :, None] + randn(1, 2, 4000, 64, seed=3) / 16).to(BF16)
        check(stepped(case, variant), case)


@needs_gpu
@variants
def test_static_caches_of_any_capacity(shape, variant):
    for more in (1, 2, shape.window, shape.window + 1, shape.window + 2, 70):
        tokens = more + shape.queries - 1
        for spare in (0, 20_000):
            case = shape.case(2, 2, tokens, seed=tokens, spare=spare)
            if shape.mask:
                case.mask = make_mask(shape.mask, (tokens,), 2, density=0.8)
            check(stepped(case, variant, shape.position_of(case)), case)


@needs_gpu
@tuned_and_portable
def test_caches_of_different_capacity(variant):
    case = make_case(2, 2, 4, 64, 64, 300, 5, BF16, window=8)
    larger = make_case(2, 2, 4, 64, 64, 300, 5, BF16, window=8, spare=700)
    for key, value in ((case, larger), (larger, case)):
        caches = [key.past("key").to("cuda"), value.past("value").to("cuda")]
        check(stepped(case, variant, caches=caches), case)


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize("dtype", [*HALVES, FP32])
@pytest.mark.parametrize("how", LAYOUTS[1:-1])
def test_inputs_of_any_strides(how, dtype, variant):
    case = make_case(2, 3, 4, 64, 128, 200, 6, dtype, window=32)
    case.mask = make_mask("bias", (2, 12, 1, 200), 1)
    clean = stepped(case, variant)
    moved = case.to("cuda")
    moved.query, moved.keys, moved.values = (strided(x, how) for x in (moved.query, moved.keys, moved.values))
    moved.mask = strided(moved.mask, how)
    assert_same_bits(moved.step(*pasts(case), decode=decode(variant)), clean)
    check(clean, case)


# Values that are not ordinary

EXTREME = [NAN, INF, -INF, 3e38, -3e38, 2.0**96, -(2.0**96), 2.0**98], ["keys", "values"], [*HALVES, FP32]
SPOILT = list(dict.fromkeys([*pairwise(*EXTREME, CODES), *itertools.product(*EXTREME, ["none"])]))


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize(("value", "role", "dtype", "code"), mostly_at_night(SPOILT, len(pairwise(*EXTREME, CODES))))
def test_extreme_values_count_as_in_the_oracle(value, role, dtype, code, variant):
    if dtype == torch.float16 and math.isfinite(value):
        value = math.copysign(65504.0, value)
    for head_dim, token in itertools.product((64, 128), (0, 77, 280, 299)):  # compressed, in the window, the new one
        how = {"window": 32, "key_code": code, "value_code": code}
        case = make_case(2, 2, 4, head_dim, head_dim, 300, 7, dtype, **how)
        case.query = case.query / 64  # no score overflows
        getattr(case, role)[1, 0, token, head_dim - 3] = value
        out = stepped(case, variant)
        check(out, case)
        assert not out[0].isnan().any()


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize("value", [2.0**96, 3e38])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_channel_of_huge_values(value, dtype, variant):
    """Their sum is no float32, their average is one."""
    case = make_case(1, 2, 4, 128, 128, 5000, 7, dtype, window=100)
    case.values[..., 3] = value
    case.values[..., 99] = -value
    check(stepped(case, variant), case)


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize("group", [1, 4, 8, 16, 20])
def test_extreme_values_with_any_group(group, variant):
    for mask in (None, "bool", "bias"):
        case = make_case(2, 2, group, 64, 64, 500, 8, BF16, window=70)
        case.mask = make_mask(mask, (2, 2 * group, 1, 500), 1) if mask else None
        case.sinks = make_sinks(2 * group, 2) if mask else None
        case.values[1, 1, 100, 7] = -3e38
        case.values[0, 0, 100, 7] = NAN
        check(stepped(case, variant), case)


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize("dtype", [*HALVES, FP32])
def test_a_bad_key_that_is_masked_out_does_no_harm(dtype, variant):
    case = make_case(2, 2, 4, 128, 128, 300, 9, dtype, window=32)
    case.mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    case.mask[0, ..., [2, 280]] = False
    clean = stepped(case, variant)
    check(clean, case)
    case.keys[0, :, [2, 280]] = NAN
    spoilt = stepped(case, variant)
    assert not spoilt.isnan().any()
    # The tuned kernel leaves the flagged cache to one that is exact, which rounds otherwise.
    case.keys[0, :, [2, 280]] = 0
    check(spoilt, case)


@needs_gpu
@pytest.mark.parametrize(("dtype", "value", "flag"), BORDERS)
def test_the_flag_of_extreme_values(dtype, value, flag):
    """Set by compressing where it is written, and by appending to the cache that gets it; it stays, with its row."""
    plain, row = (torch.nn.functional.pad(row_holding(v, dtype, "cuda"), (24, 0)) for v in (0, value))
    assert plain.shape[3] == 64
    for place, tokens, unaligned in itertools.product((0, 3, 69), (0, 3, 69, 70), (0, 1)):
        dense = torch.cat([row if i == place else plain for i in range(70)], dim=2)
        dense = torch.nn.functional.pad(dense, (unaligned, 0))[..., unaligned:]
        counts = compressed(dense, tokens, 8, 2, 70, by=kernels).counts
        assert counts.tolist() == counts_of(tokens, 2) + counts_of(tokens, 2, flag if place < tokens else 0)
    for role in (0, 1):
        caches = [compressed(plain, 1, 8, 2, 9, by=kernels) for _ in range(2)]
        new = [row if i == role else plain for i in range(2)]
        for n in (2, 3):
            attention(plain, *new, *caches, scale=0.1, decode=kernels.decode_attention)
            expected = [counts_of(n, 2) + counts_of(n, 2, flag if i == role else 0) for i in range(2)]
            assert [cache.counts.tolist() for cache in caches] == expected
            new = [plain, plain]


@needs_gpu
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_rows_that_leave_the_window_rank_by_weights(dtype, queries):
    case = make_case(head_dim=128, value_dim=64, tokens=40 + queries, queries=queries, dtype=dtype)
    ours, weights = pasts(case), [weights_of(2, 2, queries, x.shape[3], 1) for x in (case.keys, case.values)]
    theirs, ranked = (
        [cache.to("cpu") for cache in ours],
        dict(zip(("key_weights", "value_weights"), weights, strict=True)),
    )
    on_gpu = {role: w.cuda() for role, w in ranked.items()}
    case.to("cuda").step(*ours, decode=kernels.decode_attention, **on_gpu)
    for x, mine, other, w in zip((case.keys, case.values), ours, theirs, weights, strict=True):
        portable.append(x[:, :, case.written :], other, other.format, None, w)
        assert_same_cache(mine, other)


@needs_gpu
@pytest.mark.parametrize(("queries", "group", "head_dim"), [(1, 4, 128), (16, 7, 256), (3, 1, 80)])
@pytest.mark.parametrize("dtype", [*HALVES, FP32])
def test_what_queries_make_of_channels(dtype, queries, group, head_dim):
    ring, strategy = randn(6, 2, 48, head_dim, seed=1, dtype=dtype).abs(), OutputAware()
    query = randn(6, 2 * group, queries, head_dim, seed=2, dtype=dtype)
    position = torch.tensor([0, 7, 46, 1000, 31, 40])
    given = query, position, Format.of(head_dim, 0.5, 32)
    expected, ours = strategy.of_step(*given, [ring]), ring.cuda()
    strategy.remember(*given, [ring])
    assert_same_bits(weighing.weigh_queries(query.cuda(), position.cuda(), ours).cpu(), expected)
    assert_same_bits(ours.cpu(), ring)


# Steps in sequence


@needs_gpu
@variants
def test_tokens_one_by_one_give_the_same_cache_as_all_at_once(shape, variant):
    tokens, capacity = (shape.window + 75) // shape.queries * shape.queries, shape.window + 90
    case = shape.case(2, 2, tokens, seed=11)
    grown = [
        compressed(x[:, :, :1].cuda(), 0, kept, shape.window, capacity, by=kernels, code=code)
        for x, kept, code in zip((case.keys, case.values), shape.kept, shape.codes, strict=True)
    ]
    for n in range(shape.queries, tokens + 1, shape.queries):
        step = shape.case(2, 2, shape.queries, seed=0)
        step.query, step.keys, step.values = case.query, case.keys[:, :, :n], case.values[:, :, :n]
        if shape.mask:
            step.mask = make_mask(shape.mask, (2, 1, 1, n), n, density=0.9)
        out = step.to("cuda").step(*grown, shape.position_of(step), decode=decode(variant))
        check(out, step)
    for x, kept, code, cache in zip((case.keys, case.values), shape.kept, shape.codes, grown, strict=True):
        assert_same_cache(cache, compressed(x, tokens, kept, shape.window, capacity, by=portable, code=code))


@needs_gpu
@tuned_and_portable
@some
@given(moves, st.sampled_from([1, 3, 32]), seeds)
def test_writing_at_an_earlier_position_rewinds(variant, moves, window, seed):
    check_steps(moves, window, seed, decode(variant), start=60, head_dim=64, dtype=BF16, device="cuda")


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize(("moves", "window", "seed"), REWINDING)
def test_rewinding_within_the_ring_and_beyond(variant, moves, window, seed):
    check_steps(moves, window, seed, decode(variant), head_dim=64, dtype=BF16, device="cuda")


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize("given_position", [False, True])
def test_a_cuda_graph_replayed_equals_eager_steps(given_position, variant):
    start, steps = 90, 40  # over the border of a block
    case = make_case(2, 2, 4, 128, 128, start + steps, 12, BF16, window=32).to("cuda")
    tokens = torch.tensor([start], device="cuda")
    both = case.keys[:, :, :start], case.values[:, :, :start]
    eager = [compressed(x, start, 64, 32, start + steps, by=kernels) for x in both]
    replayed = copies(eager)
    position = tokens.clone() if given_position else None
    mask = make_mask("bool", (2, 1, 1, start + steps), 1).cuda()
    query, key, value = case.query.clone(), case.keys[:, :, :1].clone(), case.values[:, :, :1].clone()

    def step(caches):
        return attention(query, key, value, *caches, position, mask, scale=0.1, decode=decode(variant))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(copies(eager))  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(replayed)
    for n in range(start, start + steps):
        query.copy_(randn(*query.shape, seed=n))
        key.copy_(case.keys[:, :, n : n + 1])
        value.copy_(case.values[:, :, n : n + 1])
        if given_position:
            position.fill_(n)
        graph.replay()
        assert_same_bits(out, step(eager))
    for mine, other in zip(replayed, eager, strict=True):
        assert other.counts.tolist() == counts_of(start + steps, 32, batch=2)
        assert_same_cache(mine, other)


@needs_gpu
def test_the_ops_take_the_kernels():
    case = make_case(2, 2, 4, 128, 128, 300, 13, BF16, window=32)
    caches = pasts(case)
    again = copies(caches)
    out = case.to("cuda").step(*caches, decode=decode("tuned"))
    assert_same_bits(case.to("cuda").step(*again, decode=ops.decode_attention), out)
    arguments = case.keys.cuda(), 300, 64, 32, 300
    assert_same_cache(compressed(*arguments), compressed(*arguments, by=kernels))
    assert_same_bits(decompressed(again[0], 310), decompressed(caches[0], 310, by=kernels))


# Rows of the batch, and what lies beside the buffers


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("queries", [1, 3])
def test_rows_of_the_batch_stand_at_places_of_their_own(position, queries, variant):
    check_ragged(decode(variant), position, queries, BF16, "cuda", rtol=2e-2, atol=2e-2)


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["tuned", "portable"])
def test_rows_of_the_batch_hold_tokens_of_their_own(dtype):
    check_ragged_cache(kernels, dtype, "cuda")


@needs_gpu
@tuned_and_portable
@pytest.mark.parametrize(("queries", "group", "mask"), [(1, 4, None), (1, 8, "bool"), (3, 1, "bias")])
@pytest.mark.parametrize(
    ("codes", "kept"), [(("none", "none"), 8), (("int8", "int4"), 8), (("int4", "int8"), 8), (("int4", "int4"), 64)]
)
def test_a_step_keeps_to_its_buffers(queries, group, mask, codes, kept, variant):
    how = {"codes": codes, "kept": kept, "comparable": variant == "portable"}
    check_step(decode(variant), queries, group, mask, BF16, "cuda", **how)


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["tuned", "portable"])
@pytest.mark.parametrize("code", CODES)
def test_compressing_and_decompressing_keep_to_their_buffers(dtype, code):
    check_compress(kernels, dtype, "cuda", code=code)
    check_decompress(kernels, dtype, "cuda", code=code)


# Compressing


UNCODED = [
    *itertools.product(HALVES, [(32, 8), (32, 32), (64, 24), (64, 32), (96, 48), (128, 8), (128, 40), (128, 64)], [0]),
    *itertools.product(HALVES, [(64, 24), (128, 64)], [1]),
    *itertools.product(HALVES, [(128, 128), (256, 128), (80, 40), (24, 8), (8, 8)], [0]),
    *itertools.product([FP32], [(32, 8), (128, 64), (80, 24), (256, 256)], [0]),
]
CODED_SIZES = [(32, 8), (64, 64), (128, 40), (128, 64), (128, 128), (80, 40), (24, 24), (256, 128)]
OF_ALL_CODES = pairwise([*HALVES, FP32], CODED_SIZES, [0, 1], CODES)
COMPRESSED = [*OF_ALL_CODES, *((*shape, "none") for shape in UNCODED if (*shape, "none") not in OF_ALL_CODES)]
compressed_shapes = pytest.mark.parametrize(
    ("dtype", "sizes", "shift", "code"), mostly_at_night(COMPRESSED, len(OF_ALL_CODES))
)


def shifted(x, by):
    """``x`` with rows that start ``by`` elements off 16 bytes: that is for the plain kernel."""
    return torch.nn.functional.pad(x, (by, 8 - by))[..., by : by + x.shape[3]] if by else x


@needs_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_the_tuned_compressor_serves_aligned_rows(head_dim, dtype):
    dense = torch.zeros(2, 2, 40, head_dim, dtype=dtype, device="cuda")
    prune_ = kernels.Prune(head_dim // 32, head_dim // 2, 4, kernels.DTYPE_NAMES[dtype])
    assert kernels._prunes_by_lane(dense, prune_)
    assert kernels._prunes_by_lane(strided(dense, "tokens first"), prune_)
    assert not kernels._prunes_by_lane(shifted(dense, 1), prune_)
    assert not kernels._prunes_by_lane(strided(dense, "channels strided"), prune_)
    assert not kernels._prunes_by_lane(dense.float(), prune_)
    weighted = kernels.Prune(head_dim // 32, head_dim // 2, 4, kernels.DTYPE_NAMES[dtype], weighted=True)
    assert kernels._prunes_by_lane(dense, weighted)


@needs_gpu
@compressed_shapes
@some
@given(
    sizes_=st.tuples(st.integers(1, 3), st.integers(1, 4), lengths),
    written=st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    window=st.sampled_from([1, 7, 32, 100]),
    spare=st.integers(-100, 100),
    how=st.sampled_from(LAYOUTS),
    seed=seeds,
)
def test_a_compressed_cache_stands_for_the_pruned_one(
    dtype, sizes, shift, code, sizes_, written, window, spare, how, seed
):
    (head_dim, kept), (batch, heads, length) = sizes, sizes_
    tokens = round(written * length)
    capacity = max(length + spare, tokens - window, 0)
    plain = randn(batch, heads, length, head_dim, seed=seed, dtype=dtype)
    plain = strided(plain, "heads expanded") if how == "heads expanded" else plain
    expected = pruned_cache(plain[:, :, :tokens], sparsity_for(head_dim, kept), window, code)
    plain = partly_written(plain, tokens)
    dense = strided(shifted(plain.cuda(), shift), how)
    cache = compressed(dense, tokens, kept, window, capacity, by=kernels, code=code)
    assert cache.counts.tolist() == counts_of(tokens, window, batch=batch), "NaN that is not written is not extreme"
    assert_same_cache(cache, compressed(plain, tokens, kept, window, capacity, by=portable, code=code))
    for asked in {tokens, length, length + 7, max(tokens - 1, 0)}:
        assert_same_rows(decompressed(cache, asked, by=kernels).cpu(), with_length(expected, asked), code)


@needs_gpu
@compressed_shapes
def test_rows_that_are_hard_to_rank(dtype, sizes, shift, code):
    """Ties, NaN, denormals; all kept channels first, last, in one word, at both ends; every bit pattern."""
    head_dim, kept = sizes
    dense = hard_rows(head_dim, kept, dtype)
    if dtype != FP32:
        every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
        order = torch.randperm(2**16, generator=torch.Generator().manual_seed(kept))
        rows_ = torch.cat([every, every[order]])
        dense = torch.cat([dense, rows_[: len(rows_) // head_dim * head_dim].view(-1, head_dim)])
    few = torch.randint(0, 4, (500, head_dim), generator=torch.Generator().manual_seed(1)).to(dtype) - 1
    dense = torch.cat([dense, few, torch.where(few == 2, NAN, few), few * (few.abs().cumsum(-1) < kept)])[None, None]
    length = dense.shape[2]
    cache = compressed(shifted(dense.cuda(), shift), length, kept, 1, length, by=kernels, code=code)
    assert_same_cache(cache, compressed(dense, length, kept, 1, length, by=portable, code=code))
    expected = pruned_cache(dense, sparsity_for(head_dim, kept), 1, code)
    assert_same_rows(decompressed(cache, length, by=kernels).cpu(), expected, code)
    weights = weights_of(1, 1, 1, head_dim, kept)
    cache = compressed(
        shifted(dense.cuda(), shift), length, kept, 1, length, kernels, code=code, weights=weights.cuda()
    )
    assert_same_cache(cache, compressed(dense, length, kept, 1, length, portable, code=code, weights=weights))


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])  # the tuned kernel, the plain one
def test_every_level_of_every_floor(dtype):
    dense = every_level().to(dtype).repeat(1, 2)[None, None]
    cache = compressed(dense.cuda(), 128, 32, 1, 128, by=kernels, code="int4")
    expected = compressed(dense, 128, 32, 1, 128, by=portable, code="int4")
    assert_same_cache(cache, expected)
    assert_same_rows(decompressed(cache, 128, by=kernels).cpu(), decompressed(expected, 128, by=portable), "int4")


@needs_gpu
@some
@given(rows(), st.integers(1, 32), st.sampled_from(CODES))
def test_rows_of_all_kinds(x, eights, code):
    kept, dense = min(8 * eights, x.shape[-1]), x[None, None]
    places = (dense.cuda(), kernels), (dense, portable)
    assert_same_cache(*(compressed(on, len(x), kept, 1, len(x), by=by, code=code) for on, by in places))


# Past 2^31 elements

HUGE = 32, 2**17, 128, 64  # heads, tokens, channels, kept: eight batch entries are 2^31 kept values


@pytest.fixture
def much_memory():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB")
    yield
    torch.cuda.empty_cache()


@needs_gpu
@tuned_and_portable
def test_a_step_on_more_values_than_an_int32_counts(variant, much_memory):
    heads, capacity, head_dim, kept = HUGE
    tokens, window = 500, 32
    case = make_case(1, heads, 4, head_dim, head_dim, tokens, 14, BF16, window=window)
    caches = []
    for last in pasts(case):
        shapes = last.format.shapes(9, heads, capacity, BF16)
        whole = Cache([torch.zeros(shape, dtype=dtype, device="cuda") for shape, dtype in shapes], last.format)
        for buffer, x, b in zip(last.format.buffers, whole, last, strict=True):
            (x[8:, :, : b.shape[2]] if buffer.grows else x[8:]).copy_(b)
        caches.append(whole)
    assert caches[0].values[:8].numel() == 2**31
    new = case.query, case.keys[:, :, -1:], case.values[:, :, -1:]
    query, key, value = (x.cuda().expand(9, -1, -1, -1) for x in new)
    out = attention(query, key, value, *caches, scale=case.scale_number, decode=decode(variant))
    check(out[8:], case)
    for cache, x in zip(caches, (case.keys, case.values), strict=True):
        assert cache.counts[:8].tolist() == counts_of(1, window, batch=8)
        last = cache.changed(lambda b: b[8:])
        assert_same_cache(last, compressed(x, tokens, kept, window, tokens, by=portable))


@needs_gpu
@pytest.mark.parametrize("shift", [0, 1], ids=["tuned", "portable"])
def test_compressing_more_values_than_an_int32_counts(shift, much_memory):
    heads, length, head_dim, kept = HUGE
    dense = torch.zeros(9, heads, length, head_dim + 8 * shift, dtype=BF16, device="cuda")
    dense = dense[..., shift : shift + head_dim]
    dense[8].normal_(generator=torch.Generator("cuda").manual_seed(0))
    cache = compressed(dense, length, kept, 32, length, by=kernels)
    again = decompressed(cache, length, by=kernels)
    assert cache.values.numel() > again[:4].numel() == 2**31
    for head, part in ((0, slice(0, 1000)), (heads - 1, slice(length - 1000, length))):
        expected, where = dense[8, head].cpu()[None, None], (8, head, part)
        expected = pruned_cache(expected, 0.5, 32)[0, 0, part]
        assert_same_bits(again[where].cpu(), expected)
    assert not again[:8].any()
