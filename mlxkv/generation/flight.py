"""The rows of a decoder, and the step that is in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxkv.errors import CheckpointError, Hint, KVCacheFull, UsageError, contained
from mlxkv.generation.session import Session
from mlxkv.sampling.logprobs import Told, tell
from mlxkv.sampling.sampler import AnswerIds, Recent, Sampler

if TYPE_CHECKING:
    import numpy as np

    from mlxkv.generation.drafts.drafts import Drafts, LookAhead

Allowed = Callable[[Sequence[int]], "np.ndarray | None"]
"""The answer's tokens so far -> which may come next, bool `[V]` with at least one; None: any."""


@dataclass(eq=False, slots=True)
class Row:
    """One sequence of a decoder, from the end of its prompt on.

    Args:
        session: whose caches hold the prompt.
        logits: `[1, V]` after it, as `Session.prefill` gives them.
        sampler: chooses; its own, for it holds random state.
        max_tokens: after which the row leaves by itself; None for as many as are asked for.
        allowed: what a grammar allows next. Called once for each token, when all before it have
            been given out. The model's step is in flight all the same, only the choice is late.
        n_logprobs: how many of the likeliest tokens to tell beside the chosen one; None for none,
            and no log-probabilities at all.
        told: tokens whose log-probabilities are told as well, behind the likeliest.
        answered: tokens that the answer had before this row, for penalties that count them.
        ends: tokens that must not come among the first `min_tokens`.
        min_tokens: of this row.
        drafts: proposes its next tokens; None for one token a step.
        look_ahead: what `allowed` will say of tokens to come; without it a row with `allowed` has
            no drafts.

    Attributes:
        tokens: the answer's, given out so far.
    """

    session: Session
    logits: mx.array
    sampler: Sampler
    max_tokens: int | None = None
    allowed: Allowed | None = None
    n_logprobs: int | None = None
    answered: Sequence[int] = ()
    ends: tuple[int, ...] = ()
    min_tokens: int = 0
    drafts: Drafts | None = None
    look_ahead: LookAhead | None = None
    told: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list, init=False)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a step gave a row.

    Args:
        row: the row.
        token: the next token of its answer; None where it failed.
        error: why; the row has left the decoder.
        logprob: the token's log-probability, of the model's own distribution.
        top: the likeliest tokens and theirs, the likeliest first; behind them the row's `told`.
    """

    row: Row
    token: int | None
    error: Exception | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was chosen and not given out yet: see `RowResult`, and `Flight.heard`."""

    token: int | None
    error: Exception | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    hidden: mx.array | None = None


@dataclass(eq=False, slots=True)
class Lane:
    """A row inside the decoder.

    Args:
        row: the row.
        before: the last tokens before the answer, for its repeat penalty; None where it has none.
        answer: the answer's, for penalties that count them; None where it has none.
        recent: what its penalties look at next.
        barred: what must not come next.
        n_drawn: tokens chosen, given out or not.
        ready: `[1]`, a token that is given out and not yet fed, where no flight has it.
        queue: chosen together, to be given out; the last may be an error.
        roomy: (step of 256 tokens, tokens at once, bytes of windows that are moved for them,
            whether they have room), as last asked.
        error: what its mask raised.
        full: why it cannot be fed any more, once its last token is given out.
        gone: it has left.
    """

    row: Row
    before: list[int] | None
    answer: AnswerIds | None = None
    recent: Recent | None = None
    barred: tuple[int, ...] = ()
    n_drawn: int = 0
    ready: mx.array | None = None
    queue: deque[Drawn] = field(default_factory=deque)
    roomy: tuple[int, int, int, bool] = (-1, 0, 0, False)
    error: Exception | None = None
    full: KVCacheFull | None = None
    gone: bool = False

    @property
    def at_limit(self) -> bool:
        return self.row.max_tokens is not None and self.n_drawn >= self.row.max_tokens


