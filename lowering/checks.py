"""What a decode step asserts on the device, since no host looks at positions and masks."""

from __future__ import annotations

OUT_OF_PLACE = (
    "mustafar: tokens are written outside a compressed KV cache, or behind a gap in it; accepted are positions from 0 "
    "to the number of tokens written, as far as the cache has room"
)

UNWRITTEN = (
    "mustafar: the attention mask admits tokens of a compressed static KV cache that were never written; accepted are "
    "masks that leave out all that lies behind the newest token"
)
