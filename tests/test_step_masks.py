"""Masks of decode steps: none where they say no more than which tokens there are, and what dense attention gives."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from models import full_attention_layers, hf_model, prompt
from mustafar_compile.backend import mustafar
from mustafar_compile.lowering import ops
from nightly import at_night

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

aten = torch.ops.aten
SLOTS, TOKENS, WINDOW = 23, 9, 4
DENSE = {"key_sparsity": 0.0, "value_sparsity": 0.0, "window": WINDOW, "raise_errors": True}


class Watched:
    """A backend that runs graphs as they are. graphs: those that were rewritten."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, example_inputs, **_):
        self.graphs.append(gm.graph)
        return gm.forward

    def compile(self, function, **options):
        return torch.compile(function, backend=functools.partial(mustafar, options=DENSE | options, inner=self))

    @property
    def masks(self):
        """The mask of each decode step of a layer, in the latest graph."""
        steps = self.graphs[-1].find_nodes(op="call_function", target=ops.decode_attention)
        assert steps
        return [node.args[8] for node in steps]


# ----------------------------------------------------------------------------------------------------- what is left out


def counted(keys, tokens, counter, other):
    return keys <= tokens.view(-1, 1) + counter


LEFT_OUT = {  # of the slots, the numbers of the tokens, the counter of the cache and another one that counts on alike
    "up to its own": counted,
    "swapped": lambda keys, tokens, counter, other: (tokens + counter).view(-1, 1) >= keys,
    "less": lambda keys, tokens, counter, other: keys < (tokens + counter).view(-1, 1) + 1,
    "moved alike": lambda keys, tokens, counter, other: keys + 1 <= (tokens + counter).view(-1, 1) + 1,
    "repeated": lambda *given: counted(*given)[None, None].expand(2, 1, -1, -1),
    "of another counter": lambda keys, tokens, counter, other: counted(keys, tokens, other, counter),
}
STAYS = {
    "less than its own": lambda keys, tokens, counter, other: keys < (tokens + counter).view(-1, 1),
    "a token more": lambda keys, tokens, counter, other: keys <= (tokens + counter).view(-1, 1) - 1,
    "sliding": lambda *given: counted(*given) & (given[0] > (given[1] + given[2]).view(-1, 1) - 6),
    "columns": lambda *given: counted(*given) & (given[0] != 2),
    "columns alone": lambda keys, tokens, counter, other: (keys < counter + len(tokens)).expand(len(tokens), -1),
    "of a number that stays": lambda keys, tokens, counter, other: counted(keys, tokens, other * 1, counter),
    "of two numbers": lambda keys, tokens, counter, other: counted(keys, tokens + 0 * other, counter, other),
}


def step_under(mask_of):
    def step(query, key, value, keys, values, counter, other):
        tokens = torch.arange(query.shape[2])
        mask = mask_of(torch.arange(SLOTS), tokens, counter, other)
        places = tokens + counter
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
        counter.add_(query.shape[2])
        other.add_(query.shape[2])
        return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)

    return step


def run_step(step, tokens):
    """A step of so many tokens on top of TOKENS."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, heads, SLOTS, 8, generator=generator) for heads in (4, 2, 2)]
    caches = [F.pad(x[:, :, :TOKENS], (0, 0, 0, SLOTS - TOKENS)) for x in rows[1:]]
    new = [x[:, :, TOKENS : TOKENS + tokens] for x in rows]
    return step(*new, *caches, torch.tensor([TOKENS]), torch.tensor([TOKENS]))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", LEFT_OUT | STAYS)
def test_what_is_left_out_of_a_static_cache(name, tokens):
    watched, step = Watched(), step_under((LEFT_OUT | STAYS)[name])
    actual = run_step(watched.compile(step), tokens)
    torch.testing.assert_close(actual, run_step(step, tokens))
    of_one = name == "columns alone" and tokens == 1  # whose columns are those up to its own
    assert [mask is None for mask in watched.masks] == [name in LEFT_OUT or of_one]


def test_layers_that_hold_different_numbers_of_tokens_are_an_error():
    step = Watched().compile(step_under(LEFT_OUT["of another counter"]))
    key = torch.randn(2, 2, 1, 8)
    caches = torch.zeros(2, 2, 2, SLOTS, 8)
    with pytest.raises(RuntimeError, match="hold different numbers of tokens"):
        step(key.repeat(1, 2, 1, 1), key, key, *caches, torch.tensor([4]), torch.tensor([3]))


BY_DAY, AT_NIGHT = [("llama", True), ("gemma3_text", False)], ["mistral", "qwen3"]


@pytest.mark.parametrize(
    ("family", "static"),
    [*BY_DAY, *at_night([("llama", False), ("gemma3_text", True), *((name, True) for name in AT_NIGHT)])],
)
def test_a_step_of_an_unpadded_batch_makes_no_mask(family, static):
    """Nor does one of a cache that grows, as far as the caller gives no mask."""
    from transformers import DynamicCache, StaticCache

    def steps(model, call):
        cache = StaticCache(model.config, max_cache_len=SLOTS) if static else DynamicCache(config=model.config)
        model(prompt()["input_ids"], past_key_values=cache)
        return [call(torch.tensor([[token], [3]]), past_key_values=cache).logits for token in (5, 6)]

    model, watched = hf_model(family), Watched()
    actual = steps(model, watched.compile(model))
    torch.testing.assert_close(actual, steps(model, model))
    assert watched.masks == [None] * full_attention_layers(model)
    if family == "llama":
        assert not any(node.target is aten.le.Tensor for node in watched.graphs[-1].nodes)


def test_a_mask_that_stays_is_made_once_and_not_repeated():
    from transformers import StaticCache

    def steps(model, call):
        cache = StaticCache(model.config, max_cache_len=SLOTS)
        model(**prompt(padded=True), past_key_values=cache)
        mask = F.pad(prompt(padded=True)["attention_mask"], (0, 1), value=1)
        return call(torch.tensor([[5], [3]]), attention_mask=mask, past_key_values=cache).logits

    model, watched = hf_model(), Watched()
    torch.testing.assert_close(steps(model, watched.compile(model)), steps(model, model))
    (mask,) = set(watched.masks)
    assert mask.target is not aten.expand.default
