"""What the tests of the ops and of their kernels have in common: tensors, decode steps, and what must come out."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st

from mustafar_compile.lowering import ops, portable
from mustafar_compile.lowering.buffers import CACHE_DTYPES
from mustafar_compile.lowering.decode_step import DecodeStep
from mustafar_compile.lowering.format import CODES, MAX_QUERY_TOKENS, Format
from reference import kept_count, prune, pruned_cache, reference_attention

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
NAN, INF = float("nan"), float("inf")

dtypes = st.sampled_from(CACHE_DTYPES)
seeds = st.integers(0, 2**31)
query_counts = st.sampled_from([1, 1, 2, 3, 5, MAX_QUERY_TOKENS])
up_to_32 = st.integers(1, 32)
sparsities = st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 0.999])


def randn(*shape, seed, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_same_bits(actual, expected):
    """Equal to the last bit: NaN equals NaN and -0.0 is not 0.0."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if not actual.is_floating_point():
        assert torch.equal(actual, expected)
        return
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = (x.masked_fill(x.isnan(), 0).view(BITS[x.dtype]) for x in (actual, expected))
    assert torch.equal(actual, expected)


def assert_same_rows(actual, expected, code="none"):
    """Dense rows equal to the last bit. Of a code the expected ones are float32, and a zero may have lost its sign."""
    if code != "none":
        actual, expected = actual + 0.0, expected.to(actual.dtype) + 0.0
    assert_same_bits(actual, expected)


class Cache(list):
    """The buffers of one cache tensor, and their format."""

    def __init__(self, buffers, format):
        super().__init__(buffers)
        self.format = format

    @property
    def values(self):
        return self[self.format.place("values")]

    @property
    def bitmap(self):
        return self[self.format.place("bitmap")]

    @property
    def window(self):
        return self[self.format.place("window")]

    @property
    def counts(self):
        return self[self.format.place("counts")]

    def changed(self, change):
        """A cache with ``change`` applied to each buffer."""
        return Cache(map(change, self), self.format)

    def clone(self):
        return self.changed(torch.clone)

    def to(self, device):
        return self.changed(lambda x: x.to(device))


def compressed(dense, tokens, kept, window, capacity, by=ops, order="blocks", code="none", weights=None):
    """``by.compress``; ``by`` is ``ops`` or one that carries them out. tokens: a number, or one for each row."""
    format = Format.interned(dense.shape[3], kept, window, code, order)
    tokens = torch.as_tensor(tokens, device=dense.device).reshape(-1)
    ranked = () if weights is None else (weights,)
    return Cache(by.compress(dense, tokens, format.encode() if by is ops else format, capacity, *ranked), format)


def weights_of(batch, heads, tokens, head_dim, seed=0, device="cpu"):
    """Weights of channels as strategies give them, some of them 0 and some 1."""
    w = torch.rand(batch, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed))
    return torch.where(w < 0.1, 0, torch.where(w > 0.9, 1, w)).to(device)


def decompressed(cache, length, by=ops):
    """``by.decompress``."""
    return by.decompress(cache, cache.format.encode() if by is ops else cache.format, length)


def attention(query, key, value, keys, values, position=None, mask=None, sinks=None, scale=1.0, softcap=0.0, **how):
    """``decode`` (default: the op; else a function that takes a ``DecodeStep``) over two caches."""
    decode = how.pop("decode", ops.decode_attention)
    given = position, mask, sinks, scale, softcap
    if decode is ops.decode_attention:
        return decode(query, key, value, keys, values, keys.format.encode(), values.format.encode(), *given, **how)
    more = {name: how.pop(name) for name in DecodeStep._fields if name in how}
    return decode(DecodeStep(query, key, value, keys, values, keys.format, values.format, *given, **more), **how)


