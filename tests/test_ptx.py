"""The tuned kernels as text: well-formed PTX, sizes, rendering, and what compilers make of it. No GPU is needed."""

from __future__ import annotations

import itertools
import linecache
import re
import subprocess

import jinja2
import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from cases import step_of
from mustafar_compile.lowering import codes, kernels, render, weighing
from mustafar_compile.lowering.format import CODES, Format
from mustafar_compile.lowering.ptx.block import Block, listed, names
from mustafar_compile.lowering.ptx.decode import Decode
from mustafar_compile.lowering.ptx.prune import Prune
from mustafar_compile.lowering.ptx.rows import BIAS, UNITS, Rows, expand_setup, expand_word, stage
from mustafar_compile.lowering.step import COMBINE_REGISTERS, DTYPE_NAMES
from nightly import at_night, mostly_at_night
from pairwise import pairwise
from ptx_machine import Lane

DECODES = [
    Decode(Rows(key_words, key_kept), Rows(value_words, value_kept), heads, warps, dtype)
    for (key_words, key_kept), (value_words, value_kept) in [
        ((1, 8), (1, 8)),
        ((2, 32), (2, 24)),
        ((3, 48), (4, 64)),
        ((4, 40), (4, 40)),
        ((4, 128), (2, 8)),
        ((4, 128), (4, 128)),
        ((5, 80), (7, 8)),
        ((8, 128), (8, 128)),
    ]
    for heads, warps, dtype in [(1, 4, "bf16"), (4, 2, "f16"), (5, 4, "bf16"), (8, 2, "f16")]
]
DECODES += [
    Decode(Rows(4, key_kept, key_code), Rows(4, value_kept, value_code), heads, 4, dtype)
    for key_kept, key_code, value_kept, value_code, heads, dtype in [
        (64, "int8", 40, "int8", 4, "bf16"),
        (40, "int4", 64, "int4", 8, "bf16"),
        (128, "int8", 128, "int4", 5, "f16"),
        (128, "int4", 64, "none", 4, "bf16"),
        (64, "none", 128, "int8", 1, "bf16"),
    ]
]
PRUNES = [Prune(w, k, 4, dtype) for w, k in ((1, 8), (2, 32), (3, 48), (4, 8), (4, 88)) for dtype in ("bf16", "fp16")]
PRUNES += [Prune(4, k, 4, dtype, c) for k, dtype, c in pairwise((40, 128), ("bf16", "fp16"), ("int8", "int4"))]
PRUNES += [Prune(4, 40, 4, "bf16", "none", True), Prune(2, 32, 4, "fp16", "int4", True)]


def blocks_of(maker):
    if isinstance(maker, Prune):
        return {"prune": maker.block()}
    steps = ("setup", "first_keys", "score", "softmax", "weighted_sum", "merge")
    return {step: getattr(maker, step)() for step in steps}


BLOCKS = [
    pytest.param(block, id=f"{i}-{name}")
    for i, maker in enumerate([*DECODES, *PRUNES])
    for name, block in blocks_of(maker).items()
]

# ------------------------------------------------------------------------------------------------------------ the text

DECLARATION = re.compile(r"\.(reg|shared)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(.*)", re.DOTALL)
INSTRUCTION = re.compile(r"(?:@!?(\w+)\s+)?([\w.:]+)(?:\s+(.*))?", re.DOTALL)
NOT_A_NAME = re.compile(r"%\w+(?:\.\w+)?|\b0[fFxX][0-9a-fA-F]+|(?<![\w$.])-?\d+\b")


def statements(text):
    """The statements of a block and the braces of scopes, in order. Braces of vectors stay in their statement."""
    text = re.sub(r"//.*", "", text)
    depth, current = 0, ""
    for character in text:
        if character == "{" and current.strip():
            depth += 1
        elif character == "}" and depth:
            depth -= 1
        elif character in "{}" and not current.strip():
            yield character
            current = ""
            continue
        elif character == ";" and not depth:
            yield current.strip()
            current = ""
            continue
        current += character
        if re.fullmatch(r"\s*\w+:", current):
            yield current.strip()
            current = ""
    assert not depth, "a vector is not closed"
    assert not current.strip(), f"{current!r} is not ended"


