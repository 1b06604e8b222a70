"""All checks in order, and how one is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mlxkv.bench.acceptance import (
    limit_checks,
    picture_checks,
    sound_checks,
    text_checks,
    tool_checks,
)
from mlxkv.bench.acceptance.report import (
    FAILED,
    OK,
    SKIPPED,
    WRONG,
    Failed,
    Report,
    Row,
    Skip,
    Wrong,
)
from mlxkv.bench.acceptance.subject import SMALLEST_CONTEXT, Subject
from mlxkv.errors import MlxkvError, UsageError, one_line

Check = Callable[[Subject], str]

CHECKS: Sequence[tuple[str, str, Check]] = (
    ("chat", "question", text_checks.answers),
    ("chat", "history", text_checks.remembers),
    ("chat", "prefix reuse", text_checks.chat_reuse),
    ("reasoning", "on", text_checks.thinks_on),
    ("reasoning", "off", text_checks.thinks_off),
    ("reasoning", "prefix reuse", text_checks.thinks_reuse),
    ("structured", "JSON schema", text_checks.schema),
    ("structured", "regex", text_checks.pattern),
    ("structured", "prefix reuse", text_checks.schema_reuse),
    ("tools", "one of five", tool_checks.calls),
    ("tools", "forced call", tool_checks.forced),
    ("tools", "parallel calls", tool_checks.parallel),
    ("tools", "result", tool_checks.results),
    ("tools", "prefix reuse", tool_checks.reuse),
    ("limits", "full context", limit_checks.full),
    ("limits", "long prompt", limit_checks.too_long),
    ("limits", "context shift", limit_checks.shifts),
    ("limits", "stop text", limit_checks.stops),
    ("limits", "seeds", limit_checks.seeds),
    ("limits", "memory", limit_checks.memory),
    ("pictures", "seen", picture_checks.is_seen),
    ("pictures", "description", picture_checks.describes),
    ("pictures", "count", picture_checks.counts),
    ("pictures", "position", picture_checks.locates),
    ("pictures", "reading", picture_checks.reads),
    ("pictures", "two compared", picture_checks.compares),
    ("pictures", "prefix reuse", picture_checks.another_question),
    ("pictures", "second one", picture_checks.second_picture),
    ("pictures", "memory", picture_checks.memory),
    ("sound", "heard", sound_checks.is_heard),
    ("sound", "transcript", sound_checks.transcribes),
    ("sound", "question", sound_checks.answers),
    ("sound", "over 30 s", sound_checks.long_sound),
    ("sound", "prefix reuse", sound_checks.another_question),
    ("sound", "memory", sound_checks.memory),
)


def accept(
    subject: Subject,
    name: str,
    strict: bool = False,
    on_check: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run all checks; after Ctrl-C the report has those that were run.

    Args:
        name: the model's, for the report.
        strict: see `Report`.
        on_check: called with each check's name before it runs.

    Raises:
        UsageError: the model's context is too small for them.
    """
    llm = subject.llm
    if llm.context < SMALLEST_CONTEXT:
        raise UsageError(
            f"the checks need a context of {SMALLEST_CONTEXT} tokens or more; got {llm.context}"
        )
    rows, complete = [], True
    try:
        for area, what, check in CHECKS:
            on_check(f"{len(rows) + 1} of {len(CHECKS)}  {area}: {what}")
            rows.append(run(subject, area, what, check))
    except KeyboardInterrupt:
        complete = False
    return Report(
        name,
        str(llm.model.compute_dtype).rpartition(".")[2],
        llm.kv_type,
        llm.context,
        tuple(sorted(subject.kinds)),
        tuple(rows),
        strict,
        complete,
    )


def run(subject: Subject, area: str, name: str, check: Check) -> Row:
    """One check's row; an error of the model or of ours is a failure, not the end."""
    started = time.perf_counter()
    try:
        verdict, note = OK, check(subject)
    except Skip as why:
        verdict, note = SKIPPED, str(why)
    except Wrong as why:
        verdict, note = WRONG, str(why)
    except Failed as why:
        verdict, note = FAILED, str(why)
    except MlxkvError as error:
        verdict, note = FAILED, one_line(error)
    except Exception as error:
        verdict, note = FAILED, f"unexpected {type(error).__name__}: {one_line(error)}"
    return Row(area, name, verdict, note, time.perf_counter() - started)