@st.composite
def rows(draw, dtypes=dtypes, eights=up_to_32):
    """Rows [n, D] of a few values that are hard to rank, and random ones."""
    dtype, head_dim, count = draw(dtypes), 8 * draw(eights), draw(st.integers(1, 4))
    limits = torch.finfo(dtype)
    atoms = [0.0, -0.0, 1.0, -1.0, 1.5, NAN, -NAN, INF, -INF, limits.max, limits.min, limits.tiny]
    atoms += [limits.smallest_normal * limits.eps, -limits.smallest_normal * limits.eps]  # denormals
    palette = draw(st.lists(st.sampled_from(atoms), max_size=6))
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(count, head_dim, generator=generator).to(dtype)
    if palette:
        values = torch.tensor(palette, dtype=dtype)
        chosen = values[torch.randint(len(palette), x.shape, generator=generator)]
        x = torch.where(torch.rand(x.shape, generator=generator) < draw(st.sampled_from([0.5, 1.0])), chosen, x)
    return x


def hard_rows(head_dim, kept, dtype):
    """Rows [n, D] in which ties, bits and places are as awkward as they can be."""
    limits = torch.finfo(dtype)
    infinity = torch.tensor(INF, dtype=dtype).view(BITS[dtype])
    channel = torch.arange(head_dim)
    places = [channel < kept, channel >= head_dim - kept, channel // 32 == 0, channel // 32 == (head_dim - 1) // 32]
    places += [(channel < kept // 2) | (channel >= head_dim - kept // 2), channel % 2 == 1, channel == head_dim - 1]
    ones = torch.ones(head_dim)
    rows = [0 * ones, -0.0 * ones, ones, -ones, INF * ones, NAN * ones, limits.max * ones, (channel % 3) - 1.0]
    rows += [torch.where(at, 1.0, 0.0) for at in places] + [torch.where(at, NAN, INF) for at in places]
    rows += [torch.where(at, -2.0, 1.0) for at in places]
    rows += [torch.randint(-2, 3, (head_dim,), generator=torch.Generator().manual_seed(i)).float() for i in range(4)]
    rows = torch.stack(rows).to(dtype)
    nans = (infinity + 1 + channel.to(BITS[dtype])).view(dtype)
    denormals = (channel + 1).to(BITS[dtype]).view(dtype)
    return torch.cat([rows, nans[None], denormals[None], -denormals.flip(0)[None]])


def strided(x, how):
    """``x`` [B, H, S, D] in another memory order, as models hand their caches over."""
    if how == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "channels strided":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "part of a larger one":
        return torch.nn.functional.pad(x, (8, 8, 1, 1), value=NAN)[:, :, 1:-1, 8:-8]
    if how == "joined":  # the tokens of a step, as one product gives its queries, keys and values
        return torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 1, 2), value=NAN)[:, :, 1:-2].transpose(1, 2)
    if how == "at odd places":
        return torch.nn.functional.pad(x, (1, 2), value=NAN)[..., 1:-2]
    if how == "heads expanded":
        return x[:, :1].expand_as(x)
    return x


def partly_written(x, tokens):
    """x [B, H, n, D] with NaN behind its first ``tokens`` tokens: what is not written must not be read."""
    return torch.where(torch.arange(x.shape[2]).unsqueeze(-1) < tokens, x, NAN)


def with_length(x, length):
    """The first ``length`` tokens of x [B, H, n, D]; zeros behind its last."""
    return torch.nn.functional.pad(x, (0, 0, 0, max(length - x.shape[2], 0)))[:, :, :length]


def blocks_of(cache):
    """The buffers that hold packed rows, each seen as [B, H, blocks, 32, ...]."""
    return [x.movedim(buffer.token_dim, 3) for buffer, x in zip(cache.format.packed, cache, strict=False)]


def rows_of(cache):
    """What the slots hold, each in a row [B, H, slots, n]."""
    return [x.flatten(4).flatten(2, 3) for x in blocks_of(cache)]


def counts_of(tokens, window, flag=0, batch=1):
    """The counts of a cache that ``tokens`` were written into in order."""
    return batch * [[tokens, max(tokens - window - MAX_QUERY_TOKENS, 0), flag]]


def pruned_in(cache):
    """How many tokens of each row of the batch count as pruned."""
    return [max(held, tokens - cache.format.window) for tokens, held, _ in cache.counts.tolist()]


LAYOUTS = [
    *("plain", "tokens first", "part of a larger one", "channels strided", "joined", "at odd places"),
    "heads expanded",  # which are other values
]


def border(dtype):
    """Values on both sides of what is extreme, and whether they are."""
    yield from [(0.0, 0), (NAN, 1), (INF, 1), (-INF, 1)]
    if dtype == torch.float16:  # its largest number is far below
        yield from [(65504.0, 0), (-65504.0, 0)]
    else:
        before = 2.0**97 * (1 - torch.finfo(dtype).eps / 2)
        yield from [(2.0**97, 1), (-(2.0**97), 1), (before, 0), (-before, 0), (torch.finfo(dtype).max, 1)]


BORDERS = [(dtype, value, flag) for dtype in CACHE_DTYPES for value, flag in border(dtype)]


def row_holding(value, dtype, device="cpu"):
    """A token [2, 2, 1, 40] with ``value`` in the last channel of the second row of the batch."""
    row = randn(2, 2, 1, 40, seed=9, dtype=dtype, device=device)
    row[1, 1, 0, 39] = value
    return row


@dataclass
class Case:
    """One decode step: what is in the cache, what is asked, what must come out."""

    query: torch.Tensor  # of the last tokens
    keys: torch.Tensor  # of all tokens, the new ones included
    values: torch.Tensor
    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    window: int = 4
    spare: int = 3
    mask: torch.Tensor | None = None
    scale: float | None = None
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    order: str = "blocks"
    key_code: str = "none"
    value_code: str = "none"

    def to(self, device):
        """The same case there."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in held.items() if isinstance(x, torch.Tensor)})

    @property
    def tokens(self):
        return self.keys.shape[2]

    @property
    def queries(self):
        return self.query.shape[2]

    @property
    def written(self):
        """Tokens before the step."""
        return self.tokens - self.queries

    @property
    def sees_later(self):
        """Whether the mask alone says which of the tokens after it one sees."""
        return self.mask is not None and self.mask.dim() > 1 and self.mask.shape[-2] > 1

    def singles(self):
        """The steps of one token each that this step stands for, where none of its tokens sees later ones."""
        for i, tokens in enumerate(range(self.written + 1, self.tokens + 1)):
            mask = self.mask
            if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
                mask = mask[..., i : i + 1, :]
            if mask is not None and mask.shape[-1] > 1:
                mask = mask[..., :tokens]
            seen = self.keys[:, :, :tokens], self.values[:, :, :tokens]
            yield replace(self, query=self.query[:, :, i : i + 1], keys=seen[0], values=seen[1], mask=mask)

    def queries_alone(self):
        """For each query a case whose result is that of this one: with later tokens where the mask decides on them."""
        if not self.sees_later:
            yield from self.singles()
            return
        for row, single in enumerate(self.singles()):
            mask = self.mask[..., row : row + 1, : self.tokens]
            window = self.window + self.queries - 1 - row  # later tokens prune nothing
            yield replace(single, keys=self.keys, values=self.values, mask=mask, window=window)

    @property
    def scale_number(self):
        return 1 / math.sqrt(self.query.shape[3]) if self.scale is None else self.scale

    def past(self, role):
        """Buffers with all but the new tokens; slots that hold nothing hold NaN, and ones where there is none."""
        x = self.keys if role == "key" else self.values
        sparsity, code = (getattr(self, f"{role}_{what}") for what in ("sparsity", "code"))
        written = self.written
        capacity = max(self.tokens - self.window, 0) + 1 + self.spare
        kept = kept_count(x.shape[3], sparsity)
        dense = x[:, :, : max(written, 1)]
        by = ops if self.order == "blocks" else portable  # which builds nothing
        cache = compressed(dense, written, kept, self.window, capacity, by, self.order, code)
        empty = torch.arange(cache.format.capacity_of(cache), device=x.device) >= max(written - self.window, 0)
        for packed in blocks_of(cache):
            bits = packed.view(torch.int8) if packed.dtype == torch.uint8 else packed
            where = empty.view(-1, 32, *(bits.dim() - 4) * [1])
            bits.masked_fill_(where, NAN if bits.is_floating_point() else -1)
        cache.window[:, :, written:] = NAN
        return cache

    def step(self, keys=None, values=None, position=None, decode=ops.decode_attention, **how):
        """The result of ``decode``, which updates the caches."""
        new = [x[:, :, self.written :] for x in (self.keys, self.values)]
        caches = keys or self.past("key"), values or self.past("value")
        given = position, self.mask, self.sinks, self.scale_number, self.softcap
        return attention(self.query, *new, *caches, *given, decode=decode, **how)

    def expected(self):
        """The oracle's result in float64."""
        return torch.cat([case._expected() for case in self.queries_alone()], dim=2)

    def _expected(self):
        how = (*self.sparsities, self.window, self.mask, self.scale_number, torch.float64, self.softcap, self.sinks)
        codes = self.key_code, self.value_code
        return reference_attention(self.query.double(), self.keys, self.values, *how, codes)

    def allowed_error(self, rounds_weights=False):
        """What sums in float32 and one rounding of the result may be off by: an error analysis, not a guess.

        rounds_weights: the weights are rounded to the dtype of the cache before they meet the values, and so are
        values that were stored in a code.
        """
        return torch.cat([case._allowed_error(rounds_weights) for case in self.queries_alone()], dim=2)

    def _allowed_error(self, rounds_weights):
        unit, out = 2.0**-24, torch.finfo(self.query.dtype)
        group = self.query.shape[1] // self.keys.shape[1]
        keys = pruned_cache(self.keys, self.key_sparsity, self.window, self.key_code).double().abs()
        keys = keys.repeat_interleave(group, 1).transpose(2, 3)
        sizes = self.query.double().abs() @ keys * abs(self.scale_number)
        # Where one score is beyond all others, it or its absence makes weights of exactly 0 and 1.
        sizes = torch.where(sizes < 2.0**60, sizes, 0)
        in_score = (self.query.shape[3] + 4) * unit * sizes.amax(-1, keepdim=True) + 8 * unit * self.softcap
        if self.sinks is not None:
            in_score = in_score + 2 * unit * self.sinks.double().abs().nan_to_num(posinf=0).amax()
        if self.mask is not None and self.mask.dtype != torch.bool:
            in_score = in_score + unit * (self.mask.double().abs().nan_to_num(posinf=0) + 1).clamp(max=1e5).amax()
        in_weights = torch.expm1(2 * in_score) + (self.tokens + 16) * unit
        expected, averaged = self._expected(), replace(self, values=self.values.abs())._expected()
        sums = (in_weights + (self.tokens + 4) * unit) * averaged
        if rounds_weights:
            values = pruned_cache(self.values, self.value_sparsity, self.window, self.value_code).double().abs()
            lost = 2.0**-25 if self.values.dtype == torch.float16 else 2.0**-100  # weights too small for the dtype
            sums = sums + lost * values.sum(2, keepdim=True).repeat_interleave(group, 1)
            if self.values.dtype != torch.float32:
                sums = sums + torch.finfo(self.values.dtype).eps * averaged
        return sums + out.eps / 2 * (expected.abs() + sums) + out.tiny * out.eps

    @property
    def sparsities(self):
        return self.key_sparsity, self.value_sparsity


def assert_close(actual, case, factor=1, rounds_weights=False):
    """Equal to the oracle's result up to rounding, with NaN and infinities where it has them."""
    assert actual.dtype == case.query.dtype
    expected, allowed = case.expected(), case.allowed_error(rounds_weights)
    actual = actual.to(expected.device, torch.float64)
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    exact = expected.isnan() | expected.isinf()
    assert torch.equal(actual[expected.isinf()], expected[expected.isinf()])
    assert allowed[~exact].isfinite().all(), "else this would say nothing"
    excess = ((actual - expected).abs() / allowed).masked_fill(exact, 0).max().item()
    assert excess <= factor, f"the error is {excess:.2f} times what rounding explains"


def assert_same_cache(actual, expected):
    """Buffers that hold the same: all but the slots that nothing reads, to the last bit."""
    assert actual.counts.tolist() == expected.counts.tolist()
    actual = actual.to(expected.window.device)
    for row, pruned in enumerate(pruned_in(expected)):
        for mine, other in zip(rows_of(actual), rows_of(expected), strict=True):
            assert_same_bits(mine[row, :, :pruned], other[row, :, :pruned])
    assert_same_bits(actual.window, expected.window)


def sparsity_for(head_dim, kept):
    """A sparsity at which ``kept`` of ``head_dim`` channels are kept."""
    return (head_dim - kept + 4) / head_dim


def make_case(batch=2, heads=2, group=2, head_dim=16, value_dim=16, tokens=11, seed=0, dtype=torch.float32, **how):
    device, queries = how.pop("device", "cpu"), how.pop("queries", 1)
    make = {"dtype": dtype, "device": device}
    return Case(
        randn(batch, heads * group, queries, head_dim, seed=seed, **make),
        randn(batch, heads, tokens, head_dim, seed=seed + 1, **make),
        randn(batch, heads, tokens, value_dim, seed=seed + 2, **make),
        **how,
    )


def make_mask(kind, shape, seed, density=0.7):
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(shape, generator=generator) < density
    if kind == "bool":
        return allowed
    if kind == "bias":
        return torch.randn(shape, generator=generator)
    lowest = -INF if kind == "-inf" else torch.finfo(torch.float32).min
    return torch.zeros(shape).masked_fill(~allowed, lowest)


def both_ways(queries, tokens):
    """A mask [L, S] by which the latest tokens see each other, later ones too; the first not all of the past."""
    mask = torch.ones(queries, tokens, dtype=torch.bool)
    mask[0, ::3] = False
    return mask


def make_sinks(query_heads, seed, dtype=torch.float32):
    """Logits of sinks, of which some outweigh all tokens and some count for nothing."""
    sinks = 4 * randn(query_heads, seed=seed)
    sinks[::5] += 30
    return sinks.to(dtype)


@st.composite
def masks(draw, case):
    """A mask for ``case``, or none, of any shape that broadcasts."""
    kind = draw(st.sampled_from([None, "bool", "bias", "-inf", "lowest"]))
    if not kind:
        return None
    (batch, query_heads), length = case.query.shape[:2], draw(st.sampled_from([case.tokens, case.tokens + 3, 1]))
    rows = draw(st.sampled_from([1, case.queries]))
    shapes = [(), (rows,), (1, 1, rows), (batch, 1, rows), (1, query_heads, rows), (batch, query_heads, rows)]
    shapes.append((query_heads, rows))
    return make_mask(kind, (*draw(st.sampled_from(shapes)), length), draw(seeds))


@st.composite
def cases(
    draw,
    dtypes=dtypes,
    dims=(8, 16, 24, 64, 80, 128),
    windows=tuple(range(1, 13)),
    queries=query_counts,
    groups=(1, 2, 3, 4, 8),
    codes=CODES,
):
    batch, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from(groups))
    dims, dtype, queries = st.sampled_from(dims), draw(dtypes), draw(queries)
    case = make_case(
        batch, heads, group, draw(dims), draw(dims), draw(st.integers(queries, 80)), draw(seeds), dtype,
        queries=queries, key_sparsity=draw(sparsities), value_sparsity=draw(sparsities),
        window=draw(st.sampled_from(windows)), spare=draw(st.integers(0, 9)),
        scale=draw(st.sampled_from([None, 1.0, 0.3, -0.5])), softcap=draw(st.sampled_from([0.0, 0.0, 0.5, 20.0])),
    )  # fmt: skip
    case.key_code, case.value_code = (draw(st.sampled_from(codes)) for _ in range(2))
    case.mask = draw(masks(case))
    if draw(st.booleans()):
        case.sinks = make_sinks(heads * group, draw(seeds), draw(dtypes))
    return case


