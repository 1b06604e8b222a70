"""Computes tokens of a conversation's next prompt in its own caches."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

from mlxkv.engine.ahead.next_turn import STALL_S
from mlxkv.engine.ahead.tally import Ahead, Records
from mlxkv.engine.queue.policy import Pace
from mlxkv.engine.runtime import Runtime
from mlxkv.errors import MlxkvError
from mlxkv.generation.session import Session
from mlxkv.kv.types import STEP
from mlxkv.memory.needs import MIN_CHUNK


def computing(
    llm: Runtime, session: Session, tokens: Sequence[int], limit: int, records: Records
) -> Generator[None, None, None]:
    """Compute a chunk a step; nothing where memory would have to be freed for it.

    Args:
        llm: the model.
        session: of the conversation; it holds what was computed, whenever this is closed.
        tokens: the beginning of the next prompt.
        limit: tokens to compute at most.
        records: where what is computed is noted.
    """
    if len(tokens) >= llm.context or not llm.budget.is_roomy(session, len(tokens), STEP):
        return
    n_restored = session.restore(tokens).n_tokens
    known = list(tokens[: session.resumable(tokens, min(len(tokens), n_restored + limit))])
    if len(known) <= n_restored:
        return
    pace, ahead = Pace(STALL_S, MIN_CHUNK, STEP), Ahead("", known, n_restored)
    steps = session.prefilling(known, lambda: pace.n_tokens)
    try:
        while True:
            held, started = session.n_held, time.perf_counter()
            try:
                next(steps)
            except (StopIteration, MlxkvError):
                return
            finally:
                ahead.stop, seconds = session.n_held, time.perf_counter() - started
                ahead.seconds += seconds
            pace.record(session.n_held - held, seconds)
            yield
    finally:
        steps.close()
        ahead.n_computed = ahead.stop - n_restored
        records.add(ahead)
