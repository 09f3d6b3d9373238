"""Random architectures under the compiler, and random sequences of operations on their live caches.

After every call each layer's attention equals its oracle, after every operation so does what the caches hold. To
compile takes longest, so an architecture is compiled once for all its runs; the test's number gives the architecture.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cases import seeds
from compilers import without_compiler
from live_caches import Shape
from live_models import OwnModel
from live_transformers import CACHES, TransformersModel
from mustafar_compile import CompressedKV, explain, register_strategy
from mustafar_compile.cache.attached import States, find_state
from mustafar_compile.cache.memory import place_of
from mustafar_compile.lowering import ops
from mustafar_compile.lowering.format import CODES
from nightly import mostly_at_night
from ramp import FIRST, RAMP
from test_fuzz_cache import TOLERANCE, saved_and_loaded

ARCHITECTURES = max(3, settings().max_examples // 20)
RUNS = min(20, settings().max_examples // 10)
STEPS = min(15, settings().max_examples // 2)
FORMS = (
    "cat", "index_put", "DynamicCache", "slice", "StaticCache", "cat to nothing", "where", "index_copy",
    "StaticCache of the caller",
)  # fmt: skip
MOST_TOKENS = 150
GROWING = {"cat", "DynamicCache", "cat to nothing"}
STRATEGIES = ("magnitude", "ramp")  # that rank each row by itself
REMEMBERING = ("first", *STRATEGIES)  # of growing caches; test_fuzz_cache.py has those of the package


@dataclass
class Architecture:
    """A model, and how it is compiled and used."""

    model: OwnModel | TransformersModel
    dynamic: bool | None
    largest_batch: int
    eager_prompts: bool
    inference: bool

    @classmethod
    def numbered(cls, number: int) -> Architecture:
        choose = random.Random(number)
        torch.manual_seed(number)
        form = FORMS[number % len(FORMS)]
        strategies = REMEMBERING if form in GROWING else STRATEGIES
        shape = Shape(
            heads=choose.choice([1, 1, 2, 3]),
            group=choose.choice([1, 2, 3, 5, 7]),
            key_dim=choose.choice([8, 16, 24, 40]),
            value_dim=choose.choice([8, 16, 32]),
            dtype=choose.choice(list(TOLERANCE)),
            key_sparsity=choose.choice([0.0, 0.5, 0.7]),
            value_sparsity=choose.choice([0.0, 0.5, 0.9]),
            window=choose.choice([1, 2, 5, 12, 20, 200]),
            key_code=choose.choice(CODES),
            value_code=choose.choice(CODES),
            key_strategy=choose.choice(strategies),
            value_strategy=choose.choice(strategies),
        )
        model = (TransformersModel if form in CACHES else OwnModel)(choose, shape, form)
        grows = model.room is None
        largest_batch, inference = choose.choice([1, 3, 4]), grows and choose.random() < 0.3
        architecture = cls(model, choose.choice([None, True]), largest_batch, choose.random() < 0.5, inference)
        if architecture.remembers:
            architecture.eager_prompts = False  # it is told by a compiled one
        return architecture

    @property
    def remembers(self) -> bool:
        """Whether a strategy does."""
        return "first" in (self.model.shape.key_strategy, self.model.shape.value_strategy)

    def compile(self) -> None:
        shape = self.model.shape
        register_strategy("ramp", RAMP)
        register_strategy("first", FIRST)
        names = [
            "window",
            *(f"{role}_{what}" for role in ("key", "value") for what in ("sparsity", "code", "strategy")),
        ]
        self.model.compile(options={name: getattr(shape, name) for name in names}, dynamic=self.dynamic)


class LiveModels(RuleBasedStateMachine):
    """missed: what was not compressed. What is compiled stays so for all runs, so the test tells at its end."""

    architecture: Architecture
    report: object
    missed: list[str]
    caches = Bundle("caches")

    def __init__(self) -> None:
        super().__init__()
        self.model, self.live = self.architecture.model, []

    def add(self, live):
        self.live.append(live)
        return live

    def call(self, live, count, seed, at=None, eager=False):
        at = live.tokens if at is None else at
        if at + count > (live.room or MOST_TOKENS):
            return
        results = self.model.call(live, count, at, seed, eager)
        if self.report.missed or (self.report.notices and not self.may_decompress()):
            self.missed.append(f"{count} tokens at {at} of {live.batch} rows:\n{self.report}")
        tolerance = TOLERANCE[self.model.shape.dtype]
        for actual, expected in results if not self.missed else ():
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    def may_decompress(self):
        """A step on a compressed static cache that is longer than the window."""
        return self.model.room is not None and self.model.shape.window < 16

    @rule(
        target=caches,
        batch=st.integers(1, 3),
        spare=st.sampled_from([0, 0, 1, 8, 25]),
        tokens=st.integers(1, 35),
        eager=st.booleans(),
        seed=seeds,
    )
    def prefill(self, batch, spare, tokens, eager, seed):
        live = self.add(self.model.fresh(min(batch, self.architecture.largest_batch), spare))
        self.call(live, tokens, seed, eager=eager and self.architecture.eager_prompts)
        return live

    @rule(live=caches, count=st.sampled_from([1, 1, 1, 2, 3, 5, 15, 16]), seed=seeds)
    def decode(self, live, count, seed):
        self.call(live, count, seed)

    @rule(live=caches, count=st.integers(17, 30), seed=seeds)
    def chunk(self, live, count, seed):
        self.call(live, count, seed)

    @rule(live=caches, count=st.sampled_from([1, 3, 20]), seed=seeds)
    def write_from_outside(self, live, count, seed):
        """Into a dense cache of the caller, by the model as it is."""
        if live.histories[0].of_caller:
            self.call(live, count, seed, eager=True)

    @rule(live=caches, by=st.sampled_from([1, 2, 3, 15, 16, 17, 40]), count=st.sampled_from([1, 2, 5, 20]), seed=seeds)
    def rewind(self, live, by, count, seed):
        # Of a cache that remembers and is cropped to nothing, the graph decides whether another prompt is the first.
        at = max(live.tokens - by, min(live.tokens, int(self.architecture.remembers)))
        if self.model.room is None and live.tokens:
            self.model.crop(live, at)
        self.call(live, count, seed, at)

    @rule(target=caches, live=caches, how=st.sampled_from([copy.deepcopy, saved_and_loaded]))
    def branch(self, live, how):
        return self.add(live.copied(how(live.cache)))

    @rule(
        live=caches,
        picks=st.lists(st.integers(0, 3), min_size=1, max_size=4),
        how=st.sampled_from(["select", "repeat", "reorder"]),
    )
    def select(self, live, picks, how):
        most = self.architecture.largest_batch // (live.batch if how == "repeat" else 1)
        if live.tokens:
            self.model.select(live, [i % live.batch for i in picks][: max(most, 1)], how)

    @rule(live=caches)
    def reset(self, live):
        self.model.reset(live)

    @invariant()
    def caches_hold_what_their_oracles_hold(self):
        for live in self.live if not self.missed else ():
            for pair, history in zip(self.model.tensors(live), live.histories, strict=False):
                for tensor, seen, exact in zip(pair, history.seen(), history.rows, strict=True):
                    self.check_held(tensor, history, seen, exact)

    def check_held(self, tensor, history, seen, exact):
        compressed = isinstance(tensor, CompressedKV)
        assert compressed == (history.held is not None and not history.of_caller)
        held = tensor.dense() if compressed else tensor if self.model.tokens_dim == 2 else tensor.transpose(1, 2)
        assert torch.equal(held[:, :, : history.tokens], seen if compressed else exact)
        if history.of_caller and history.held is not None:
            state = find_state(tensor)
            assert state is States.beside(tensor).by_place[place_of(tensor)]
            assert state.valid
            assert torch.equal(ops.decompress(state.buffers, state.format.encode(), history.tokens), seen)


@pytest.mark.parametrize("number", mostly_at_night(range(ARCHITECTURES), 1))
def test_live_caches_of_a_compiled_model(number):
    architecture = Architecture.numbered(number)
    with (
        torch.inference_mode(architecture.inference),
        torch.no_grad(),
        without_compiler(),
        torch._dynamo.config.patch(recompile_limit=100),
        explain() as report,
    ):
        architecture.compile()
        machine = type("Machine", (LiveModels,), {"architecture": architecture, "report": report, "missed": []})
        run_state_machine_as_test(machine, settings=settings(max_examples=RUNS, stateful_step_count=STEPS))
    assert not machine.missed, machine.missed[0]
