"""How far the tokens of a growing cache reach, and which of its handles still hold. All of it is known on the host."""

from __future__ import annotations


class Branch:
    """The tokens of a growing cache, shared by its handles.

    Extending a cropped handle overwrites what stood behind it. The tokens go on in a new branch then, and handles of
    the old one hold as far as it was left as it is.
    """

    def __init__(self, tokens: int) -> None:
        self.start = self.tokens = tokens
        self.successor: Branch | None = None

    def standing(self) -> int:
        """How many of the tokens are still in the buffers."""
        branch, tokens = self, self.tokens
        while branch.successor is not None:
            branch = branch.successor
            tokens = min(tokens, branch.start)
        return tokens

    def cut(self, tokens: int) -> Branch:
        """The branch in which the cache goes on behind its first ``tokens``."""
        newest = self
        while newest.successor is not None:
            newest = newest.successor
        newest.successor = Branch(tokens)
        return newest.successor
