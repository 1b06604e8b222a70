"""What happens where a sequence is as long as its context: it stops, or its oldest tokens go.

Invariants:
- What is dropped follows from the sequence's length alone, not from how it came about: a chat that
  is shifted while it is answered, and the same chat sent anew as one long prompt, are shortened to
  the same tokens, whose KV is then restored.
- Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from mlxkv.errors import Hint, UsageError


def most_kept(context: int) -> int:
    """How many leading tokens may be kept: half, and as many as leave two to drop from."""
    return min(context // 2, context - 2)


def n_dropped(n_tokens: int, n_kept: int, context: int) -> int:
    """Tokens that go from behind the kept ones of a sequence, so that at least one more fits.

    They go in blocks of half of what is not kept: after the first of them a quarter to a half of
    the context is free, and the place where the rest begins stays as the sequence grows.

    Args:
        n_tokens: length of the whole sequence, what was dropped before included.
        n_kept: leading tokens that stay, at most `most_kept`.
        context: tokens that may be held.
    """
    if n_tokens < context:
        return 0
    assert 0 <= n_kept <= most_kept(context)
    block = (context - n_kept) // 2
    return block * ((n_tokens - context) // block + 1)


class Bound:
    """The context of one answer.

    Args:
        context: tokens that prompt and answer may have together.
        count_kept: how many leading tokens a shift keeps; asked for when that is needed. None
            for an answer that stops at the context.
        whole: spans of the sequence that stay or go whole, in order and apart: media.
    """

    def __init__(
        self,
        context: int,
        count_kept: Callable[[], int] | None = None,
        whole: Sequence[tuple[int, int]] = (),
    ):
        self.context, self._count_kept = context, count_kept
        # With the token before and the one behind: they begin and end a medium.
        self._whole = [(max(0, start - 1), stop + 1) for start, stop in whole]

    @property
    def shifts(self) -> bool:
        """Whether the oldest tokens go, and the answer goes on."""
        return self._count_kept is not None

    @cached_property
    def n_kept(self) -> int:
        """Leading tokens that stay.

        Raises:
            UsageError: they leave no room for what follows.
        """
        n = 0 if self._count_kept is None else self._count_kept()
        n = next((start for start, stop in self._whole if start < n < stop), n)
        if n > (most := most_kept(self.context)):
            raise UsageError(
                f"a context shift would keep {n:,} tokens (the system prompt and saved KV "
                f"included) and the context of {self.context:,} allows {max(0, most):,}: keep "
                f"less, or use a larger context",
                hints=[Hint("overflow", "stop")],
            )
        return n

    def n_dropped(self, n_tokens: int) -> int:
        """Tokens that are dropped of a whole sequence of `n_tokens` before one more comes."""
        if not self.shifts or n_tokens < self.context:
            return 0
        n = n_dropped(n_tokens, self.n_kept, self.context)
        cut = self.n_kept + n
        return next((stop for start, stop in self._whole if start < cut < stop), cut) - self.n_kept

    def remaining(self, tokens: Sequence[int]) -> list[int]:
        """What stays of a whole sequence."""
        n = self.n_dropped(len(tokens))
        return [*tokens[: self.n_kept], *tokens[self.n_kept + n :]] if n else list(tokens)

    def limit(self, n_tokens: int, max_tokens: int | None) -> int | None:
        """Tokens that an answer to `n_tokens` may have; None for no limit."""
        if self.shifts:
            return max_tokens
        room = self.context - n_tokens
        return room if max_tokens is None else min(room, max_tokens)

    def check(self, n_tokens: int, max_tokens: int | None, keep: int) -> None:
        """Refuse what could not be shifted, before anything is computed.

        Counting what is kept takes a rendering: only a long prompt or `keep` asks for it.

        Raises:
            UsageError: see `n_kept`.
        """
        fits = max_tokens is not None and n_tokens + max_tokens <= self.context
        if self.shifts and not fits and max(n_tokens, keep) > most_kept(self.context):
            _ = self.n_kept
