"""All checks in order, and how one is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mlxkv.bench.acceptance import limit_checks, media_checks, text_checks
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
from mlxkv.errors import MlxkvError, UsageError, lacks_memory, one_line

Check = Callable[[Subject], str]

CHECKS: Sequence[tuple[str, str, Check]] = (
    ("chat", "a question", text_checks.answers),
    ("chat", "history", text_checks.remembers),
    ("chat", "prefix reuse", text_checks.chat_reuse),
    ("reasoning", "on", text_checks.thinks_on),
    ("reasoning", "off", text_checks.thinks_off),
    ("structured", "JSON schema", text_checks.schema),
    ("structured", "regular expression", text_checks.pattern),
    ("structured", "prefix reuse", text_checks.schema_reuse),
    ("tools", "one of several", text_checks.calls),
    ("tools", "parallel calls", text_checks.parallel),
    ("tools", "results, prefix reuse", text_checks.results),
    ("limits", "context is full", limit_checks.full),
    ("limits", "prompt is too long", limit_checks.too_long),
    ("limits", "context shift", limit_checks.shifts),
    ("limits", "stop text", limit_checks.stops),
    ("limits", "seeds", limit_checks.seeds),
    ("pictures", "description", media_checks.describes),
    ("pictures", "count", media_checks.counts),
    ("pictures", "position", media_checks.locates),
    ("pictures", "reading", media_checks.reads),
    ("pictures", "two compared", media_checks.compares),
    ("pictures", "another question", media_checks.picture_reuse),
    ("pictures", "a second picture", media_checks.second_picture),
    ("sound", "transcript", media_checks.transcribes),
    ("sound", "a question", media_checks.hears),
    ("sound", "longer than 30 s", media_checks.long_sound),
    ("sound", "another question", media_checks.sound_reuse),
    ("memory", "beside the plan", limit_checks.memory),
)


def accept(subject: Subject, on_check: Callable[[str], None] = lambda name: None) -> Report:
    """Run all checks that apply to a model.

    Args:
        on_check: called with each check's name before it runs.

    Raises:
        UsageError: the model's context is too small for them.
    """
    llm = subject.llm
    if llm.context < SMALLEST_CONTEXT:
        raise UsageError(
            f"the checks need a context of {SMALLEST_CONTEXT} tokens or more; got {llm.context}"
        )
    rows = []
    for area, name, check in CHECKS:
        on_check(f"{area}: {name}")
        rows.append(run(subject, area, name, check))
    dtype = str(llm.model.compute_dtype).rpartition(".")[2]
    return Report(str(llm.path), dtype, tuple(sorted(subject.kinds)), tuple(rows))


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
        if lacks_memory(error):
            raise
        verdict, note = FAILED, f"unexpected {type(error).__name__}: {one_line(error)}"
    return Row(area, name, verdict, note, time.perf_counter() - started)
