"""The strategies of the accuracy study against a loop that decodes token by token and prunes what leaves the window."""

from __future__ import annotations

import json
import math

import pytest
import torch

from accuracy import eviction, teacher_forced
from accuracy.case import Case
from accuracy.eviction import HeavyHitters
from accuracy.strategies import KEYS, QUERIES, VALUES, Choice
from accuracy.window import Window
from models import hf_model
from mustafar_compile.lowering.format import kept_elements
from reference import kept_count

HEADS, GROUP, TOKENS, HEAD_DIM, PROMPT = 2, 3, 75, 16, 41


def strongest(score, kept: int) -> list[int]:
    """Indices of the largest numbers of a list, the first of equal ones first."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:kept]


class Loop:
    """A cache of one layer, decoded query by query. q: [Hq, T, D], k and v: [H, T, D]; float64."""

    def __init__(self, case: Case, q, k, v, prompt: int) -> None:
        self.case, self.q, self.k, self.v, self.prompt = case, q, k, v, prompt
        self.stored = {"key": k.clone(), "value": v.clone()}
        self.pruned = {"key": 0, "value": 0}
        self.weights = torch.zeros(q.shape[0], TOKENS, TOKENS, dtype=q.dtype)

    def run(self):
        """The results of all queries, [Hq, T, D]."""
        results = [self.query(t) for t in range(self.prompt)]
        if self.prompt:
            self.prune("key", self.prompt - 1)
            self.prune("value", self.prompt - 1)
        for t in range(self.prompt, TOKENS):
            self.prune("key", t)
            self.attend(t)  # values are ranked with the weights of this step
            self.prune("value", t)
            results.append(self.query(t))
        return torch.stack(results, 1)

    def attend(self, t: int) -> None:
        for head in range(self.q.shape[0]):
            scores = self.stored["key"][head // GROUP, : t + 1] @ self.q[head, t] / math.sqrt(HEAD_DIM)
            self.weights[head, t, : t + 1] = scores.softmax(0)

    def query(self, t: int):
        self.attend(t)
        return torch.stack([w[t] @ self.stored["value"][head // GROUP] for head, w in enumerate(self.weights)])

    def prune(self, role: str, t: int) -> None:
        block = self.case.group if getattr(self.case, f"{role}_strategy").startswith("channel") else 1
        end = max(t + 1 - self.case.window, 0) // block * block
        for head in range(HEADS):
            keep = self.kept(role, head, self.pruned[role], end, t)
            rows = self.stored[role][head, self.pruned[role] : end]
            mask = torch.tensor(keep, dtype=torch.bool).reshape(rows.shape)
            mask[: max(self.case.sinks - self.pruned[role], 0)] = True
            rows[~mask] = 0
        self.pruned[role] = end

    def kept(self, role: str, head: int, start: int, end: int, t: int) -> list:
        case, x = self.case, (self.k if role == "key" else self.v)[head].float()
        strategy = getattr(case, f"{role}_strategy")
        share = 1 - getattr(case, f"{role}_sparsity")
        heads, latest = range(head * GROUP, head * GROUP + GROUP), range(max(t + 1 - QUERIES, 0), t + 1)
        kept = min(math.ceil(math.ceil(share * HEAD_DIM - 1e-9) / case.rounding) * case.rounding, HEAD_DIM)
        if strategy == "magnitude":
            return [self.row(x[p].abs(), kept) for p in range(start, end)]
        if strategy == "output-aware":
            w = sum(self.q[h, j].abs() for h in heads for j in latest).float()
            return [self.row(x[p].abs() * w, kept) for p in range(start, end)]
        if strategy == "think":
            score = x[: self.prompt].square().mean(0)
            if role == "key":
                seen = range(max(self.prompt - QUERIES, 0), self.prompt)
                score = score * torch.stack([self.q[h, j].float() for h in heads for j in seen]).square().mean(0)
            return [self.row(score, kept)] * (end - start)
        score = x.abs()
        if strategy == "channel-output-aware":
            score = score * sum(self.weights[h, j] for h in heads for j in latest).float()[:, None]
        keep = torch.zeros(end - start, HEAD_DIM, dtype=torch.bool)
        kept = min(math.ceil(math.ceil(share * case.group - 1e-9) / case.rounding) * case.rounding, case.group)
        for first in range(start, end, case.group):
            for channel in range(HEAD_DIM):
                for i in strongest(score[first : first + case.group, channel].tolist(), kept):
                    keep[first - start + i, channel] = True
        return keep.tolist()

    @staticmethod
    def row(score, kept: int) -> list[bool]:
        chosen = strongest(score.tolist(), kept)
        return [channel in chosen for channel in range(HEAD_DIM)]


CASES = [
    *({"key_strategy": name, "key_sparsity": 0.5} for name in KEYS),
    *({"value_strategy": name, "value_sparsity": 0.7} for name in VALUES),
    {
        "key_strategy": "output-aware",
        "key_sparsity": 0.7,
        "value_strategy": "channel-output-aware",
        "value_sparsity": 0.5,
    },
    {"key_sparsity": 0.3, "value_sparsity": 0.6, "sinks": 3, "window": 1},
]


@pytest.mark.parametrize("prompt", [0, 1, PROMPT])
@pytest.mark.parametrize("changes", CASES, ids=lambda changes: " ".join(map(str, changes.values())))
def test_teacher_forced_is_the_loop(changes, prompt, monkeypatch):
    monkeypatch.setattr(teacher_forced, "_QUERIES", 16)
    case = Case(**{"window": 8, "rounding": 2, "group": 8} | changes)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, TOKENS, HEAD_DIM, dtype=torch.float64, generator=generator)
        for heads in (HEADS * GROUP, HEADS, HEADS)
    )
    if "think" in changes.values() and not prompt:
        with pytest.raises(ValueError, match="a prompt of 0 tokens"):
            case.attend(q, k, v, HEAD_DIM**-0.5, prompt, torch.float32)
        return
    expected = Loop(case, q[0], k[0].float().double(), v[0].float().double(), prompt).run()
    actual = case.attend(q, k, v, HEAD_DIM**-0.5, prompt, torch.float32)
    torch.testing.assert_close(actual[0], expected, rtol=1e-4, atol=1e-6)
    dense = teacher_forced.attention(q, k, v, k, v, 1, HEAD_DIM**-0.5)
    assert (actual - dense).abs().max() > 1e-2  # pruning matters here


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.6, 0.7, 0.8])
@pytest.mark.parametrize("size", [32, 64, 80, 128])
def test_rows_keep_as_many_as_the_product_does(size, sparsity):
    assert Choice(sparsity).of(size) == kept_elements(size, sparsity) == kept_count(size, sparsity)
    assert Choice(sparsity, rounding=1).of(size) == math.ceil(round((1 - sparsity) * size, 6))


def test_bytes():
    """Against hand-made sums for 128 channels, dense 256 bytes."""
    assert Case().row_share(128) == 1
    assert Case(key_sparsity=0.5, value_sparsity=0.7).row_share(128) == (144 + 96) / 512
    assert Case(key_sparsity=0.5, value_sparsity=0.5, key_strategy="think").row_share(128) == (128 + 144) / 512
    channels = Case(value_strategy="channel-magnitude", value_sparsity=0.5)
    assert channels.row_share(128) == (256 + 144) / 512
    assert Case(key_code="int8", value_code="int8").row_share(128) == 260 / 512
    assert Case(key_sparsity=0.5, value_sparsity=0.5).stored_share(128, 480) == pytest.approx((48 + 432 * 0.5625) / 480)
    assert Case().stored_share(128, 480) == 1


def test_tokens_leave_and_the_others_are_pruned():
    """In a prompt everything is there; who leaves later is told by weights over what is pruned."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, TOKENS, HEAD_DIM, generator=generator) for heads in (HEADS * GROUP, HEADS, HEADS))
    changes = {"key_sparsity": 0.5, "value_sparsity": 0.5, "window": 8}
    case, scale = Case(token_share=0.4, **changes), HEAD_DIM**-0.5
    assert case.heavy_hitters(TOKENS, PROMPT) == HeavyHitters(30, 15, 32, PROMPT)
    actual = case.attend(q, k, v, scale, PROMPT, torch.float32)
    dense = teacher_forced.attention(q, k, v, k, v, 1, scale)
    torch.testing.assert_close(actual[:, :, :PROMPT], dense[:, :, :PROMPT])
    stored = case.stored(q, k, v, scale, PROMPT, torch.float32)
    window = Window(8, prompt=PROMPT)
    expected = eviction.attention(q, k, v, *stored, window, scale, HeavyHitters(30, 15, 32, PROMPT))
    torch.testing.assert_close(actual, expected)
    pruned = Case(**changes).attend(q, k, v, scale, PROMPT, torch.float32)
    assert (actual - pruned)[:, :, PROMPT:].abs().max() > 1e-2
    all_stay = eviction.attention(q, k, v, *stored, window, scale, HeavyHitters(TOKENS, 15, 32, PROMPT))
    torch.testing.assert_close(all_stay, pruned)
    assert case.stored_share(128, 480) == pytest.approx((24 + (192 - 24) * 0.5625) / 480)


