"""Strategies that users register: their rows in caches and kernels, torch's caches on disk, saved caches, refusals."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import fresh_cache

from cases import randn
from compilers import without_compiler
from models import TupleModel, run_steps
from mustafar_compile import CompressedKV, SavedCacheError, Settings, _compat, explain, register_strategy
from mustafar_compile.cache.tensor import restored
from mustafar_compile.lowering import ops
from mustafar_compile.lowering.format import Format
from mustafar_compile.lowering.strategies import STRATEGIES
from mustafar_compile.strategies import Buffer, ByChannel, Strategy
from nightly import at_night
from ramp import Ramp, ramp_weights
from reference import prune, pruned_cache
from test_fuzz_cache import saved_and_loaded

pytestmark = pytest.mark.usefixtures("no_grad")
WINDOW, SPARSITY = 2, 0.5


class Latest(Strategy):
    """Ranks by the magnitudes of the latest step's first query head; before there is any, by magnitude."""

    def buffers(self, format):
        return (Buffer("latest", ("batch", "heads", format.head_dim)),)

    def of_prompt(self, dense, tokens, format, queries, past):
        return None, [dense.new_zeros(dense.shape[0], dense.shape[1], format.head_dim)]

    def of_step(self, query, position, format, state):
        return state[0].unsqueeze(2)

    def remember(self, query, position, format, state):
        state[0].copy_(query[:, ::2, -1].abs())


@pytest.fixture
def registered():
    register_strategy("ramp", Ramp())
    register_strategy("latest", Latest())


def keys_of_steps(**options):
    """The keys that a compiled model has after a prompt and some steps, and those of the model as it is."""
    model, inputs = TupleModel(), [randn(2, count, 32, seed=count + i) for i, count in enumerate([11, *[1] * 8])]
    caches = {}

    def step(name, call):
        def called(x, past):
            out, caches[name] = call(x, past)
            return out, caches[name]

        return called

    run_steps(model, inputs, step("exact", model.step))
    with explain() as report:
        chosen = {"window": WINDOW, "key_sparsity": SPARSITY, "value_sparsity": 0.0, **options}
        run_steps(model, inputs, step("kept", torch.compile(model.step, backend="mustafar", options=chosen)))
    assert report.matched
    assert not report.missed
    return caches["kept"][0], caches["exact"][0]


def check_ramp(kept, exact):
    expected = pruned_cache(exact, SPARSITY, WINDOW, weights=ramp_weights(exact))
    assert torch.equal(kept.dense(), expected)


@pytest.mark.usefixtures("registered")
def test_without_state_every_row_ranks_by_its_weights():
    with without_compiler():
        check_ramp(*keys_of_steps(key_strategy="ramp"))


@pytest.mark.native
@pytest.mark.nightly
@pytest.mark.usefixtures("registered")
def test_kernels_rank_by_them_too():
    torch._dynamo.reset()
    check_ramp(*keys_of_steps(key_strategy="ramp"))


@pytest.mark.usefixtures("registered")
def test_state_is_what_the_step_before_remembered():
    x = randn(1, 2, 4, 16, seed=1)
    room = torch.nn.functional.pad(x, (0, 0, 0, 60))
    caches = [CompressedKV.from_dense(room, SPARSITY, WINDOW, 4, strategy="latest") for _ in range(2)]
    texts = [cache.format.encode() for cache in caches]
    expected, latest = [prune(x[:, :, :2], 8)], None
    for seed in range(2, 8):
        query, new = randn(1, 4, 1, 16, seed=seed), randn(1, 2, 1, 16, seed=-seed)
        ops.decode_attention(query, new, new, *(c.buffers for c in caches), *texts, None, None, None, 0.1)
        x = torch.cat([x, new], 2)
        leaving = x[:, :, -WINDOW - 1 : -WINDOW]
        expected.append(prune(leaving, 8, None if latest is None else latest.unsqueeze(2)))
        latest = query[:, ::2, 0].abs()
    for cache in (caches[0], saved_and_loaded(caches[0]), caches[1].clone()):
        assert torch.equal(cache.dense()[:, :, : x.shape[2] - WINDOW], torch.cat(expected, 2))
        assert torch.equal(cache.format.state_of(cache.buffers)[0], latest)


@pytest.mark.usefixtures("registered")
def test_a_saved_cache_asks_for_its_strategy():
    """Saved by a process that knew it, loaded by one that does not."""
    cache = CompressedKV.from_dense(randn(1, 1, 40, 16, seed=1), SPARSITY, WINDOW, strategy="ramp")
    _, (text, *held) = cache.__reduce_ex__(2)
    with pytest.raises(SavedCacheError, match=r"'gone' is unknown; accepted are magnitude, .*register_strategy"):
        restored(text.replace("ramp", "gone"), *held)


def test_traces_are_cached_where_all_code_is_ours(monkeypatch):
    seen = []
    enabled = _compat.inductor.functorch_config.enable_autograd_cache
    monkeypatch.setattr(
        _compat.inductor,
        "compile_fx",
        lambda gm, _: seen.append(_compat.inductor.functorch_config.enable_autograd_cache) or gm.forward,
    )
    for name in (None, "ramp"):
        if name:
            register_strategy(name, Ramp())
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1, backend="mustafar")(torch.ones(2))
    assert seen == [enabled, False]
    assert _compat.inductor.functorch_config.enable_autograd_cache == enabled


