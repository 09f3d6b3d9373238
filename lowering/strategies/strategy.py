"""What a strategy is asked: how the elements of rows rank, and what it has to remember for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..buffers import Buffer

if TYPE_CHECKING:
    from ..format import Format


class Strategy:
    """One way to choose the ``kept`` elements of each row. This one: by magnitude alone, and it remembers nothing.

    A row is one token of one KV head, [D]. Ranking is by ``|x| * weight``, rounded to the dtype of the cache; ties go
    to the lower channel, and NaN ranks on top. The weights, a number for each channel, are all that pruning, in kernels
    as elsewhere, knows of a strategy. They may be on any scale; negative ones count as zero (see ``as_weights``). Rows
    rank by magnitude where weights are zero throughout or not finite, and where they are None.

    State is a list of small tensors beside the rows of a cache, as ``buffers`` names them. They are zero in a cache
    that nothing was written to, and copied, selected, moved and saved with it. A cache may be rewound by
    ``MAX_QUERY_TOKENS`` tokens at any time, so what later tokens left in the state must not matter then.

    All methods are plain PyTorch that Inductor compiles, and read nothing on the host. Shapes: B batch, H KV heads, Hq
    query heads, a multiple of H. Numbers of tokens are int64 [B].
    """

    roles: tuple[str, ...] = ("key", "value")
    """What it may be chosen for."""

    wants_queries = False
    """Whether queries say more about keys than their magnitudes do."""

    step_kernel: str | None = None
    """An op that does what ``of_step`` and then ``remember`` do, in one launch on a GPU: (query, position, *state)."""

    by_channel = False
    """Whether a row is a channel of a block of 32 tokens, and not a token: see ``by_channel.ByChannel``."""

    wants_attention = False
    """By channel: whether attention weights say more about values than their magnitudes do."""

    def buffers(self, format: Format) -> tuple[Buffer, ...]:
        """The state of a cache of ``format``."""
        return ()

    def of_prompt(
        self, dense: Tensor, tokens: Tensor, format: Format, queries: Tensor | None, past: Sequence[Tensor] | None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Weights [B, H, 1, D] for all rows that are pruned now, and the state from then on. B and H may be 1.

        dense: [B, H, S, D], of which ``tokens`` are written. queries: [B, Hq, n, D] of the last ``n`` of them, as
        attention sees them; None where they are unknown, and for values. past: the state of the cache that was
        continued, if any; it is read only.
        """
        return None, []

    def of_step(self, query: Tensor, position: Tensor, format: Format, state: Sequence[Tensor]) -> Tensor | None:
        """Weights [B, H, L or 1, D], as above: by the i-th, the row ranks that leaves for token ``position + i``.

        query: [B, Hq, L, D], of the tokens from ``position`` on. Leaves the state as it is.
        """
        return None

    def of_text(self, x: Tensor, format: Format, queries: Tensor | None) -> Tensor | None:
        """Weights [B, H, T or 1, D] of the rows [B, H, T, D] of a text that came in token by token, each as it left.

        queries: of keys, [B, Hq, T, D]. Of a strategy that looks at a prompt, the text is the prompt.
        """
        return self.of_prompt(x, x.new_full((x.shape[0],), x.shape[2], dtype=torch.int64), format, queries, None)[0]

    def remember(self, query: Tensor, position: Tensor, format: Format, state: Sequence[Tensor]) -> None:
        """Take a step into the state, in place, once its tokens are in the cache. Arguments as of ``of_step``."""
