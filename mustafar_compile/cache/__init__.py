"""The compressed cache as a user holds it: a tensor, what torch's ops do with it, and state tied to dense caches."""

from . import dispatch  # noqa: F401  (gives CompressedKV what it does with torch's ops)
from .saving import restored_cache

__all__ = ["restored_cache"]  # where caches that were saved by version 0.1 look for it