class TokenByToken:
    """The oracle of the buffers: a list of rows, the first ``held`` of which are pruned for good."""

    def __init__(self, kept, window):
        self.kept, self.window, self.rows, self.held = kept, window, [], 0

    def write(self, rows, position):
        """Tokens [B, H, L, D] at ``position``. Returns what each of them sees [B, H, n, D]."""
        return [self._write_one(row, position + i) for i, row in enumerate(rows.split(1, dim=2))]

    def _write_one(self, row, position):
        self.rows, held = [*self.rows[:position], row], min(self.held, position)
        self.held = max(held, position + 1 - self.window - MAX_QUERY_TOKENS)
        for i in range(held, self.held):
            self.rows[i] = prune(self.rows[i], self.kept)
        return self.seen()

    def seen(self):
        """The cache as attention takes it."""
        rows, pruned = torch.cat(self.rows, dim=2), max(len(self.rows) - self.window, 0)
        return torch.cat([prune(rows[:, :, :pruned], self.kept), rows[:, :, pruned:]], dim=2)


moves = st.lists(st.tuples(st.floats(0, 1) | st.just(1.0), query_counts), min_size=1, max_size=25)


def check_steps(
    moves,
    window,
    seed,
    decode=ops.decode_attention,
    start=0,
    head_dim=24,
    dtype=torch.float32,
    device="cpu",
    order="blocks",
    batch=2,
):
    """Steps of so many tokens each, at the end (1.0) or the start (0.0) of what is written, or between: rewinding.

    Results and caches must be those of tokens that come one by one.
    """
    kept = 8
    oracles = [TokenByToken(kept, window) for _ in range(2)]
    caches = []
    for i, oracle in enumerate(oracles):
        prompt = randn(batch, 1, start + 1, head_dim, seed=seed - i - 1, dtype=dtype)
        if start:
            oracle.write(prompt[:, :, :start], 0)
        capacity = start + sum(count for _, count in moves)
        caches.append(compressed(prompt.to(device), start, kept, window, capacity, order=order))
    for n, (fraction, count) in enumerate(moves):
        position = round(fraction * len(oracles[0].rows))
        query, *new = (randn(batch, h, count, head_dim, seed=seed + 10 * n + h, dtype=dtype) for h in (2, 1, 1))
        seen = [oracle.write(rows, position) for oracle, rows in zip(oracles, new, strict=True)]
        arguments = [x.to(device) for x in (query, *new)]
        at = torch.tensor([position], device=device)
        out = attention(*arguments, *caches, at, scale=0.2, decode=decode)
        for i, (keys, values) in enumerate(zip(*seen, strict=True)):
            case = Case(query[:, :, i : i + 1], keys, values, 0.0, 0.0, scale=0.2)
            assert_close(out[:, :, i : i + 1], case, rounds_weights=True)
        for mine, oracle in zip(caches, oracles, strict=True):
            assert mine.counts.tolist() == batch * [[position + count, oracle.held, 0]]
            assert_same_bits(decompressed(mine, position + count).cpu(), oracle.seen())