def declared(names_text):
    for name in re.split(r"\s*,\s*", names_text.strip()):
        if many := re.fullmatch(r"(\w+)<(\d+)>", name):
            yield from (f"{many[1]}{i}" for i in range(int(many[2])))
        else:
            yield re.sub(r"\[\d+\]$", "", name)


def check_scopes(text):
    """Every name is declared before it is used, once in its scope, and hides no other; labels are there, once."""
    scopes, labels, targets = [], [], []
    for statement in statements(text):
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            labels.append(statement[:-1])
        elif match := DECLARATION.fullmatch(statement):
            for name in declared(match[3]):
                assert not any(name in scope for scope in scopes), f"{name} is declared twice"
                scopes[-1][name] = match[2]
        else:
            guard, operation, operands = INSTRUCTION.fullmatch(statement).groups(default="")
            used = re.findall(r"[A-Za-z_]\w*", f"{NOT_A_NAME.sub('', operands)} {guard}")
            if operation == "bra":
                targets.append(used.pop(0))
            for name in used:
                assert any(name in scope for scope in scopes), f"{name} is not declared: {statement}"
    assert not scopes
    assert sorted(labels) == sorted(set(labels))
    assert set(targets) <= set(labels)


@pytest.mark.parametrize("block", BLOCKS)
def test_names_are_declared_once_and_before_they_are_used(block):
    check_scopes(block.text)


@pytest.mark.parametrize(
    "text",
    [
        "{ .reg .b32 a; mov.b32 a, b; }",
        "{ .reg .b32 a; .reg .f32 a; }",
        "{ { .reg .b32 a; } mov.b32 a, 1; }",
        "{ .reg .b32 a; @p mov.b32 a, 1; }",
        "{ .reg .b32 a<2>; mov.b32 a2, 1; }",
        "{ mov.b32 a, 1; .reg .b32 a; }",
        "{ .reg .pred p; @p bra AWAY; }",
        "{ .reg .b32 a; mov.b32 a, 1 }",
        "{ .reg .b32 a; ",
        "{ .reg .b32 a; ld.v2.b32 {a,b}, [a+4]; }",
    ],
)
def test_the_check_of_names_finds_mistakes(text):
    with pytest.raises(AssertionError):
        check_scopes(text)


@pytest.mark.parametrize("block", BLOCKS)
def test_operands_and_constraints_agree(block):
    assert block.text.count("{") == block.text.count("}")
    constraints = block.constraints.split(",")
    outputs = [c for c in constraints if c.startswith("=&")]
    assert constraints[: len(outputs)] == outputs, "results come first"
    assert "".join(c[2:] for c in outputs) == block.results
    assert set(constraints[len(outputs) :]) <= {"r", "l", "f"}
    operands = [int(n) for n in re.findall(r"\$(\d+)", block.text)]
    assert sorted(operands) == list(range(len(constraints))), "each operand is bound once"
    for kind, into, out_of in re.findall(r"mov\.(\w+) (?:\w+, \$(\d+)|\$(\d+), \w+);", block.text):
        assert constraints[int(into or out_of)][-1] == {"b32": "r", "b64": "l", "f32": "f"}[kind]


def test_a_block_binds_registers_to_operands():
    block = Block.of({"a": "r", "p": "l"}, {"a": "r", "z": "f"}, iter(["add.u32 a, a, 1;", "mov.f32 z, 0f00000000;"]))
    assert block.constraints == "=&r,=&f,r,l"
    assert block.results == "rf"
    assert block.text.split("\n") == [
        "{", ".reg .b32 a;", ".reg .b64 p;", ".reg .f32 z;", "mov.b32 a, $2;", "mov.b64 p, $3;", "add.u32 a, a, 1;",
        "mov.f32 z, 0f00000000;", "mov.b32 $0, a;", "mov.f32 $1, z;", "}",
    ]  # fmt: skip
    assert names("x", 2, "f") == {"x0": "f", "x1": "f"}
    assert listed("x", 0, 3) == "{x0,x3}"


