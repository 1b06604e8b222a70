"""Times of one answer, and why part of a cached prefix had to be recomputed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxkv.generation.outputs import Miss, Stats
from mlxkv.generation.session import Restored
from mlxkv.prefix.match import WORTH

AROUND = 12
"""Tokens shown on either side of where a prompt left what was held."""

TextOf = Callable[[Sequence[int], int | None], str]
"""(tokens, where they stand in the prompt; None for others) -> what they say."""


class Clock:
    """When an answer began, and when its first and last tokens came."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first: float | None = None
        self.last = self.start

    def tick(self) -> None:
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last

    def stats(
        self,
        prompt: Sequence[int],
        restored: Restored,
        n_generated: int,
        kv_bytes: int,
        text_of: TextOf,
    ) -> Stats:
        first = self.last if self.first is None else self.first
        n_prompt = len(prompt)
        return Stats(
            prompt_tokens=n_prompt,
            restored_tokens=restored.n_tokens,
            restored_ram_tokens=restored.n_tokens - restored.ssd_tokens,
            restored_ssd_tokens=restored.ssd_tokens,
            computed_tokens=n_prompt - restored.n_tokens,
            generated_tokens=n_generated,
            prefill_s=first - self.start,
            decode_s=self.last - first,
            first_token_s=first - self.start,
            peak_bytes=mx.get_peak_memory(),
            kv_bytes=kv_bytes,
            diverged_at=restored.diverged_at(n_prompt),
            miss=explain_miss(prompt, restored, first - self.start, text_of),
        )


def explain_miss(
    prompt: Sequence[int],
    restored: Restored,
    prefill_s: float,
    text_of: TextOf,
) -> Miss | None:
    """Why not more of a prompt was restored; None where there was no more to restore.

    A few tokens of what is shared are computed again as a rule, and are no miss.
    """
    token = restored.diverged_at(len(prompt))
    n_lost = min(restored.n_known, len(prompt) - 1) - restored.n_tokens
    reason = "diverged"
    n_dropped = min(restored.shared, len(prompt) - 1) - restored.n_tokens
    if n_dropped > WORTH:
        reason = "state" if restored.states else "dropped"
        token, n_lost = restored.n_tokens, n_dropped
    if token is None or n_lost <= 0:
        return None

    start = max(0, token - AROUND)
    before = text_of(prompt[start:token], start)
    held = text_of(restored.held[:AROUND], None)
    return Miss(
        reason,
        token,
        f"{before}|{held}" if reason == "diverged" else "",
        f"{before}|{text_of(prompt[token : token + AROUND], token)}",
        n_lost,
        prefill_s * n_lost / (len(prompt) - restored.n_tokens),
    )