@pytest.mark.native
@pytest.mark.nightly
def test_a_changed_strategy_is_compiled_anew():
    """As in a new process, which finds on disk what an old one left."""
    x, kept = randn(1, 1, 40, 16, seed=1), []
    with fresh_cache():
        for scale in (1.0, -1.0):
            STRATEGIES["mine"] = Ramp(scale)
            text = Format.of(16, SPARSITY, WINDOW, "rows", strategy="mine").encode()
            torch._dynamo.reset()
            prompt = torch.compile(lambda x, text=text: ops.compress(x, x.new_tensor(40), text, 64), backend="mustafar")
            kept.append(ops.decompress(prompt(x), text, 40))
            assert torch.equal(kept[-1], ops.decompress(ops.compress(x, x.new_tensor(40), text, 64), text, 40))
    assert not torch.equal(*kept)


class Wrong(Strategy):
    def __init__(self, name="mine", dims=("batch", "heads", 4), roles=("key", "value"), weights=None, state=None):
        self.name, self.dims, self.roles, self.weights, self.state = name, dims, roles, weights, state

    def buffers(self, format):
        return (Buffer(self.name, self.dims),)

    def of_prompt(self, dense, tokens, format, queries, past):
        return self.weights, [dense.new_zeros(1, 1, 4) if self.state is None else self.state]


@pytest.mark.parametrize(
    ("name", "strategy", "error", "words"),
    [
        ("mine", Ramp, TypeError, "takes an instance of a subclass of .*; given is <class"),
        ("mine", "magnitude", TypeError, "given is 'magnitude'"),
        ("Mine", Ramp(), ValueError, "'Mine' is no name of a strategy; accepted are lower-case"),
        ("a,b=c", Ramp(), ValueError, "is no name of a strategy"),
        ("think", Ramp(), ValueError, "'think' is known already, as .*take another name"),
        ("mine", Wrong(roles=("queries",)), ValueError, r"the roles \('queries',\); accepted are 'key' and 'value'"),
        ("mine", Wrong(name="window"), ValueError, "cannot keep .*'window'.*none of bitmap, counts"),
        ("mine", Wrong(dims=("heads", 4)), ValueError, r"cannot keep .*accepted are dims \('batch', ...\)"),
        ("mine", Wrong(dims=("batch", "heads", "blocks")), ValueError, "cannot keep"),
    ],
)
def test_what_is_refused(name, strategy, error, words):
    before = dict(STRATEGIES)
    with pytest.raises(error, match=f"mustafar: .*{words}"):
        register_strategy(name, strategy)
    assert before == STRATEGIES


@pytest.mark.usefixtures("registered")
def test_a_name_stands_for_one_object():
    register_strategy("ramp", STRATEGIES["ramp"])
    with pytest.raises(ValueError, match="'ramp' is known already"):
        register_strategy("ramp", Ramp())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"weights": torch.ones(1, 1, 1, 8)}, r"weights of \[1, 1, 1, 8\]; accepted are \[1, 1, 1, 16\]"),
        ({"weights": torch.ones(1, 2, 1, 16)}, r"weights of \[1, 2, 1, 16\]"),
        ({"weights": torch.ones(16)}, r"weights of \[16\]"),
        ({"weights": torch.ones(1, 1, 40, 16)}, r"weights of \[1, 1, 40, 16\]"),
        ({"state": torch.ones(1, 1, 5)}, r"the state .*\(1, 1, 5\).*; by its buffers it is .*\(1, 1, 4\)"),
        ({"state": torch.ones(1, 1, 4).int()}, "the state .*int32"),
    ],
)
def test_answers_that_do_not_fit(answer, words):
    register_strategy("wrong", Wrong(**answer))
    with pytest.raises(ValueError, match=f"the strategy wrong gave {words}"):
        CompressedKV.from_dense(randn(1, 1, 40, 16, seed=1), SPARSITY, WINDOW, strategy="wrong")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, *at_night([1e-38, 3e38])])
def test_weights_that_say_nothing_are_ones(value):
    register_strategy("same", Wrong(weights=torch.full((1, 1, 1, 16), value)))
    x = randn(1, 1, 40, 16, seed=1)
    same, plain = (CompressedKV.from_dense(x, SPARSITY, WINDOW, strategy=name) for name in ("same", "magnitude"))
    assert torch.equal(same.dense(), plain.dense())


@pytest.mark.usefixtures("registered")
def test_roles_say_where_a_name_is_accepted():
    class ByBlock(ByChannel):
        pass

    register_strategy("by-block", ByBlock())
    assert Settings(value_strategy="by-block", key_strategy="ramp").strategies("value") == {"by-block"}
    with pytest.raises(ValueError, match=r"must be one of 'magnitude', 'output-aware', 'think', 'ramp', 'latest'$"):
        Settings(key_strategy="by-block")
