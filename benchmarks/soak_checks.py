"""What a soak may not show, and its figures; all of it from what was recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load_client import ANSWERED, FAILED, HUNG_UP, Answer, percentile

MiB = 1 << 20
GROWTH, GROWTH_BYTES = 0.05, 32 * MiB
"""Memory is flat where its floor in the last sixth of the time is above that in the baseline by no
more than this share and these bytes: allocators keep what was freed in buffers of many sizes."""
FLOOR = 10.0
"""Percentile that is the floor: what a step computes with comes and goes (a batch dequantizes whole
matrices, 0.2 GiB for SmolLM2's), what leaks stays."""
OWN_BYTES = 192 * MiB
"""What the process takes beside MLX when all is over, more than at the first request: modules that
were imported, traced steps, what malloc keeps of memory in pieces."""
UNBOOKED_BYTES = 16 * MiB
"""MLX's active memory beside weights and pages when all is over: a tokenizer's masks, constants."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's memory at a time, in bytes; `t_s` from the first request on.

    Args:
        rss: resident memory of the process.
        active, cached: of MLX's allocator.
        peak: what was active at most until then.
        weights, pages, kv: mlxkv's books; `kv` is allocated.
        room: of pages: a quarter of what the limit leaves beside the weights.
        running, queued: requests.
    """

    t_s: float
    rss: int
    active: int
    peak: int
    cached: int
    weights: int
    pages: int
    kv: int
    room: int
    running: int
    queued: int

    @property
    def unbooked(self) -> int:
        """What MLX holds and mlxkv does not know of: what a step computes with, or a leak."""
        return self.active - self.weights - self.pages - self.kv

    @classmethod
    def of(cls, t_s: float, rss: int, stats: Mapping[str, Any]) -> Sample:
        """From `/stats.json`."""
        memory = stats["memory"]
        return cls(
            t_s,
            rss,
            active=memory["active"],
            peak=memory["peak"],
            cached=memory["cached"],
            weights=memory["weights"],
            pages=memory["pages"],
            kv=memory["kv_allocated"],
            room=(memory["limit"] - memory["weights"]) // 4,
            running=stats["running"],
            queued=stats["queued"],
        )


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to hold, whether it does, and what was seen."""

    name: str
    ok: bool
    said: str


@dataclass(slots=True)
class Record:
    """All that was recorded.

    Args:
        duration_s: from the first request until the last answer had ended.
        n_missed: requests of the pool that were never answered.
        answers: of all requests.
        samples: of the server's memory, while requests ran.
        after: when all had ended.
        counts: the server's own, of the model.
        rejected: requests that its queue had no room for.
        health: status of /health at the end.
        exit_code: of the server.
        log: what the server wrote.
        solo: each request alone, by name, see `soak_solo`.
    """

    duration_s: float
    n_missed: int
    answers: list[Answer]
    samples: list[Sample]
    after: Sample
    counts: dict[str, Any]
    rejected: int
    health: int
    exit_code: int = 0
    log: str = ""
    solo: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, outcome: str) -> list[Answer]:
        """Answers that ended so."""
        return [answer for answer in self.answers if answer.outcome == outcome]


def checks(record: Record) -> list[Check]:
    """All of them."""
    return [
        _none_lost(record),
        _counted(record),
        _as_alone(record, "finish reason", lambda answer: answer.finish_reason, "finish_reason"),
        _as_alone(record, "number of tokens", lambda answer: answer.n_tokens, "n_tokens"),
        _as_alone(record, "text", lambda answer: answer.text, "text"),
        _all_answered(record),
        _kept_to_peak(record),
        _flat(record, "MLX beside weights, pages and KV", lambda sample: sample.unbooked),
        _roomed(record),
        _idle(record.after),
        _booked(record.after),
        _given_back(record),
        _in_order(record),
    ]


def _none_lost(record: Record) -> Check:
    n = Counter(answer.outcome for answer in record.answers)
    failed = [f"{answer.name}: {answer.error}" for answer in record.of(FAILED)]
    said = f"{len(record.answers)} sent, {n[ANSWERED]} answered, {n[HUNG_UP]} hung up on"
    said = "; ".join([said, *failed[:5]])
    return Check("no request is lost", not failed and n[ANSWERED] > 0, said)


def _counted(record: Record) -> Check:
    """The server may answer before it hears of a hang-up, or never hear of the request."""
    counts = record.counts
    n_answered, n_sent = len(record.of(ANSWERED)), len(record.answers)
    ended = counts["answered"] + counts["cancelled"]
    ok = n_answered <= counts["answered"] and ended <= n_sent
    ok = ok and not counts["failed"] and not record.rejected
    said = ", ".join(f"{counts[kind]} {kind}" for kind in ("answered", "cancelled", "failed"))
    return Check("the server counts the same", ok, f"{said}, {record.rejected} rejected")


def _as_alone(record: Record, what: str, seen: Callable[[Answer], Any], key: str) -> Check:
    answered = record.of(ANSWERED)
    unknown = {answer.name for answer in answered} - record.solo.keys()
    wrong = [a for a in answered if a.name in record.solo and seen(a) != record.solo[a.name][key]]
    said = f"{len(answered) - len(wrong)} of {len(answered)} answers"
    if wrong:
        names = Counter(answer.name for answer in wrong)
        said += "; differing: " + ", ".join(f"{name} ({n} times)" for name, n in names.items())
        said += f"; the first: {_difference(seen(wrong[0]), record.solo[wrong[0].name][key])}"
    if unknown:
        said += f"; not run alone: {', '.join(sorted(unknown))}"
    return Check(f"{what} as alone", not (wrong or unknown) and bool(answered), said)


def _difference(seen: Any, alone: Any) -> str:
    if not (isinstance(seen, str) and isinstance(alone, str)):
        return f"{seen!r} instead of {alone!r}"
    pairs = enumerate(zip(seen, alone, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(seen), len(alone)))
    return f"{seen[at : at + 24]!r} instead of {alone[at : at + 24]!r} behind {at} characters"


def baseline_s(record: Record) -> tuple[float, float]:
    """The sixth of the time behind the warm-up, which is a third."""
    return record.duration_s / 3, record.duration_s / 2


def _all_answered(record: Record) -> Check:
    said = f"{record.n_missed} never were" + "; raise --minutes" * bool(record.n_missed)
    return Check("all of the pool is answered", record.n_missed == 0, said)


def _roomed(record: Record) -> Check:
    most = max((sample.pages for sample in record.samples), default=0)
    room = record.after.room
    said = f"at most {most / MiB:.0f} MiB of {room / MiB:.0f}"
    return Check("pages keep to their room", bool(record.samples) and most <= room, said)


def floors(record: Record, kind: Callable[[Sample], int]) -> tuple[float, float]:
    """Of the baseline and of the last sixth; NaN without samples."""
    start, stop = baseline_s(record)
    first = [kind(sample) for sample in record.samples if start <= sample.t_s <= stop]
    last = [kind(s) for s in record.samples if s.t_s >= record.duration_s * 5 / 6]
    return percentile(first, FLOOR), percentile(last, FLOOR)


def _flat(record: Record, name: str, kind: Callable[[Sample], int]) -> Check:
    first, last = floors(record, kind)
    allowed = first * (1 + GROWTH) + GROWTH_BYTES
    said = f"{first / MiB:.0f} MiB behind the warm-up, {last / MiB:.0f} MiB at the end"
    said += f" (allowed {allowed / MiB:.0f})"
    return Check(f"{name} is flat", last <= allowed, said)


def _idle(after: Sample) -> Check:
    ok = not (after.running or after.queued or after.kv)
    said = f"{after.running} running, {after.queued} queued, {after.kv / MiB:.1f} MiB of KV"
    return Check("nothing runs, waits or holds KV at the end", ok, said)


def _booked(after: Sample) -> Check:
    said = f"{after.unbooked / MiB:.1f} MiB more, of {after.active / MiB:.0f}"
    ok = after.unbooked <= UNBOOKED_BYTES
    return Check("MLX holds weights and pages alone at the end", ok, said)


def _allowed_own(record: Record) -> int:
    """What the process may take beside MLX; nothing without a sample to start from."""
    return sum(s.rss - s.active - s.cached + OWN_BYTES for s in record.samples[:1])


def _kept_to_peak(record: Record) -> Check:
    own = max((s.rss - s.peak - s.cached for s in record.samples), default=1)
    allowed = _allowed_own(record)
    said = f"{own / MiB:.0f} MiB more at most (allowed {allowed / MiB:.0f})"
    return Check("the process keeps to MLX's peak and its own", own <= allowed, said)


def _given_back(record: Record) -> Check:
    after, allowed = record.after, _allowed_own(record)
    own = after.rss - after.active - after.cached
    said = f"{own / MiB:.0f} MiB beside MLX (allowed {allowed / MiB:.0f})"
    return Check("memory is given back at the end", own <= allowed, said)


def _in_order(record: Record) -> Check:
    ok = record.health == 200 and record.exit_code == 0 and "Traceback" not in record.log
    trace = record.log[-600:] if "Traceback" in record.log else "no trace in its log"
    return Check(
        "/health is well, and the server ends in order",
        ok,
        f"status {record.health}, exit code {record.exit_code}, {trace}",
    )


def figures(record: Record) -> dict[str, float]:
    """What is reported."""
    began = [answer for answer in record.answers if answer.piece_s]
    firsts = [answer.piece_s[0] for answer in began]
    gaps = [1e3 * gap for answer in began for gap in answer.gaps_s]
    hung_up, counts = record.of(HUNG_UP), record.counts
    found: dict[str, float] = {
        "requests": len(record.answers),
        "answered": len(record.of(ANSWERED)),
        "hung up before the first text": sum(not answer.piece_s for answer in hung_up),
        "hung up within the answer": sum(bool(answer.piece_s) for answer in hung_up),
        "requests/s": len(record.answers) / record.duration_s,
        "tokens generated/s": counts["generated_tokens"] / record.duration_s,
    }
    for percent in (50, 99):
        found[f"first token p{percent}, s"] = percentile(firsts, percent)
    for percent in (50, 99):
        found[f"between pieces p{percent}, ms"] = percentile(gaps, percent)
    for kind in ("prompt", "computed", "restored_ram", "restored_ssd"):
        found[f"tokens of prompts: {kind}"] = counts[f"{kind}_tokens"]
    for reason, n in sorted(counts["misses"].items()):
        found[f"misses: {reason}"] = n
    samples = record.samples or [record.after]
    for name in ("rss", "active", "pages", "kv", "unbooked"):
        found[f"{name} at most, MiB"] = max(getattr(s, name) for s in samples) / MiB
        found[f"{name} at the end, MiB"] = getattr(record.after, name) / MiB
    return found


def failed(found: Sequence[Check]) -> list[Check]:
    """Those that do not hold."""
    return [check for check in found if not check.ok]
