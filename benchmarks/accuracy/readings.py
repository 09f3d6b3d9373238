"""What a model is measured on: texts, and prompts with a right answer. Each gives a row of figures for a case."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import teacher_forced
from .case import Case
from .tasks import Prompt

BLOCK = 64  # tokens, the loss of which is one figure: neighbours hang together, so noise is told from blocks
DIVERGENCE_EVERY = 8  # tokens
_POOLED = 8  # tokens
Row = dict[str, Any]

Way = Callable[[Any, Tensor, int, Case], Tensor]
"""Model, tokens [T], how many of them come at once, case -> what the model's head turns into logits, [T, width]."""


def in_one_forward(model: Any, ids: Tensor, prompt: int, case: Case) -> Tensor:
    """The teacher-forced way."""
    return case.hidden_states(model, ids, prompt)


class Text:
    """A text [T], the first ``prompt`` tokens of which come at once, and what the dense model says of the others."""

    def __init__(self, model: Any, ids: Tensor, prompt: int) -> None:
        self.model, self.ids, self.prompt = model, ids, prompt
        self.losses, self.probabilities = self._said(teacher_forced.hidden_states(model, ids))

    def _said(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Nats for each token that is generated; the distribution of every eighth of them."""
        hidden, ids = hidden[self.prompt :], self.ids[self.prompt :]
        probabilities = teacher_forced.log_probabilities(self.model, hidden[::DIVERGENCE_EVERY])
        return teacher_forced.losses(self.model, ids, hidden), probabilities

    def row(self, case: Case, way: Way = in_one_forward) -> Row:
        """tokens: of the text. dense: mean nats a token. over_dense: how many more. blocks: the same for each
        ``BLOCK`` tokens. kl: mean divergence from the dense model's distribution, in nats."""
        losses, probabilities = self._said(way(self.model, self.ids, self.prompt, case))
        more = losses - self.losses
        kl = F.kl_div(probabilities, self.probabilities, reduction="none", log_target=True).sum(-1)
        blocks = [block.mean().item() for block in more.split(BLOCK) if len(block) == BLOCK or len(more) < BLOCK]
        return {
            "tokens": len(self.ids),
            "dense": self.losses.mean().item(),
            "over_dense": more.mean().item(),
            "kl": kl.mean().item(),
            "blocks": [round(block, 6) for block in blocks],
        }


class Questions:
    """Prompts with an answer each that stands far back in them. The text of a prompt comes at once."""

    def __init__(self, model: Any, prompts: Sequence[Prompt]) -> None:
        self.model, self.prompts = model, prompts

    def row(self, case: Case, way: Way = in_one_forward) -> Row:
        """tokens: mean of a prompt. score: mean share of the parts of an answer each token of which would be the first
        choice. nats: of a whole answer, mean. scores, answers: the same for each prompt."""
        scores, answers = zip(*(self._said(prompt, case, way) for prompt in self.prompts), strict=True)
        means = {"tokens": statistics.fmean(len(prompt.ids) for prompt in self.prompts)}
        means |= {"score": statistics.fmean(scores), "nats": statistics.fmean(answers)}
        return means | {"scores": list(scores), "answers": [round(nats, 5) for nats in answers]}

    def _said(self, prompt: Prompt, case: Case, way: Way) -> tuple[float, float]:
        ids = prompt.ids.to(self.model.device)
        length = sum(map(len, prompt.answers))
        hidden = way(self.model, ids, len(prompt.text), case)[-length - 1 : -1]
        said = teacher_forced.log_probabilities(self.model, hidden)
        right = (said.argmax(-1) == ids[-length:]).split([len(part) for part in prompt.answers])
        nats = -said.gather(1, ids[-length:, None]).sum().item()
        return statistics.fmean(float(part.all()) for part in right), nats


class Layers:
    """Keys and values of some layers of the dense model, which reads a text [T]."""

    def __init__(self, model: Any, ids: Tensor, prompt: int, numbers: Sequence[int]) -> None:
        self.model, self.ids, self.prompt, self.numbers = model, ids, prompt, list(numbers)

    def row(self, case: Case, way: Way = in_one_forward) -> Row:
        """key_error, value_error: norm of what is stored less what is exact over the norm of the latter, mean over
        layers. For the dense case keys, values: magnitudes of the first head by channel, the largest of each
        ``_POOLED`` tokens, [layers, T / _POOLED, D]; layers: their numbers."""
        found: list[tuple[Tensor, Tensor]] = []
        errors: list[list[float]] = []
        by_layer = case.by_layer(self.model.config.num_hidden_layers)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            found.append((k, v))
            if len(found) - 1 in self.numbers:
                stored = by_layer[len(found) - 1].stored(q, k, v, scale, self.prompt)
                errors.append([_relative(x, exact) for x, exact in zip(stored, (k, v), strict=True)])
            return teacher_forced.attention(q, k, v, k, v, 1, scale)

        with teacher_forced.attending(self.model, attend):
            teacher_forced.hidden_states(self.model, self.ids)
        keys, values = map(statistics.fmean, zip(*errors, strict=True))
        figures: Row = {"tokens": len(self.ids), "key_error": keys, "value_error": values}
        if case == Case():
            figures["layers"] = self.numbers
            for role, place in (("keys", 0), ("values", 1)):
                figures[role] = [_pooled(found[number][place][0, 0]) for number in self.numbers]
        return figures


def _relative(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).norm() / exact.norm()).item()


def _pooled(x: Tensor) -> list[list[float]]:
    """The largest magnitudes of each ``_POOLED`` rows of [T, D]."""
    pooled = F.max_pool1d(x.abs().float().T, _POOLED).T
    return [[round(number, 4) for number in row] for row in pooled.tolist()]
