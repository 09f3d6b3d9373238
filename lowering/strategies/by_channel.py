"""What a strategy is asked whose rows are channels: how the tokens of a block rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .strategy import Strategy

if TYPE_CHECKING:
    from ..format import Format

WeightsOf = Callable[[Tensor], Tensor]
"""Tokens [B, L, n] -> the weights with which each of the latest L tokens attends to them, [B, H, L, n] float32."""


class ByChannel(Strategy):
    """One way to choose ``kept`` of the 32 tokens of a block, in each channel. This one: by magnitude alone.

    Ranking is by ``|x| * weight``, as of any ``Strategy``, with one weight for each token. They may be on any scale:
    that of a block is brought to 1 before they are used. Where all are zero, the block ranks by magnitude. Attention
    weights are summed over the query heads of a KV head.
    """

    by_channel = True
    roles = ("value",)

    def of_prompt(
        self,
        dense: Tensor,
        tokens: Tensor,
        format: Format,
        attention: Tensor | None,
        past: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Weights [B, H, S] of all tokens for the blocks that are pruned now, and the state from then on.

        dense: [B, H, S, D], of which ``tokens`` [B] are written. attention: weights [B, H, n, S] of the last ``n`` of
        them; None where they are unknown. What was seen before a prompt does not count, so ``past`` has no part.
        """
        return None, []

    def observe(self, query: Tensor, weights_of: WeightsOf, format: Format, state: Sequence[Tensor]) -> None:
        """Take into the state, in place, what the latest tokens ``query`` [B, L] attend to."""

    def of_block(self, first: Tensor, format: Format, state: Sequence[Tensor]) -> Tensor | None:
        """Weights [B, H, 32] of the block that begins with the token ``first`` [B, 1] and leaves the window now.

        It is among the tokens that the ring of the window holds.
        """
        return None

    def forget(self, token: Tensor, where: Tensor, state: Sequence[Tensor]) -> None:
        """Take what is known of queries at ``token`` [B, n] out of the state, in place, where so (boolean [B, n])."""
