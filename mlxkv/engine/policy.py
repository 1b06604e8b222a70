"""Which of several prompts the next chunk is of, and how long it is. Decides, and does nothing.

- Of two chunks one is the oldest prompt's, so that none waits for ever, and the other is of the one
  that ends soonest, so that a short one does not wait for all of a long one.
- Nothing is computed twice: a prompt that begins like one that is being computed waits until that
  one is past what they share.
- While answers are written a chunk is as long as it may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """A prompt that is to be computed.

    Args:
        tokens: all of it, as a list.
        n_computed: tokens of it that are held; None for one that was not begun.
        owner: whose pages it shares; None for one that shares nothing.
    """

    tokens: list[int]
    n_computed: int | None = None
    owner: str | None = None

    @property
    def n_left(self) -> int:
        """Tokens that are not computed, as far as is known."""
        return len(self.tokens) - (self.n_computed or 0)


class Pace:
    """How many tokens make a chunk that takes as long as it may.

    A chunk costs something by itself (a packed SmolLM2 on the CPU: 0.17 s, and 4 ms a token), so
    that no speed in tokens says how many: the last chunk's length is brought nearer to it.

    Args:
        allowed_s: how long a chunk may take.
        least: tokens of the shortest; also of the first.
        most: tokens of the longest.
    """

    def __init__(self, allowed_s: float, least: int, most: int):
        self._allowed_s, self._least, self._most = allowed_s, least, most
        self.n_tokens = least

    def record(self, n_tokens: int, seconds: float) -> None:
        """What a chunk took. A short one within its time says nothing of longer ones."""
        if n_tokens < self.n_tokens and seconds <= self._allowed_s:
            return
        fits = n_tokens * self._allowed_s / max(seconds, 1e-9)
        longest = min(2 * max(n_tokens, self.n_tokens), self._most)
        self.n_tokens = round(max(self._least, min(fits, longest)))


def next_prompt(prompts: Sequence[PendingPrompt], for_oldest: bool) -> int:
    """The index of the prompt whose chunk is next.

    Args:
        prompts: at least one, the oldest first.
        for_oldest: whether it is the oldest one's turn.
    """
    if for_oldest:
        return 0
    free = [i for i, prompt in enumerate(prompts) if not _waits(prompt, prompts)]
    return min(free, key=lambda i: prompts[i].n_left, default=0)


def _waits(prompt: PendingPrompt, prompts: Sequence[PendingPrompt]) -> bool:
    """Whether another one is computing what this one begins with."""
    if prompt.n_computed is not None or prompt.owner is None:
        return False
    return any(
        other.owner == prompt.owner
        and other.n_computed is not None
        and _share(prompt.tokens, other.tokens, other.n_computed + 1)
        for other in prompts
    )


def _share(a: list[int], b: list[int], n: int) -> bool:
    """Whether two sequences have their first `n` tokens, at least, in common."""
    return min(len(a), len(b)) >= n and a[:n] == b[:n]
