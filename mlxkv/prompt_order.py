"""Which of several prompts the next chunk is of. Decides, and does nothing.

- Of two chunks one is the oldest prompt's, so that none waits for ever, and the other is of the one
  that ends soonest, so that a short one does not wait for all of a long one.
- Nothing is computed twice: a prompt that begins like one that is being computed waits until that
  one is past what they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxkv.session import n_shared


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is to be computed.

    Args:
        tokens: all of it.
        n_computed: tokens of it that are held; None for one that was not begun.
        owner: whose pages it shares; None for one that shares nothing.
    """

    tokens: Sequence[int]
    n_computed: int | None = None
    owner: str | None = None

    @property
    def n_left(self) -> int:
        """Tokens that are not computed, as far as is known."""
        return len(self.tokens) - (self.n_computed or 0)


def next_prompt(prompts: Sequence[Prompt], for_oldest: bool) -> int:
    """The index of the prompt whose chunk is next.

    Args:
        prompts: at least one, the oldest first.
        for_oldest: whether it is the oldest one's turn.
    """
    if for_oldest:
        return 0
    free = [i for i, prompt in enumerate(prompts) if not _waits(prompt, prompts)]
    return min(free, key=lambda i: prompts[i].n_left, default=0)


def _waits(prompt: Prompt, prompts: Sequence[Prompt]) -> bool:
    """Whether another one is computing what this one begins with."""
    if prompt.n_computed is not None or prompt.owner is None:
        return False
    return any(
        other.owner == prompt.owner
        and other.n_computed is not None
        and other.n_computed < n_shared(prompt.tokens, other.tokens)
        for other in prompts
    )