REWINDING = [
    ([(1.0, 1)] * 9 + [(0.0, 1)] + [(1.0, 1)] * 9, 3, 0),  # a new text in the same buffers
    ([(1.0, 5)] * 8 + [(0.925, 5), (1.0, 4)], 3, 0),  # back by three, as rejected drafts are
    ([(1.0, 16)] * 4 + [(0.75, 1), (0.75, 16), (1.0, 2)], 3, 0),  # as far as the ring goes
    ([(1.0, 16)] * 4 + [(0.5, 3)] + [(1.0, 2)] * 6, 3, 0),  # beyond it
    ([(1.0, 16)] * 3 + [(0.1, 1), (0.5, 1), (1.0, 16), (0.3, 5), (1.0, 1)], 1, 0),
]


def step_of(
    key_dim=128, value_dim=None, kept=None, value_kept=None, group=4, dtype="bf16", codes=("none", "none"), **how
):
    """The kernels of a step, of which most is as usual."""
    from mustafar_compile.lowering.step import Step  # needs Triton

    value_dim = value_dim or key_dim
    kept = kept or kept_count(key_dim, 0.5)
    sizes = (key_dim, kept), (value_dim, value_kept or kept)
    formats = [Format.interned(*size, 32, code) for size, code in zip(sizes, codes, strict=True)]
    fixed = {"mask": "none", "queries": 1, "sinks": False, "softcap": False}
    return Step(*formats, group=group, dtype=dtype, **(fixed | how))
