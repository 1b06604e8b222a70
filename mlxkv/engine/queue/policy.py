"""Chooses the prompt of the next prefill chunk, and the chunk's length. Pure planning.

- Every other chunk is for the oldest prompt, so that none waits for ever; the others are for the
  prompt with the fewest tokens left, so that a short prompt does not wait for a long one.
- No shared prefix is computed twice: a prompt waits while another one computes their common prefix.
- While answers are decoded, a chunk may take a limited time (`Paces`), least where one key's prompt
  holds another's answers up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

STALL_STEPS = 3, 1
"""Steps of running answers that a chunk of a prompt may take as long as: where all are of the
prompt's own key, and where some are of another: what one key asks for, others wait little for;"""
STALL_S = 0.1, 0.5
"""and seconds that it may take at least and at most."""
FALLS, RISES = 1 / 4, 1 / 32
"""How fast the known time of a step follows shorter and longer ones. What held a few up, work of
other processes or tracing a first step, is not what a step takes; and while prompts come one after
the other none is timed for long."""
MAX_PROMPTS = 4
"""Prompts that are prefilled in turns; the others wait."""


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """A prompt with tokens left to compute.

    Args:
        tokens: the whole prompt.
        n_computed: tokens whose KV is held; None before prefill begins.
        owner: owner of its pages; None if it shares none.
    """

    tokens: list[int]
    n_computed: int | None = None
    owner: str | None = None

    @property
    def n_left(self) -> int:
        """Tokens left to compute; before prefill all, although some may be restored."""
        return len(self.tokens) - (self.n_computed or 0)


class Pace:
    """Adapts the length of chunks to the time that one may take.

    A chunk has a fixed cost (a quantized SmolLM2 on the CPU: 0.17 s, and 4 ms a token), so the
    length is not a constant speed times the time: each chunk's time corrects the next one's length.

    Args:
        allowed_s: how long a chunk may take.
        least: tokens of the shortest chunk, and of the first.
        most: tokens of the longest chunk.
    """

    def __init__(self, allowed_s: float, least: int, most: int):
        self.allowed_s, self._least, self._most = allowed_s, least, most
        self.n_tokens = least

    def record(self, n_tokens: int, seconds: float) -> None:
        """Adapt to a chunk's time. A fast chunk shorter than `n_tokens` changes nothing, nor does
        one of no tokens."""
        if n_tokens <= 0 or (n_tokens < self.n_tokens and seconds <= self.allowed_s):
            return
        fits = n_tokens * self.allowed_s / max(seconds, 1e-9)
        longest = min(2 * max(n_tokens, self.n_tokens), self._most)
        self.n_tokens = round(max(self._least, min(fits, longest)))


class Paces:
    """How long a chunk may be while answers are decoded: as long as some of their steps take.

    There is a pace for each kind of prompt: where tokens are scored, each takes several times as
    long; where another key's answers wait, a chunk may take less.

    Args:
        least, most: as of `Pace`.
    """

    def __init__(self, least: int, most: int):
        kinds = itertools.product((False, True), repeat=2)
        self._paces = {kind: Pace(STALL_S[1], least, most) for kind in kinds}
        self._step_s: float | None = None

    def stepped(self, seconds: float) -> None:
        """Note how long a step of the answers took that no prompt delayed."""
        before = seconds if self._step_s is None else self._step_s
        self._step_s = before + (seconds - before) * (FALLS if seconds < before else RISES)
        least, most = STALL_S
        for (_, others_wait), pace in self._paces.items():
            steps_s = STALL_STEPS[others_wait] * self._step_s
            pace.allowed_s = min(max(least, steps_s), most)

    def of(self, is_scored: bool, *, others_wait: bool = False) -> Pace:
        """The pace of a prompt, and whether answers of another key wait for its chunks."""
        return self._paces[is_scored, others_wait]


def next_prompt(prompts: Sequence[PendingPrompt], for_oldest: bool) -> int:
    """The index of the prompt whose chunk is next.

    Args:
        prompts: at least one, oldest first.
        for_oldest: whether this chunk is for the oldest.
    """
    if for_oldest:
        return 0
    free = [i for i, prompt in enumerate(prompts) if not _waits(prompt, prompts)]
    return min(free, key=lambda i: prompts[i].n_left, default=0)


def _waits(prompt: PendingPrompt, prompts: Sequence[PendingPrompt]) -> bool:
    """Whether another prompt is computing the prefix that both share."""
    if prompt.n_computed is not None or prompt.owner is None:
        return False
    for other in prompts:
        if other.owner == prompt.owner and other.n_computed is not None:
            n = other.n_computed + 1
            if min(len(prompt.tokens), len(other.tokens)) >= n and (
                prompt.tokens[:n] == other.tokens[:n]
            ):
                return True
    return False
