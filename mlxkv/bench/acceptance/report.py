"""What the checks found: rows with a verdict, as a table and as JSON."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from mlxkv.terminal.word_wrap import cells

OK, WRONG, FAILED, SKIPPED = "ok", "wrong", "FAILED", "skipped"
HEADER = ("AREA", "CHECK", "VERDICT", "TIME", "NOTE")
MIN_NOTE_WIDTH = 24
MAX_NOTE_LINES = 4


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
        model: as it was asked for.
        dtype: that it was computed in.
        kv_type: format of its KV.
        context: tokens of prompt and answer together.
        kinds: what it takes beside text.
        strict: whether a wrong answer fails, too.
        complete: whether all checks were run; False after Ctrl-C.
    """

    model: str
    dtype: str
    kv_type: str
    context: int
    kinds: tuple[str, ...]
    rows: tuple[Row, ...]
    strict: bool = False
    complete: bool = True

    def count(self, verdict: str) -> int:
        """How many rows have that verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def passed(self) -> bool:
        """Whether all were run, no check failed, and with `strict` no answer was wrong."""
        wrong = self.strict and self.count(WRONG)
        return self.complete and not self.count(FAILED) and not wrong


def to_dict(report: Report) -> dict[str, Any]:
    """A report as JSON has it."""
    verdicts = {verdict: report.count(verdict) for verdict in (OK, WRONG, FAILED, SKIPPED)}
    return {**asdict(report), "counts": verdicts, "passed": report.passed}


def text(report: Report, width: int) -> str:
    """A report as a table of at most so many columns, and the sum of its verdicts.

    Areas that were skipped for one reason are one row.
    """
    lines = [HEADER, *_cells(report.rows)]
    widths = [max(cells(line[i]) for line in lines) for i in range(4)]
    room = max(width - sum(widths) - 2 * 4, MIN_NOTE_WIDTH)
    indent = "\n" + " " * (sum(widths) + 2 * 4)
    table = "\n".join(
        f"{area:{widths[0]}}  {check:{widths[1]}}  {verdict:{widths[2]}}  {time:>{widths[3]}}  "
        f"{indent.join(_wrapped(note, room))}".rstrip()
        for area, check, verdict, time, note in lines
    )
    takes = " and ".join(("text", *report.kinds))
    about = f"{report.dtype}, KV {report.kv_type}, context {report.context:,}, takes {takes}"
    return f"{report.model}\n{about}\n\n{table}\n\n{_sum(report)}"


def _cells(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, str, str]]:
    for area, grouped in groupby(rows, key=lambda row: row.area):
        group = list(grouped)
        whole = len(group) > 1 and {(row.verdict, row.note) for row in group}
        if whole == {(SKIPPED, group[0].note)}:
            yield area, f"all {len(group)}", SKIPPED, "", group[0].note
            continue
        for row in group:
            time = "" if row.verdict == SKIPPED else f"{row.seconds:.1f} s"
            yield row.area, row.check, row.verdict, time, row.note


def _wrapped(note: str, width: int) -> list[str]:
    """A note in lines. What a model wrote may hold control characters: a terminal gets none."""
    plain = "".join(c if c.isprintable() else "\ufffd" for c in re.sub(r"\s+", " ", note))
    return textwrap.wrap(
        plain, width, max_lines=MAX_NOTE_LINES, placeholder="...", break_on_hyphens=False
    ) or [""]


def _sum(report: Report) -> str:
    counts = ", ".join(
        f"{report.count(verdict)} {verdict}"
        for verdict in (OK, WRONG, FAILED, SKIPPED)
        if report.count(verdict)
    )
    seconds = sum(row.seconds for row in report.rows)
    verdict = "passed" if report.passed else "failed" if report.complete else "interrupted"
    return f"{verdict}: {counts or 'nothing was checked'} ({seconds:.0f} s)"


def said(answer: str, *wanted: Sequence[str], never: Sequence[str] = ()) -> None:
    """Raise Wrong unless the answer has one word of each group, and none of `never`.

    The first of a group is named in the note; the others are as good.
    """
    for words in wanted:
        if not any(_has(answer, word) for word in words):
            raise Wrong(f"expected {words[0]!r}; got {brief(answer)!r}")
    for word in never:
        if _has(answer, word):
            raise Wrong(f"expected no {word!r}; got {brief(answer)!r}")


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def brief(text: str, n: int = 48) -> str:
    """The beginning of an answer, for a note."""
    text = " ".join(text.split())
    return text if len(text) <= n else f"{text[: n - 3]}..."


def holds(condition: object, otherwise: str) -> None:
    """Raise Failed unless the condition is true."""
    if not condition:
        raise Failed(otherwise)
