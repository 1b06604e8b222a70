"""What holds of pictures and of sound alike."""

from __future__ import annotations

from mlxkv.bench.acceptance.report import Skip, holds
from mlxkv.bench.acceptance.subject import Messages, Subject, figures

NAMES = {"image": "pictures", "audio": "sound"}
N_TOP = 8
ALIKE = 1e-4
"""Log-probabilities that differ by no more do so by the order of sums."""


def needs(subject: Subject, kind: str) -> None:
    """Raise Skip for a model that takes no such thing."""
    if kind not in subject.kinds:
        raise Skip(f"the model takes no {NAMES[kind]}")
    subject.needs_chat()


def different(subject: Subject, one: Messages, other: Messages) -> str:
    """Raise Failed if two media give the same likely next tokens."""
    likely = [
        {top.token: top.logprob or 0.0 for top in made.logprobs[0].top}
        for made in (subject.ask(each, max_tokens=1, logprobs=N_TOP) for each in (one, other))
    ]
    if likely[0].keys() != likely[1].keys():
        return "other tokens are likely"
    change = max(abs(likely[0][token] - likely[1][token]) for token in likely[0])
    holds(change > ALIKE, "the answer does not depend on it: it is not looked at")
    return f"log-probabilities change by {change:.2g}"


def shown_again(subject: Subject, first: Messages, then: Messages) -> str:
    """Raise Failed if anything of a medium is computed for a second question about it."""
    rows = subject.llm.budget.rows
    before = rows.n_encoded
    stats = subject.reuses(first, then, max_tokens=1).stats
    n_rows, n = stats.image_tokens + stats.audio_tokens, rows.n_encoded - before
    holds(stats.restored_tokens > n_rows > 0, f"{n_rows} tokens are its own, {figures(stats)}")
    holds(n == 1, f"the encoder ran {n} times for 2 questions")
    return figures(stats)