def test_a_budget_is_a_case_for_each_layer(tmp_path):
    int8, pruned = {"sparsity": 0.0, "code": "int8"}, {"sparsity": 0.5, "code": "int4"}
    path = tmp_path / "mine.json"
    layers = {"1": {"key": pruned, "value": int8}, "0": {"key": int8, "value": pruned}}
    path.write_text(json.dumps({"version": 1, "layers": layers}))
    first, second = Case(budget=str(path), window=8).by_layer(2)
    assert first == Case(key_code="int8", value_code="int4 growing", value_sparsity=0.5, window=8)
    assert second == Case(value_code="int8", key_code="int4 growing", key_sparsity=0.5, window=8)
    assert Case(budget=str(path)).row_share(128) == (130 + 51) / 512
    assert Case(budget=str(path)).label == "budget mine"
    with pytest.raises(ValueError, match=r"layers \[0, 1\]; the model has 3"):
        Case(budget=str(path)).by_layer(3)
    path.write_text(json.dumps({"version": 1, "layers": layers | {"1": {"key": [pruned, int8], "value": int8}}}))
    with pytest.raises(ValueError, match="a budget by KV head, which the study has no cases for"):
        Case(budget=str(path)).by_layer(2)
    path.write_text(json.dumps({"version": 1, "layers": layers}))
    model = hf_model(head_dim=32)
    ids = torch.randint(1, 100, (60,), generator=torch.Generator().manual_seed(0))
    hidden = Case(budget=str(path), window=8).hidden_states(model, ids)
    with teacher_forced.attending(model, by_turns(first, second)):
        torch.testing.assert_close(teacher_forced.hidden_states(model, ids), hidden, rtol=0, atol=0)


def by_turns(*cases):
    """Attention of one case after the other."""
    turns = list(cases)
    return lambda *args: turns.pop(0).attend(*args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_strategy": "channel-magnitude"}, "key_strategy='channel-magnitude'.*magnitude, output-aware, think"),
        ({"value_code": "int5"}, "value_code='int5'.*none, fp8"),
        ({"key_sparsity": 1}, r"key_sparsity=1 .*\[0, 1\)"),
        ({"value_strategy": "channel-magnitude", "value_code": "int8"}, "value_code='int8'.*along channels"),
        ({"window": 0}, "window=0"),
    ],
)
def test_what_no_case_may_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Case(**changes)
