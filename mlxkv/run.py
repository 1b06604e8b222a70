"""`mlxkv run` with a prompt: one answer, streamed to stdout."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from mlxkv import catalog
from mlxkv.errors import INTERRUPTED, UsageError
from mlxkv.figures import describe_memory, describe_stats, remarks, stats_dict
from mlxkv.names import looks_like_model
from mlxkv.terminal import Aside, ProgressLine

if TYPE_CHECKING:
    from mlxkv.chunks import Chunk
    from mlxkv.kv_names import NamedKV
    from mlxkv.sampling_params import SamplingParams
    from mlxkv.speaker import Speaker, Talk


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made; None leaves it to the model."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    truncate: bool = False
    think: bool | str | None = None


def check(settings: Settings) -> None:
    """Refuses what is out of range before a model is loaded.

    Raises:
        UsageError: names the option and what is allowed.
    """
    if settings.max_tokens is not None and settings.max_tokens < 1:
        raise UsageError(f"--max-tokens must be 1 or more; got {settings.max_tokens}")
    if "" in settings.stop:
        raise UsageError("--stop must not be empty")
    from mlxkv.sampling_params import SamplingParams

    SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repeat_penalty=settings.repeat_penalty,
        seed=settings.seed,
    )


def with_defaults(
    settings: Settings, advice: SamplingParams, repeat_penalty: float | None = None
) -> Settings:
    """The settings, with what is not set taken from the model's own recommendation.

    Args:
        settings: what the user set.
        advice: what the model recommends.
        repeat_penalty: where neither says.
    """
    values = {"repeat_penalty": repeat_penalty, **advice.chosen()}
    unset = {name: x for name, x in values.items() if getattr(settings, name) is None}
    return replace(settings, **unset)


def split_words(
    words: Sequence[str],
    model: str | None,
    saved: NamedKV | None = None,
    names_model: Callable[[str], bool] = looks_like_model,
) -> tuple[str, str | None]:
    """MODEL and PROMPT out of the arguments of `run`.

    One argument alone is the MODEL if it looks like one, and else the PROMPT for the default
    model; of two the first is the MODEL. With `--model` all of them are the PROMPT; with saved KV,
    which names its model, too, unless the first is one.

    Args:
        words: the arguments.
        model: of `--model`.
        saved: KV of `--kv-from`.
        names_model: whether a word looks like a model.

    Raises:
        UsageError: more than two arguments: a prompt without quotes.
    """
    if model is None and saved is not None and not (len(words) == 2 and names_model(words[0])):
        model = saved.model
    if model is not None:
        return model, " ".join(words) if words else None
    if not words:
        return catalog.DEFAULT.name, None
    if len(words) > 2:
        raise UsageError(
            f"run takes a model and a prompt; got {len(words)} words. Put the prompt in quotes: "
            f'mlxkv run "{" ".join(words)}"'
        )
    if len(words) == 2:
        return words[0], words[1]
    if names_model(words[0]):
        return words[0], None
    return catalog.DEFAULT.name, words[0]


def saved_kv(name: str | None) -> NamedKV | None:
    """Saved KV by its name, before its model is loaded.

    Raises:
        UsageError: nothing of that name.
    """
    if name is None:
        return None
    from mlxkv.kv_names import KVNames
    from mlxkv.names import kv_dir

    return KVNames(kv_dir()).load(name)


def read_piped() -> str | None:
    """What was piped or redirected into stdin, less one final newline; None if nothing was.

    Raises:
        UsageError: it is not UTF-8 text.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed
        return None
    if stat.S_ISCHR(mode):  # a terminal, or /dev/null
        return None
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the piped prompt is not UTF-8 text (byte {error.start:,})") from None
    return text.removesuffix("\n") or None


def join_prompt(prompt: str | None, piped: str | None) -> str | None:
    """The prompt, with what was piped below it; None where there is neither.

    Raises:
        UsageError: it is empty.
    """
    parts = [part for part in (prompt, piped) if part is not None]
    if not parts:
        return None
    text = "\n\n".join(parts)
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def one_answer(
    speaker: Speaker,
    prompt: str,
    *,
    system: str | None,
    settings: Settings,
    raw: bool,
    as_json: bool,
    verbose: bool,
    kv_from: NamedKV | None = None,
) -> int:
    """Streams the answer to one prompt to stdout; the exit code.

    Raises:
        TemplateError: a model without a chat template, and not `raw`.
        UsageError: a system prompt or a wish to think that `raw` leaves no place for.
    """
    if raw and system:
        raise UsageError("--raw gives the model PROMPT as it is: --system has no place there")
    if raw and settings.think is not None:
        raise UsageError("--raw gives the model PROMPT as it is: --think has no place there")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    progress = ProgressLine()
    try:
        asked = prompt if raw else messages
        chunks = speaker.stream(asked, settings, prefill_report(progress), kv_from)
        if as_json:
            return _print_json(chunks, progress, speaker)
        return _print_text(chunks, verbose, progress, speaker)
    except KeyboardInterrupt:
        progress.clear()
        sys.stdout.write("" if as_json else "\n")
        sys.stdout.flush()
        return INTERRUPTED
    finally:
        progress.clear()


def options_of(settings: Settings) -> dict[str, Any]:
    """The settings as `stream` and `send` take them."""
    return {field.name: getattr(settings, field.name) for field in fields(settings)}


def send(
    conversation: Talk,
    text: str,
    settings: Settings,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Chunk]:
    """`conversation.send` with these settings."""
    return conversation.send(text, on_progress=on_progress, **options_of(settings))


def prefill_report(progress: ProgressLine) -> Callable[[int, int], None] | None:
    """Shows how much of a long prompt is read; None where nobody looks."""
    if not progress.on:
        return None

    def report(done: int, total: int) -> None:
        progress(
            f"reading the prompt: {done:,} of {total:,} tokens"
            if total
            else "waiting for the model"
        )

    return report


class Printer:
    """Writes an answer as it comes: its text to stdout, reasoning beside it (`Aside`).

    Nothing here runs tools: a call is written as the model wrote it.
    """

    def __init__(self) -> None:
        self._aside = Aside()
        self.wrote = False

    def __call__(self, chunk: Chunk) -> None:
        """Writes what a chunk brings."""
        if chunk.reasoning:
            self._aside.write(chunk.reasoning)
        text = chunk.text + "".join(call.text for call in chunk.tool_calls)
        if text:
            self._aside.end()
            sys.stdout.write(text)
            sys.stdout.flush()
            self.wrote = True

    def end(self) -> None:
        """The answer is over."""
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
    from mlxkv.chunks import join_parts

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
        # A server's API has their text alone, and its memory is not this answer's.
        "tokens": tokens if memory else None,
        "finish_reason": last.finish_reason,
        "error": None if last.error is None else str(last.error),
        "stats": stats_dict(last.stats) if last.stats is not None else None,
        "memory": asdict(memory) if memory else None,
    }
    print(json.dumps(answer, ensure_ascii=False), flush=True)
    return _say_remarks(last, speaker)


def _say_remarks(last: Chunk, speaker: Speaker) -> int:
    """What should be known of an answer that is over, on stderr; the exit code."""
    for line in remarks(last.stats, lambda: speaker.context):
        print(f"mlxkv: {line}", file=sys.stderr)
    if last.error is None:
        return 0
    print(f"mlxkv: the answer ends here: {last.error}", file=sys.stderr)
    return last.error.exit_code
