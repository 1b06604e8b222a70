"""What the checks found: rows with a verdict, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlxkv.terminal.console import table

OK, WRONG, FAILED, SKIPPED = "ok", "wrong", "FAILED", "skipped"
NOTE_WIDTH = 90


class Failed(Exception):
    """What mlxkv promises does not hold."""


class Wrong(Exception):
    """The answer is not the expected one: all else holds, and a small model may not know better."""


class Skip(Exception):
    """The check does not apply, and why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One check's result.

    Args:
        verdict: `ok`, `wrong` (see `Wrong`), `FAILED` or `skipped`.
        note: figures of an `ok`, and why of the others.
    """

    area: str
    check: str
    verdict: str
    note: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """All results.

    Args:
        model: path of its directory.
        dtype: that it was computed in.
        kinds: what it takes beside text.
    """

    model: str
    dtype: str
    kinds: tuple[str, ...]
    rows: tuple[Row, ...]

    def count(self, verdict: str) -> int:
        """How many rows have that verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    def passed(self, strict: bool = False) -> bool:
        """Whether no check failed, and with `strict` no answer was wrong."""
        return not self.count(FAILED) and not (strict and self.count(WRONG))


def to_dict(report: Report) -> dict[str, Any]:
    """A report as JSON has it."""
    verdicts = {verdict: report.count(verdict) for verdict in (OK, WRONG, FAILED, SKIPPED)}
    return {**asdict(report), "counts": verdicts, "passed": report.passed()}


def text(report: Report) -> str:
    """A report as a table, and the sum of its verdicts."""
    rows = [
        (row.area, row.check, row.verdict, f"{row.seconds:.1f} s", _short(row.note))
        for row in report.rows
    ]
    listed = table(("AREA", "CHECK", "VERDICT", "TIME", "NOTE"), rows, right=("TIME",))
    takes = " and ".join(("text", *report.kinds))
    counts = ", ".join(
        f"{report.count(verdict)} {verdict}"
        for verdict in (OK, WRONG, FAILED, SKIPPED)
        if report.count(verdict)
    )
    return f"{report.model}, {report.dtype}, takes {takes}\n\n{listed}\n\n{counts}"


def _short(note: str) -> str:
    note = " ".join(note.split())
    return note if len(note) <= NOTE_WIDTH else f"{note[: NOTE_WIDTH - 3]}..."


def said(answer: str, *wanted: Sequence[str]) -> None:
    """Raise Wrong unless the answer has one word of each of the groups."""
    lower = answer.casefold()
    for words in wanted:
        if not any(word.casefold() in lower for word in words):
            got = answer.strip()[:60]
            raise Wrong(f"expected {' or '.join(map(repr, words))}; got {got!r}")


def holds(condition: object, otherwise: str) -> None:
    """Raise Failed unless the condition is true."""
    if not condition:
        raise Failed(otherwise)