@dataclass(slots=True)
class Flight:
    """A step's choices, computed or about to be.

    Args:
        lanes: in the order of the logits' rows.
        logits: `[B, V]`.
        soundness: `[B]`, finite where the logits are sound.
        normalizer: `[B, 1]` of all rows; None unless all ask for log-probabilities.
        parts: rows that are chosen, and their tokens `[n]`.
        tokens: `[B]`; None until the masked rows' are chosen.
        stuck: masked rows for which nothing is allowed.
        told: what log-probabilities are told, where a row asks.
        hidden: `[B, 1, E]`, what the logits were made of, where a row hears it.
    """

    lanes: list[Lane]
    logits: mx.array
    soundness: mx.array
    normalizer: mx.array | None
    parts: list[tuple[list[int], mx.array]]
    tokens: mx.array | None = None
    stuck: set[int] = field(default_factory=set)
    told: Told | None = None
    hidden: mx.array | None = None

    def heard(self, i: int, lane: Lane) -> mx.array | None:
        """The hidden state `[1, 1, E]` that a lane's token was chosen from, where it hears it."""
        return self.hidden[i : i + 1] if self.hidden is not None and hears(lane) else None

    @property
    def arrays(self) -> list[mx.array]:
        """What to compute."""
        found = [self.logits, self.soundness, *(tokens for _, tokens in self.parts)]
        if self.tokens is not None:
            found.append(self.tokens)
        return found if self.told is None else [*found, *self.told.arrays]


def hears(lane: Lane) -> bool:
    """Whether a row's drafts are made of hidden states."""
    return lane.row.drafts is not None and lane.row.drafts.hears


def settle(flight: Flight) -> mx.array:
    """Bring the tokens of all parts in order, and tell log-probabilities of them."""
    rows = [i for part, _ in flight.parts for i in part]
    found = [tokens for _, tokens in flight.parts]
    tokens = found[0] if len(found) == 1 else mx.concatenate(found)
    if rows != sorted(rows):
        import numpy as np

        tokens = tokens[mx.array(np.argsort(rows).astype(np.uint32))]
    flight.tokens = tokens
    asked = [lane.row.n_logprobs for lane in flight.lanes]
    also = {i: lane.row.told for i, lane in enumerate(flight.lanes) if lane.row.told}
    flight.told = tell(flight.logits, tokens, asked, flight.normalizer, also)
    return tokens


def last_n(sampler: Sampler) -> int:
    """How many tokens its repeat penalty looks at."""
    return int(sampler.params.repeat_last_n or 0) if sampler.needs_recent else 0


def history(lane: Lane, draft: Sequence[int]) -> Recent | None:
    """What a row's penalties look at behind its tokens and a draft, all of them known."""
    if lane.before is None and lane.answer is None:
        return None
    known, answer, tokens = [], None, lane.row.tokens
    if lane.before is not None:
        n = last_n(lane.row.sampler)
        known = [*lane.before, *tokens[-n:], *draft][-n:]
    if lane.answer is not None:
        import numpy as np

        answer = lane.answer.first(tokens, len(tokens))
        answer = np.concatenate([answer, np.array(draft, np.uint32)])
    return Recent(known, answer=answer)


def error_of(sound: bool, stuck: bool) -> Exception | None:
    """Why no token can be chosen, if none can."""
    if not sound:
        return CheckpointError(
            "the model's logits are not numbers: its weights are damaged, or overflow in "
            "this dtype",
            hints=[Hint("dtype", "float32")],
        )
    return UsageError("no token is allowed to come next") if stuck else None


def mask_of(flight: Flight, i: int, lane: Lane) -> np.ndarray | None:
    """What may come next in a row; anything, in one that has left or fails by this.

    Args:
        i: the row's place in the flight, stuck where nothing may come.
    """
    if lane.gone or lane.row.allowed is None:
        return None
    try:
        mask = lane.row.allowed(lane.row.tokens)
    except BaseException as error:  # the caller's own; the other rows go on
        lane.error = contained(error)
        return None
    if mask is not None and not mask.any():
        flight.stuck.add(i)
        return None
    return mask
