"""`mlxkv run` with a prompt: one answer, streamed to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlxkv.errors import INTERRUPTED, UsageError
from mlxkv.terminal.console import Aside, ProgressLine
from mlxkv.terminal.files import attachments
from mlxkv.terminal.spelling import RUN
from mlxkv.terminal.start import Start
from mlxkv.terminal.stats_text import describe_memory, describe_stats, remarks, stats_dict
from mlxkv.terminal.word_wrap import wrap_for

if TYPE_CHECKING:
    from mlxkv.generation.outputs import Chunk
    from mlxkv.terminal.backend import Speaker


def one_answer(speaker: Speaker, prompt: str, start: Start, *, raw: bool, as_json: bool) -> int:
    """Stream the answer to one prompt to stdout; the exit code.

    Raises:
        TemplateError: a model without a chat template, and not `raw`.
        UsageError: a system prompt, `think` or media beside `raw`, or media that the model cannot
            take.
    """
    attached, settings = start.attached, start.settings
    attachments.check_able(speaker, attached)
    for field, value in (
        ("system", start.system or None),
        ("think", settings.think),
        ("files", attached or None),
    ):
        if raw and value is not None:
            text = "has no place with --raw, which gives the model PROMPT as it is"
            raise UsageError(text, field=field)
    messages: list[dict[str, Any]] = []
    if start.system:
        messages.append({"role": "system", "content": start.system})
    content = attachments.content([*attached, prompt], start.image_budget)
    messages.append({"role": "user", "content": content})
    progress = ProgressLine()
    try:
        asked = prompt if raw else messages
        chunks = speaker.stream(asked, settings, prefill_report(progress), start.kv_from)
        if as_json:
            return _print_json(chunks, progress, speaker)
        return _print_text(chunks, start.verbose, progress, speaker)
    except KeyboardInterrupt:
        progress.clear()
        sys.stdout.write("" if as_json else "\n")
        sys.stdout.flush()
        return INTERRUPTED
    finally:
        progress.clear()


def prefill_report(progress: ProgressLine) -> Callable[[int, int], None] | None:
    """Shows how much of a long prompt is computed; None if stderr is no terminal."""
    if not progress.on:
        return None

    def report(done: int, total: int) -> None:
        text = f"reading the prompt: {done:,} of {total:,} tokens" if total else ""
        progress(text or "waiting for the model")

    return report


class Printer:
    """Writes an answer as it comes: its text to stdout, reasoning beside it (`Aside`). On a
    terminal both are word-wrapped.

    Tools are not run: a call is written as the model wrote it.
    """

    def __init__(self) -> None:
        self._aside = Aside()
        self._wrap = wrap_for(sys.stdout)
        self.wrote = False

    def __call__(self, chunk: Chunk) -> None:
        """Write a chunk's text, reasoning and calls."""
        if chunk.reasoning:
            self._leave_line()
            self._aside.write(chunk.reasoning)
        text = chunk.text + "".join(call.text for call in chunk.tool_calls)
        if text:
            self._aside.end()
            sys.stdout.write(self._wrap(text) if self._wrap else text)
            sys.stdout.flush()
            self.wrote = True

    def _leave_line(self) -> None:
        """Begin a new line of the terminal for reasoning behind text."""
        if self._wrap is not None and self._wrap.column:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._wrap.start_over()

    def end(self) -> None:
        """End the reasoning."""
        self._aside.end()


def _print_text(
    chunks: Iterator[Chunk], verbose: bool, progress: ProgressLine, speaker: Speaker
) -> int:
    last, printer = None, Printer()
    try:
        for chunk in chunks:
            progress.clear()
            printer(chunk)
            last = chunk
    finally:
        printer.end()
    sys.stdout.write("\n")
    sys.stdout.flush()
    assert last is not None
    code = _say_remarks(last, speaker)
    if verbose and last.stats is not None:
        memory = speaker.memory()
        figures = [describe_stats(last.stats), *([describe_memory(memory)] if memory else [])]
        print("", *figures, sep="\n", file=sys.stderr)
    return code


def _print_json(chunks: Iterator[Chunk], progress: ProgressLine, speaker: Speaker) -> int:
    """One object at the end, on one line."""
    from mlxkv.generation.outputs import join_parts

    parts = []
    for chunk in chunks:
        progress.clear()
        parts.append(chunk)
    text, reasoning, calls = join_parts(parts)
    last = parts[-1]
    tokens = [chunk.token for chunk in parts if chunk.token is not None]
    memory = speaker.memory()
    answer = {
        "model": speaker.name,
        "text": text,
        "reasoning": reasoning or None,
        "tool_calls": [asdict(call) for call in calls],
        # A server's API sends no ids, and its memory is not this answer's alone.
        "tokens": tokens if memory else None,
        "finish_reason": last.finish_reason,
        "error": None if last.error is None else last.error.spelled(RUN),
        "stats": stats_dict(last.stats) if last.stats is not None else None,
        "memory": asdict(memory) if memory else None,
    }
    print(json.dumps(answer, ensure_ascii=False), flush=True)
    return _say_remarks(last, speaker)


def _say_remarks(last: Chunk, speaker: Speaker) -> int:
    """Print remarks on an answer, and its error, to stderr; the exit code."""
    for line in remarks(last.stats, lambda: speaker.context):
        print(f"mlxkv: {line}", file=sys.stderr)
    if last.error is None:
        return 0
    print(f"mlxkv: the answer ends here: {last.error.spelled(RUN)}", file=sys.stderr)
    return last.error.exit_code
