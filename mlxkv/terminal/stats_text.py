"""The figures of an answer and of the memory, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlxkv.base.units import human_bytes

if TYPE_CHECKING:
    from mlxkv.generation.outputs import Stats
    from mlxkv.memory.types import KVUse, MemoryStats, Rung

FEW = 16
"""Tokens below which a miss is not shown: most questions diverge from the one before somewhere."""


def remarks(stats: Stats | None, context: Callable[[], int | None]) -> list[str]:
    """Remarks on an answer, a line each: what was dropped, and what was done to find memory."""
    if stats is None:
        return []
    lines = [describe_shift(stats, context())] if stats.shifted_tokens else []
    return lines + describe_rungs(stats.rungs)


def describe_rungs(rungs: Sequence[Rung]) -> list[str]:
    """What was done to find memory: the last rung of each kind, and how often."""
    times = Counter((rung.kind, rung.kv_type) for rung in rungs)
    last = {(rung.kind, rung.kv_type): rung for rung in rungs}
    return [
        f"{rung}" + (f", the last of {times[key]} times" if times[key] > 1 else "")
        for key, rung in last.items()
    ]


def describe_shift(stats: Stats, context: int | None) -> str:
    """How many tokens were dropped at the context, on one line."""
    n = stats.shifted_tokens
    size = "" if context is None else f" of {context:,} tokens"
    return f"the context{size} was full: the oldest {n:,} were dropped"


def stats_dict(stats: Stats) -> dict[str, Any]:
    """The figures of an answer, speeds included."""
    speeds = ("prefill_tps", "decode_tps", "tokens_a_pass")
    return asdict(stats) | {name: getattr(stats, name) for name in speeds}


def describe_stats(stats: Stats) -> str:
    """The figures of an answer, aligned, for people."""
    rows = [
        ("prompt", describe_prompt(stats)),
        ("answer", f"{stats.generated_tokens:,} tokens, {stats.decode_tps:.1f} tokens/s"),
        ("first token", f"{stats.first_token_s:.2f} s"),
    ]
    if (drafts := stats.drafts) is not None:
        by = ", ".join(f"{name} {right:,} of {n:,}" for name, (n, right) in drafts.by.items())
        rows.append(("drafts", f"{stats.tokens_a_pass:.2f} tokens a pass; right: {by}"))
    if stats.peak_bytes is not None:
        rows.append(("peak memory", human_bytes(stats.peak_bytes)))
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def describe_prompt(stats: Stats) -> str:
    """Where the prompt's KV came from, and why part of a prefix was recomputed, on one line."""
    sources = (
        (stats.restored_ram_tokens, "from RAM"),
        (stats.restored_ssd_tokens, "from SSD"),
        (stats.computed_tokens, f"computed at {stats.prefill_tps:.1f} tokens/s"),
    )
    parts = ", ".join(f"{n:,} {source}" for n, source in sources if n)
    text = f"{stats.prompt_tokens:,} tokens: {parts}"
    if stats.upper_tokens:
        text += f"; {stats.upper_tokens:,} of these in the adapter's layers alone"
    if stats.ahead_tokens:
        text += (
            f"; {stats.ahead_tokens:,} computed before (saved about {stats.ahead_saved_s:.1f} s)"
        )
    miss = stats.miss
    if miss is None or miss.n_tokens < FEW:
        return text
    if miss.reason == "state":
        why = f"the states before token {miss.token:,} were the last that are kept"
    elif miss.reason == "dropped":
        why = f"KV from token {miss.token:,} on was given up for lack of memory, or damaged"
    else:
        why = f"differs from token {miss.token:,} on: had {miss.held!r}, got {miss.prompt!r}"
    return f"{text}; {why} ({miss.n_tokens:,} tokens again, {miss.cost_s:.1f} s)"


def describe_memory(stats: MemoryStats) -> str:
    """Where the memory is, aligned, for people."""
    rows = [
        ("weights", human_bytes(stats.weights_bytes)),
        *([("draft model", human_bytes(stats.draft_bytes))] if stats.draft_bytes else []),
        ("KV now", _kv_text(stats.kv)),
        ("KV at start", _kv_text(stats.kv_start)),
        ("KV at most", _kv_text(stats.kv_most)),
        (
            "pages",
            f"{human_bytes(stats.pages_ram_bytes)} in RAM, {human_bytes(stats.pages_ssd_bytes)} on "
            "SSD",
        ),
        ("workspace", human_bytes(stats.workspace_bytes)),
        (
            "MLX",
            f"{human_bytes(stats.active_bytes)} active, {human_bytes(stats.cached_bytes)} cached, "
            f"{human_bytes(stats.peak_bytes)} at the peak",
        ),
        ("unexplained", human_bytes(max(0, stats.unexplained_bytes))),
        ("limit", human_bytes(stats.limit_bytes)),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def _kv_text(use: KVUse) -> str:
    return (
        f"{human_bytes(use.used_bytes)} used ({use.used_tokens:,} tokens), "
        f"{human_bytes(use.allocated_bytes)} allocated ({use.allocated_tokens:,})"
    )