# ------------------------------------------------------------------------------------------------------------ the sizes


def shared_of(blocks):
    sizes = [re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", block.text) for block in blocks.values()]
    return [int(size) for size in itertools.chain(*sizes)]


@pytest.mark.parametrize("decode", DECODES, ids=range(len(DECODES)))
def test_shared_memory_of_decoding(decode):
    """Each access of each warp is within what is allocated, and what is allocated is what ``shared_bytes`` says."""
    blocks = blocks_of(decode)
    assert shared_of(blocks) == [decode.shared_bytes]
    rows = 4 * 32
    for step, packed in (("score", decode.keys), ("weighted_sum", decode.values)):
        kept = packed.kept
        if not packed.gathered:
            assert "[spread+" not in blocks[step].text, "a lane has its channels in registers"
            continue
        stored = [int(at) for at in re.findall(r"\[spread\+(\d+)\]", blocks[step].text)]
        staged = [at + packed.stored_apart * i for at in stored for i in range(4)]
        assert sorted(staged) == list(range(0, rows * kept, rows)), "each value starts a word, at its own place"
        assert max(staged) + rows <= decode.warp_bytes
        # Behind the last kept value one more word is read, of which nothing is used.
        assert rows * (kept + 1) <= decode.warp_bytes
        # A bitmap with too many bits takes the last warp no further than the end: to as many values as there are
        # channels, or to those of one word past its row.
        text, words = blocks[step].text, packed.words
        clamps = text.count("min.u32 at, at, behind")
        assert clamps in (0, words - 1)
        assert len(re.findall(rf"add.u32 behind, stage, {rows * kept};", text)) == min(clamps, 1)
        furthest = rows * (kept + 32 if clamps else 32 * words)
        assert (decode.warps - 1) * decode.warp_bytes + furthest <= decode.shared_bytes
    mine = [int(at) for at in re.findall(r"st\.shared\.b32 \[mine\+(\d+)\]", blocks["merge"].text)]
    assert sorted(mine) == list(range(0, rows * decode.accumulators, rows))
    assert max(mine) + rows <= decode.warp_bytes
    read = [int(at) for at in re.findall(r"\[query\+(\d+)\]", blocks["score"].text)]
    assert sorted(read) == list(range(0, 8 * decode.key_dim * decode.groups, 64)), "eight channels of four heads"
    assert max(read) + 64 <= decode.query_bytes
    assert decode.shared_bytes >= decode.warps * decode.warp_bytes + decode.query_bytes + 8 * 8 * decode.warps


@pytest.mark.parametrize("prune", PRUNES, ids=range(len(PRUNES)))
def test_shared_memory_of_pruning(prune):
    block = prune.block()
    if not prune.rows.has_bitmap:
        assert "shared" not in block.text
        return
    assert shared_of({"prune": block}) == [prune.shared_bytes]
    read = [int(at) for at in re.findall(r"\[stage\+(\d+)\]", block.text)]
    assert sorted(read) == list(range(0, 128 * prune.kept, 128))
    assert prune.shared_bytes == prune.warps * 128 * (prune.kept + 1), "and a slot for what is not kept"


# ------------------------------------------------------------------------------------------------------- expanding rows


def packed_row(rows, bitmap, seed):
    """The registers of a row with the channels of ``bitmap`` kept, the levels of its floor, and all its channels."""
    random = np.random.default_rng(seed)
    registers = {}
    for w in range(rows.words * rows.has_bitmap):  # bit 8 c + i is channel 4 i + c
        bits = bitmap[32 * w : 32 * w + 32].reshape(8, 4).T.ravel()
        registers[f"b{w}"] = int(sum(int(bit) << i for i, bit in enumerate(bits)))
    table = codes.level_table()[floor := int(random.integers(128))]
    if rows.code == "int4":
        kept = random.integers(16, size=rows.kept, dtype=np.uint8)
        levels = np.array([table[c % 8] * (-1 if c >= 8 else 1) for c in kept])
        stored = kept[::2] | kept[1::2] << 4
    else:
        high = 127 if rows.coded else 30000
        levels = random.integers(-high, high, size=rows.kept, endpoint=True)
        stored = levels.astype(np.int8 if rows.coded else np.int16).view(np.uint8)
    registers |= {f"v{j}": int(word) for j, word in enumerate(stored.view(np.uint32))}
    dense = np.zeros(32 * rows.words, dtype=int)
    dense[np.flatnonzero(bitmap)] = levels
    words = np.array(table, dtype=np.uint8).view(np.uint32)
    shared = {8 * floor + 4 * i: int(words[i]) for i in range(2)}
    return registers | {"f": floor, "table": 0, "stage": 1 << 16, "spread": 1 << 16}, shared, dense


def bitmaps(rows, seed):
    """Every group of four kept in every way, and the rest anyhow."""
    random = np.random.default_rng(seed)
    for start in range(8 * rows.words):
        groups = [(start + 5 * i) % 16 for i in range(8 * rows.words)]
        bitmap = np.array([group >> c & 1 for group in groups for c in range(4)], dtype=bool)
        order = random.permutation(bitmap.size)
        for channel in order:  # until as many are kept as the row has
            if bitmap.sum() == rows.kept:
                break
            bitmap[channel] = bitmap.sum() < rows.kept
        yield bitmap


@pytest.mark.parametrize(
    "rows",
    [Rows(w, k, code) for code in CODES for w, k in ((4, 40), (2, 32), (5, 80), (2, 64))],
    ids=lambda rows: f"{rows.words}-{rows.kept}-{rows.code}",
)
@pytest.mark.parametrize("by_matrices", [True, False])
def test_a_row_expands_to_its_channels(rows, by_matrices):
    """Levels are subnormal numbers of float16 with a bias."""
    for seed, bitmap in enumerate(bitmaps(rows, 0) if rows.has_bitmap else [np.ones(32 * rows.words, dtype=bool)] * 8):
        registers, table, dense = packed_row(rows, bitmap, seed)
        machine = Lane(7, rows.stored_apart, **registers)
        machine.shared |= table
        machine.run(stage(rows, by_matrices)).run(expand_setup(rows))
        for w in range(rows.words):
            machine.run(expand_word(rows, w, 16 * w))
        words = np.array([machine.registers[f"x{k}"] for k in range(16 * rows.words)], dtype=np.uint32)
        found = -words.view(np.float16).astype(float) * UNITS - BIAS if rows.coded else words.view(np.int16)
        assert found.tolist() == dense.tolist()


# ------------------------------------------------------------------------------------------------------------ rendering


def test_a_template_with_an_unknown_constant_fails():
    format = Format.interned(64, 32, 4)
    with pytest.raises(jinja2.UndefinedError):
        render.source("decompress", format=format)
    assert "window" in render.source("decompress", format=format, padded=64)


def test_no_constant_is_left_in_a_template():
    for mask, queries, softcap in itertools.product(("none", "boolean", "additive"), (1, 5), (False, True)):
        step = step_of(mask=mask, queries=queries, softcap=softcap)
        modules = [step.append(overlap, checked) for overlap in (False, True) for checked in (False, True)]
        for module in (*modules, step.portable()):
            text = "".join(linecache.getlines(module.__file__))
            assert "jit" in text
            assert not re.search("{[{%#]|[}%#]}", text)


def test_the_same_constants_give_one_module():
    assert step_of().portable() is step_of().portable()
    assert step_of().append(True) is step_of().append(True)
    assert step_of().append(True) is not step_of().append(False)
    assert step_of().append(True) is not step_of().append(True, checked=False)
    assert step_of().portable() is not step_of(group=2).portable()
    tuned, again = step_of().tuned(), step_of().tuned()
    assert tuned == again
    assert tuned.kernel(True) is again.kernel(True)
    first, second = (render.kernels("decompress", format=Format.interned(64, kept, 4), padded=64) for kept in (24, 32))
    assert first.__name__ != second.__name__
    assert first.__file__ != second.__file__


def test_results_become_dtypes():
    assert render._dtypes("r") == "gl.int32"
    assert render._dtypes("rf") == "(gl.int32, gl.float32)"


# ------------------------------------------------------------------------------------------------------------ compiling


SM_80, SM_90 = (GPUTarget("cuda", n, 32) for n in (80, 90))
COUNTS = {"counts", "key_counts", "value_counts", "position", "moved", "tokens"}
FLOATS = {"sums", "states", "weights", "key_weights", "value_weights"}
NUMBERS = {"scale": "fp32", "softcap": "fp32"}
ROWS = {"query", "ring", "key", "value", "key_window", "value_window", "window", "dense", "result", "sinks"}
STRIDES = {f"{rows}_{dim}" for rows in ("query", "key", "value") for dim in ("batch", "head", "token")}
STORED = {torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32"}
PLAIN = dict.fromkeys(("", "key_", "value_"), Format.interned(64, 32, 4))  # what comes before a buffer's name: a format


def type_of(name, dtype, mask, packed_query):
    if name == "mask":
        return "*fp32" if mask == "additive" else "*u8"
    if name in COUNTS:
        return "*i64"
    if name in FLOATS:
        return "*fp32"
    if name == "query" and packed_query:
        return "*i32"
    if name in ROWS:
        return f"*{dtype}"
    return NUMBERS.get(name, "i32")


def compiled(function, dtype, mask="none", sinks=False, gluon=False, formats=PLAIN, target=SM_90, **options):
    """The kernel as Triton compiles it, with the arguments that ``kernels`` gives it."""
    types = {name: type_of(name, dtype, mask, gluon) for name in function.arg_names}
    constants = {"stride_channel": 1} | ({"mask": None} if mask == "none" else {}) | ({} if sinks else {"sinks": None})
    constants |= {f"{role}{name}": None for role in formats for name in kernels._PACKED}
    for role, format in formats.items():
        for buffer in format.packed:
            constants.pop(role + buffer.name)
            types |= {n: STORED.get(buffer.dtype, f"*{dtype}") for n in types if n == role + buffer.name}
    constants = {name: value for name, value in constants.items() if name in types}
    types |= dict.fromkeys(constants, "constexpr")
    place = function.arg_names.index
    aligned = [name for name, kind in types.items() if kind.startswith("*") and name != "mask"]
    aligned += [name for name in types if name in STRIDES]
    source = (GluonASTSource if gluon else ASTSource)(
        function,
        types,
        {(place(name),): value for name, value in constants.items()},
        {(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options=options)


def usage(kernel, tmp_path):
    """Registers, stack and local memory of a thread."""
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    return tuple(int(n) for n in found.groups())


def has_tools():
    try:
        return bool(triton.knobs.nvidia.ptxas.path and triton.knobs.nvidia.cuobjdump.path)
    except RuntimeError:
        return False


needs_compiler = pytest.mark.skipif(not has_tools(), reason="Triton came without NVIDIA's tools")

MAIN = {
    "128, half": step_of(),
    "128, 70%": step_of(kept=40, mask="boolean"),
    "128, one head": step_of(group=1, dtype="fp16"),
    "128, one head, capped": step_of(group=1, softcap=True),
    "128, eight heads": step_of(group=8, mask="additive"),
    "128, a third": step_of(group=8, kept=88, dtype="fp16", mask="boolean"),
    "128, five tokens": step_of(kept=40, queries=5, mask="boolean"),
    "128, unpruned": step_of(kept=128, group=8, mask="boolean"),
    "64": step_of(64, group=8, dtype="fp16", softcap=True),
    "64, unpruned": step_of(64, kept=64, softcap=True),
    "256": step_of(256, group=2),
}


SPILLED = {"128, eight heads": 56}  # bytes of the newest assembler; that of triton 3.6 spills nothing


@needs_compiler
@pytest.mark.parametrize("name", MAIN)
def test_the_tuned_attention_compiles_without_spilling(name, tmp_path):
    step = MAIN[name]
    tuned = step.tuned()
    module = tuned.kernel(True)
    how = {"num_warps": tuned.warps, "maxnreg": tuned.registers}
    kernel = compiled(module.attend, step.dtype, step.mask, gluon=True, **how)
    registers, stack, local = usage(kernel, tmp_path)
    assert registers <= tuned.registers
    assert (stack <= SPILLED.get(name, 24), local) == (True, 0), "a few registers, as some assemblers need, do no harm"
    assert kernel.metadata.shared + tuned.decode.shared_bytes <= 48 * 1024
    sparse, dense = (len(re.findall(rf"mma\.{kind}", kernel.asm["ptx"])) for kind in ("sp::", "sync"))
    keys, values = tuned.decode.keys.words, tuned.decode.values.words
    assert sparse == 4 * keys * tuned.decode.groups + 2 * 4 * values
    assert dense == 2 * 2 * values, "halved, too"


@needs_compiler
@pytest.mark.parametrize("name", ["128, half", "128, eight heads", "64"])
def test_before_hopper_the_tuned_attention_stores_word_by_word(name, tmp_path):
    step = MAIN[name]
    tuned = step.tuned(hopper=False)
    module = tuned.kernel(False)
    how = {"num_warps": tuned.warps, "maxnreg": tuned.registers}
    kernel = compiled(module.attend, step.dtype, step.mask, gluon=True, target=SM_80, **how)
    assert "stmatrix" not in kernel.asm["ptx"]
    _, stack, local = usage(kernel, tmp_path)
    assert (stack <= 24, local) == (True, 0)


@needs_compiler
@pytest.mark.parametrize(("head_dim", "kept"), [(32, 16), (64, 32), (96, 48), (128, 40), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tuned_compressor_compiles_without_spilling(head_dim, kept, dtype, tmp_path):
    name = DTYPE_NAMES[dtype]
    module, _ = kernels._compressor(Prune(head_dim // 32, kept, 4, name), Format.interned(head_dim, kept, 32), dtype)
    kernel = compiled(module.compress, name, gluon=True, num_warps=4)
    _, stack, local = usage(kernel, tmp_path)
    assert (stack, local) == (0, 0)


@needs_compiler
@pytest.mark.parametrize(
    ("head_dim", "kept", "dtype"),
    [(128, 64, torch.bfloat16), *at_night([(64, 32, torch.float16), (128, 40, torch.float16)])],
)
def test_the_tuned_compressor_by_weights_compiles_without_spilling(head_dim, kept, dtype, tmp_path):
    name = DTYPE_NAMES[dtype]
    prune = Prune(head_dim // 32, kept, 4, name, weighted=True)
    module, _ = kernels._compressor(prune, Format.interned(head_dim, kept, 32), dtype, True)
    kernel = compiled(module.compress, name, gluon=True, num_warps=4)
    _, stack, local = usage(kernel, tmp_path)
    assert (stack, local) == (0, 0)
    assert "fma" not in kernel.asm["ptx"], "products are rounded as those of PyTorch are"


@needs_compiler
@pytest.mark.parametrize(("head_dim", "queries"), [(128, 1), *at_night([(64, 1), (80, 5), (256, 1), (128, 16)])])
def test_the_kernel_that_weighs_queries_compiles_without_spilling(head_dim, queries, tmp_path):
    weigher, warps = weighing.weigher(head_dim, 4, queries), weighing.warps_for(head_dim)
    registers, stack, local = usage(compiled(weigher.weigh, "bf16", num_warps=warps), tmp_path)
    assert (stack <= 16, local) == (True, 0)
    assert registers * 32 * warps <= 65536


SIZES = (80, 64, 40, 24), (24, 16, 8, 8)  # head dims and kept channels: whole words and powers of two are easier
MASKS, DTYPES, QUERIES = ("none", "boolean", "additive"), ("bf16", "fp32"), (1, 16)


def plain_step(mask, dtype, queries, sizes=SIZES[0], sinks=False):
    return step_of(*sizes, group=6, dtype=dtype, mask=mask, queries=queries, sinks=sinks, softcap=mask == "boolean")


@needs_compiler
@pytest.mark.parametrize(
    ("mask", "dtype", "queries", "sizes", "checked"),
    mostly_at_night(pairwise(MASKS, DTYPES, QUERIES, SIZES, (False, True)), 2),
)
def test_the_plain_kernels_compile(mask, dtype, queries, sizes, checked):
    """As Triton compiles them: its interpreter takes more than its compiler."""
    step, how = plain_step(mask, dtype, queries, sizes), {"debug": True, "sanitize_overflow": False} if checked else {}
    append = compiled(step.append(True, checked).append, dtype, mask, num_warps=step.append_warps, **how)
    assert append.asm["cubin"]
    # A message is a string of bytes in PTX, so its assertions are counted.
    found = len(re.findall(r"call.uni\s+__assertfail|__assertfail,", append.asm["ptx"]))
    assert bool(found) == checked
    assert compiled(step.portable().attend, dtype, mask).asm["cubin"]


@needs_compiler
@pytest.mark.parametrize(
    ("mask", "dtype", "queries", "exact", "sinks"), pairwise(MASKS, DTYPES, QUERIES, (False, True), (False, True))
)
def test_the_combine_compiles(mask, dtype, queries, exact, sinks):
    combine = plain_step(mask, dtype, queries, sinks=sinks).combine(9, exact, exact).combine
    few = {"maxnreg": COMBINE_REGISTERS} if exact else {}
    assert compiled(combine, dtype, mask, sinks, num_warps=1, **few).asm["cubin"]


@needs_compiler
@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (step_of(kept=40), 7),
        (step_of(kept=128, value_kept=64, codes=("int4", "int4")), 7),
        *at_night([(step_of(kept=64, codes=("int4", "int4"), mask="additive"), 13), (step_of(256, group=2), 71)]),
    ],
)
def test_the_combine_compiles_without_spilling(step, parts, tmp_path):
    """What it does for extreme values must cost nothing where there are none."""
    how = {"formats": {"key_": step.key, "value_": step.value}, "num_warps": 1, "maxnreg": COMBINE_REGISTERS}
    kernel = compiled(step.combine(parts, True, True).combine, step.dtype, step.mask, **how)
    _, stack, local = usage(kernel, tmp_path)
    assert (stack <= 24, local) == (True, 0)


CODED = "int8", "int4"


@needs_compiler
@pytest.mark.parametrize(
    ("codes", "dtype", "sizes"),
    [
        (("int8", "int4"), "bf16", (24, 16, 24, 8)),
        *at_night(pairwise([*itertools.product(CODES, repeat=2)], DTYPES, (*SIZES, (64, 64, 64, 64)))),
    ],
)
def test_the_plain_kernels_of_coded_rows_compile(codes, dtype, sizes):
    step = step_of(*sizes, dtype=dtype, codes=codes)
    formats = {"key_": step.key, "value_": step.value}
    weighted = ("key", "value")
    append = compiled(step.append(True, False, weighted).append, dtype, formats=formats, num_warps=step.append_warps)
    attend = compiled(step.portable().attend, dtype, formats=formats)
    combine = compiled(step.combine(9, True, True).combine, dtype, formats=formats, num_warps=1)
    assert all(kernel.asm["cubin"] for kernel in (append, attend, combine))


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "sizes", "code"),
    [
        *[(torch.bfloat16, (80, 40), "none"), (torch.float16, (24, 8), "none"), (torch.float32, (24, 8), "none")],
        (torch.bfloat16, (24, 8), "int4"),
        *at_night(pairwise((torch.float16, torch.float32), [(80, 40), (64, 64)], CODED)),
    ],
)
def test_the_plain_kernels_of_whole_caches_compile(dtype, sizes, code):
    name, format = DTYPE_NAMES[dtype], Format.interned(*sizes, 32, code)
    module, _ = kernels._compressor(None, format, dtype, code != "none")
    compress = compiled(module.compress, name, formats={"": format}, num_warps=4)
    assert compress.asm["cubin"]
    if code != "none":
        assert "div.rn.f32" in compress.asm["ptx"]
    assert "fma" not in compress.asm["ptx"], "levels are those of PyTorch to the last bit"
    module = kernels._decompressor(format)
    assert compiled(module.decompress, name, formats={"": format}).asm["cubin"]
