"""Every private torch or transformers name that the project uses, in rooms by what it belongs to.

Each name is probed when this package is imported (by the backend, never by ``import mustafar_compile``), so that an
unsupported version fails with one clear error and not deep inside a compilation.
"""

from . import distributed, dynamo, inductor, memory, models, symbols, tensors, tracing

__all__ = ["distributed", "dynamo", "inductor", "memory", "models", "symbols", "tensors", "tracing"]
