"""The context's end, stop texts, seeds, and memory beside the plan."""

from __future__ import annotations

from mlxkv.base.units import human_bytes
from mlxkv.bench.acceptance.report import Failed, Skip, holds
from mlxkv.bench.acceptance.subject import Subject, paragraphs
from mlxkv.errors import ContextExceeded
from mlxkv.generation.outputs import Stats
from mlxkv.kv.types import STEP
from mlxkv.llm.plan import plan
from mlxkv.memory.plan import Plan

STORY = "A story. Once upon a time there was a small house by the sea, and in that house"
N_LEFT = 24
"""Tokens that the context leaves to an answer here."""

HOT = 3.0
"""A temperature at which no model writes the same tokens under two seeds."""
SLACK_BYTES = 8 << 20
"""Beside the plan: buffers of a fixed size, and pages on their way to disk."""


def _n_prompt(subject: Subject) -> int:
    return len(subject.llm.encode(STORY))


def full(subject: Subject) -> str:
    """An answer ends where the context is full."""
    context = _n_prompt(subject) + N_LEFT
    made = subject.ask(STORY, context=context, ignore_eos=True, max_tokens=4 * N_LEFT)
    stats = made.stats
    holds(made.finish_reason == "length", f"it ended with {made.finish_reason!r}")
    used = stats.prompt_tokens + stats.generated_tokens
    holds(used in (context, context + 1), f"it ended at {used} tokens of {context}")
    return f"{used} of {context} tokens"


def too_long(subject: Subject) -> str:
    """A prompt that is longer than the context is refused, or cut if that is asked for."""
    context = max(_n_prompt(subject) - 4, 4)
    try:
        subject.ask(STORY, context=context)
    except ContextExceeded:
        made = subject.ask(STORY, context=context, truncate=True, max_tokens=2)
        n = made.stats.prompt_tokens
        holds(n < context, f"{n} tokens are left of the prompt, and the context has {context}")
        return f"cut to {n} tokens"
    raise Failed(f"a prompt of {_n_prompt(subject)} tokens was taken at a context of {context}")


def shifts(subject: Subject) -> str:
    """With `overflow="shift"` the oldest tokens are dropped and the answer goes on."""
    context = _n_prompt(subject) + N_LEFT
    made = subject.ask(
        STORY, context=context, overflow="shift", ignore_eos=True, max_tokens=2 * N_LEFT
    )
    n = made.stats.generated_tokens
    holds(n == 2 * N_LEFT, f"it ended after {n} tokens: {made.finish_reason!r}")
    holds(made.stats.shifted_tokens > 0, "no token was dropped")
    return f"{made.stats.shifted_tokens} tokens dropped"


def stops(subject: Subject) -> str:
    """An answer ends before a stop text, which is not part of it."""
    subject.ask(STORY, max_tokens=1)  # the prompt of both answers below is restored
    whole = subject.ask(STORY)
    middle = whole.text[len(whole.text) // 2 :][:4]
    if not middle.strip():
        raise Skip("the answer is too short to be stopped")
    made = subject.ask(STORY, stop=[middle])
    expected = whole.text[: whole.text.index(middle)]
    holds(made.finish_reason == "stop", f"it ended with {made.finish_reason!r}")
    holds(made.text == expected, f"{made.text[-20:]!r} at its end, and not {expected[-20:]!r}")
    return f"before {middle!r}"


def seeds(subject: Subject) -> str:
    """A seed gives the same answer again, another seed another one."""
    subject.ask(STORY, max_tokens=1)
    first, again, other = (
        subject.ask(STORY, temperature=HOT, seed=seed, max_tokens=N_LEFT).tokens
        for seed in (7, 7, 8)
    )
    holds(first == again, "the same seed gave another answer")
    holds(first != other, "another seed gave the same answer")
    return f"{len(first)} tokens twice, and others"


def memory(subject: Subject) -> str:
    """Peak memory of an answer to a long prompt is within the plan."""
    llm = subject.llm
    n = min(4 * STEP, llm.context // 2)
    tokens = llm.encode_text(paragraphs(subject, n))[:n]
    stats = llm.generate(tokens, max_tokens=8).stats
    holds(stats.computed_tokens > n - STEP, f"{stats.restored_tokens} tokens were there before")
    return within(subject, stats, plan(llm.path, context=n + 8, kv_type=llm.kv_type))


def within(subject: Subject, stats: Stats, planned: Plan) -> str:
    """A note on the peak memory of an answer.

    Raises:
        Failed: it is more than was planned, what is kept of earlier answers added.
    """
    now = subject.llm.stats()
    kept = subject.llm.budget.rows.nbytes + now.pages_ram_bytes + subject.other_bytes
    # What is loaded, and not what the plan's files say: encoders of earlier answers stay.
    own = planned.total_bytes - planned.weights_bytes + now.weights_bytes
    assert stats.peak_bytes is not None
    peak = human_bytes(stats.peak_bytes)
    holds(stats.peak_bytes <= now.limit_bytes, f"{peak}, past the limit of this machine")
    note = (
        f"{peak} at {planned.context:,} tokens; {human_bytes(own)} planned, and "
        f"{human_bytes(kept)} kept of other answers"
    )
    holds(stats.peak_bytes <= own + kept + SLACK_BYTES, note)
    return note
