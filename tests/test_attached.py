"""State attached to the memory of dense caches: found through any view of it, and only while it holds."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mustafar_compile import cache_stats, explain
from mustafar_compile.cache import attached
from mustafar_compile.cache.memory import overlap, place_of
from nightly import mostly_at_night

pytestmark = pytest.mark.usefixtures("no_grad", "uncompiled")
LAYERS, BATCH, HEADS, SLOTS, DIM = 2, 2, 2, 24, 16


def step(query, key, value, keys, values, positions):
    keys[:, :, positions] = key
    values[:, :, positions] = value
    mask = torch.arange(keys.shape[2]) <= positions[:, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def rows(tokens, seed, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(3)]


STACKED = {  # how to view K or V of a layer
    "layers first": ((2, LAYERS, BATCH, HEADS, SLOTS, DIM), lambda x, role, layer: x[role][layer]),
    "batch first": ((2, BATCH, LAYERS, HEADS, SLOTS, DIM), lambda x, role, layer: x[role][:, layer]),
    "K beside V": ((LAYERS, BATCH, HEADS, SLOTS, 2, DIM), lambda x, role, layer: x[layer, :, :, :, role]),
}


@pytest.fixture
def made(monkeypatch):
    """A list with an item for each dense cache that is compressed."""
    items, compress = [], attached._compress
    monkeypatch.setattr(attached, "_compress", lambda *given: items.append(1) or compress(*given))
    return items


def compiled(**how):
    options = {"key_sparsity": 0.0, "value_sparsity": 0.0, "window": 4, "strict": True}
    return torch.compile(step, backend="mustafar", options=options, **how)


@pytest.mark.parametrize(("shape", "view"), STACKED.values(), ids=STACKED)
def test_views_of_one_tensor_that_are_made_anew_at_each_step_keep_their_state(shape, view, made):
    stacked, twin, fast = torch.zeros(shape), torch.zeros(shape), compiled()
    for at, tokens in [(0, 7), *((i, 1) for i in range(7, 14))]:
        positions = torch.arange(at, at + tokens)
        for layer in range(LAYERS):
            given = rows(tokens, 100 * at + layer)
            out, expected = (
                run(*given, *(view(x, role, layer) for role in range(2)), positions)
                for run, x in ((fast if tokens == 1 else step, stacked), (step, twin))
            )
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(stacked, twin)
    assert len(made) == 2 * LAYERS, "K and V of each layer are compressed once"
    assert cache_stats([view(stacked, role, 0) for role in range(2)]).compressed_tensors == 2


def test_a_foreign_write_into_one_view_is_noticed_through_another(made):
    (shape, view), fast = STACKED["layers first"], compiled()
    stacked = torch.zeros(shape)
    step(*rows(7, 0), *(view(stacked, role, 0) for role in range(2)), torch.arange(7))
    for at in range(7, 10):
        if at == 9:
            stacked[0, 0, :, :, 3] = 5.0
        twin, given, position = stacked.clone(), rows(1, at), torch.tensor([at])
        out = fast(*given, *(view(stacked, role, 0) for role in range(2)), position)
        expected = step(*given, *(view(twin, role, 0) for role in range(2)), position)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert len(made) == 2 + 2


def test_states_of_views_that_overlap_do_not_gather():
    keys, values = (torch.zeros(4, HEADS, SLOTS, DIM) for _ in range(2))
    step(*rows(7, 0, batch=4), keys, values, torch.arange(7))
    fast = compiled(dynamic=False)
    for at, batch in zip(range(7, 13), (2, 3, 4, 2, 3, 4), strict=True):
        twins, given, position = [keys.clone(), values.clone()], rows(1, at, batch), torch.tensor([at])
        out = fast(*given, keys[:batch], values[:batch], position)
        expected = step(*given, *(x[:batch] for x in twins), position)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for cache in (keys, values):
        assert list(attached.States.beside(cache).by_place) == [place_of(cache)], "the latest"


def reads_besides(query, key, value, keys, values, positions, besides):
    return step(query, key, value, keys, values, positions) + besides.sum()


def test_a_cache_that_the_graph_also_reads_as_another_input_stays_dense():
    fast = torch.compile(reads_besides, backend="mustafar", options={"window": 4})
    caches, twins = ([torch.zeros(BATCH, HEADS, SLOTS, DIM) for _ in range(2)] for _ in range(2))
    reason = "it writes an input that shares memory with another one"
    with explain() as report, pytest.warns(UserWarning, match=reason):
        results = [fast(*rows(1, at), *caches, torch.tensor([at]), caches[0][:, :, 3:9]) for at in range(6)]
    for at, out in enumerate(results):
        expected = reads_besides(*rows(1, at), *twins, torch.tensor([at]), twins[0][:, :, 3:9])
        torch.testing.assert_close(out, expected)
    assert not report.matched
    assert [entry.reason.split(": ")[-1] for entry in report.missed] == [reason]


def elements(x):
    """Where the elements of a small tensor lie in its storage."""
    indices = itertools.product(*map(range, x.shape))
    return {x.storage_offset() + sum(i * s for i, s in zip(index, x.stride(), strict=True)) for index in indices}


@st.composite
def views(draw):
    sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    strides = draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)))
    return torch.zeros(100).as_strided(sizes, strides, draw(st.integers(0, 30)))


@given(views(), views())
def test_overlap_is_that_of_elements(a, b):
    assert overlap(place_of(a), place_of(b)) == bool(elements(a) & elements(b))


@pytest.fixture
def inference_mode():
    with torch.inference_mode():
        yield


def steps(fast, caches, twins, places, seed=0):
    """Compares a step at each of ``places`` with what it gives on ``twins``."""
    for at in places:
        given, position = rows(1, seed + at), torch.tensor([at])
        expected = step(*given, *twins, position)
        torch.testing.assert_close(fast(*given, *caches, position), expected, rtol=1e-5, atol=1e-6)


WRITES = {
    "a view": lambda cache: cache[:, :, 1].fill_(3),
    "itself": lambda cache: cache.zero_(),
    "a view of another shape": lambda cache: cache.view(-1)[5:9].add_(1),
}


@pytest.mark.parametrize("write", mostly_at_night(WRITES, 1))
def test_writes_into_a_cache_of_inference_mode_are_noticed(write, made, inference_mode):
    """torch counts none in such a tensor, so it becomes one of those in which it does."""
    fast, (caches, twins) = compiled(), ([torch.zeros(BATCH, HEADS, SLOTS, DIM) for _ in range(2)] for _ in range(2))
    steps(fast, caches, twins, range(4))
    assert len(made) == 2
    for keys, _ in (caches, twins):
        WRITES[write](keys)
    steps(fast, caches, twins, range(4, 8))
    assert len(made) == 3
    with explain() as report:
        steps(fast, [torch.zeros(BATCH, HEADS, SLOTS, DIM) for _ in range(2)], [x.zero_() for x in twins], range(4))
    assert report.graphs == 0, "there is a graph for caches that come from inference mode, and one for the others"


def test_caches_of_inference_mode_that_share_memory(made, inference_mode):
    """Nothing counts what is written through the other tensor, so it stays dense, or is compressed at each step."""
    whole, twins = torch.zeros(2, BATCH, HEADS, SLOTS, DIM), [torch.zeros(BATCH, HEADS, SLOTS, DIM) for _ in range(2)]
    options = {"key_sparsity": 0.0, "value_sparsity": 0.0, "window": 4}
    with explain() as report:
        steps(torch.compile(step, backend="mustafar", options=options), list(whole), twins, range(2))
    assert [entry.reason for entry in report.missed] == [
        "the cache was made in inference mode and shares its memory with other tensors, so that writes through them "
        "could not be noticed; make it under torch.no_grad()"
    ]
    torch._dynamo.reset()
    fast, alone = compiled(), [torch.zeros(BATCH, HEADS, SLOTS, DIM) for _ in range(4)]
    steps(fast, alone[:2], alone[2:], range(1))
    with pytest.warns(UserWarning, match="compressed anew at each step"):
        steps(fast, list(whole), twins, range(2, 4))
    for keys in (whole[0], twins[0]):
        keys.add_(1)
    steps(fast, list(whole), twins, range(2, 4), seed=10)
    assert len(made) == 2 + 8
