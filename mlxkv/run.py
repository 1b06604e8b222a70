"""`mlxkv run` with a prompt: one answer, streamed to stdout."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from mlxkv import catalog
from mlxkv.errors import INTERRUPTED, TemplateError, UsageError
from mlxkv.names import looks_like_model
from mlxkv.terminal import Aside, ProgressLine, human_bytes

if TYPE_CHECKING:
    from mlxkv.kv_names import NamedKV
    from mlxkv.llm import LLM, Chunk, Conversation, Stats

FEW = 16
"""Tokens below which a miss is no news: every other question leaves the one before it somewhere."""


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
    from mlxkv.sampling import SamplingParams

    SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repeat_penalty=settings.repeat_penalty,
        seed=settings.seed,
    )


def with_defaults(settings: Settings, llm: LLM, repeat_penalty: float | None = None) -> Settings:
    """The settings, with what is not set taken from the model's own recommendation.

    Args:
        settings: what the user set.
        llm: its generation_config.json may recommend how to sample.
        repeat_penalty: where neither says.
    """
    advice = llm.recommended
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    unset = {name: getattr(advice, name) for name in names if getattr(settings, name) is None}
    if unset.get("repeat_penalty", settings.repeat_penalty) is None:
        unset["repeat_penalty"] = repeat_penalty
    return replace(settings, **unset)


def split_words(
    words: Sequence[str], model: str | None, saved: NamedKV | None = None
) -> tuple[str, str | None]:
    """MODEL and PROMPT out of the arguments of `run`.

    One argument alone is the MODEL if it looks like one, and else the PROMPT for the default
    model; of two the first is the MODEL. With `--model` all of them are the PROMPT; with saved KV,
    which names its model, too, unless the first is one.

    Raises:
        UsageError: more than two arguments: a prompt without quotes.
    """
    named = len(words) == 2 and looks_like_model(words[0])
    if model is None and saved is not None and not named:
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
    if looks_like_model(words[0]):
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
    llm: LLM,
    prompt: str,
    *,
    name: str,
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
    if not raw and llm.tokenizer.chat_template is None:
        raise TemplateError(
            f"{name} has no chat template (it is a base model): add --raw to have it continue the "
            "prompt as it is"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    settings = with_defaults(settings, llm)
    progress = ProgressLine()
    try:
        asked = prompt if raw else messages
        chunks = stream(llm, asked, settings, prefill_report(progress), kv_from)
        if as_json:
            return _print_json(name, chunks, progress, llm.context)
        return _print_text(chunks, verbose, progress, llm.context)
    except KeyboardInterrupt:
        progress.clear()
        sys.stdout.write("" if as_json else "\n")
        sys.stdout.flush()
        return INTERRUPTED


def stream(
    llm: LLM,
    prompt: str | list[dict[str, str]],
    settings: Settings,
    on_progress: Callable[[int, int], None] | None = None,
    kv_from: NamedKV | None = None,
) -> Iterator[Chunk]:
    """`llm.stream` with these settings."""
    return llm.stream(
        prompt,
        kv_from=kv_from,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repeat_penalty=settings.repeat_penalty,
        seed=settings.seed,
        stop=settings.stop,
        truncate=settings.truncate,
        think=settings.think,
        on_progress=on_progress,
    )


def send(
    conversation: Conversation,
    text: str,
    settings: Settings,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Chunk]:
    """`conversation.send` with these settings."""
    return conversation.send(
        text,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repeat_penalty=settings.repeat_penalty,
        seed=settings.seed,
        stop=settings.stop,
        truncate=settings.truncate,
        think=settings.think,
        on_progress=on_progress,
    )


def prefill_report(progress: ProgressLine) -> Callable[[int, int], None] | None:
    """Shows how much of a long prompt is read; None where nobody looks."""
    if not progress.on:
        return None
    return lambda done, total: progress(f"reading the prompt: {done:,} of {total:,} tokens")


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
    chunks: Iterator[Chunk], verbose: bool, progress: ProgressLine, context: int
) -> int:
    stats, printer = None, Printer()
    try:
        for chunk in chunks:
            progress.clear()
            printer(chunk)
            stats = chunk.stats or stats
    finally:
        printer.end()
    sys.stdout.write("\n")
    sys.stdout.flush()
    _say_shift(stats, context)
    if verbose and stats is not None:
        print(f"\n{describe_stats(stats)}", file=sys.stderr)
    return 0


def _print_json(name: str, chunks: Iterator[Chunk], progress: ProgressLine, context: int) -> int:
    """One object at the end, on one line."""
    from mlxkv.answer import join_parts

    parts, tokens, finish_reason, stats = [], [], None, None
    for chunk in chunks:
        progress.clear()
        parts.append(chunk)
        if chunk.token is not None:
            tokens.append(chunk.token)
        finish_reason = chunk.finish_reason or finish_reason
        stats = chunk.stats or stats
    text, reasoning, calls = join_parts(parts)
    answer = {
        "model": name,
        "text": text,
        "reasoning": reasoning or None,
        "tool_calls": [asdict(call) for call in calls],
        "tokens": tokens,
        "finish_reason": finish_reason,
        "stats": stats_dict(stats) if stats is not None else None,
    }
    print(json.dumps(answer, ensure_ascii=False), flush=True)
    _say_shift(stats, context)
    return 0


def _say_shift(stats: Stats | None, context: int) -> None:
    if stats is not None and stats.shifted_tokens:
        print(f"mlxkv: {describe_shift(stats, context)}", file=sys.stderr)


def describe_shift(stats: Stats, context: int) -> str:
    """What was lost at the context, on one line."""
    n = stats.shifted_tokens
    return f"the context of {context:,} tokens was full: the oldest {n:,} were dropped"


def stats_dict(stats: Stats) -> dict[str, float]:
    """The figures of an answer, those that are computed from others included."""
    return asdict(stats) | {"prefill_tps": stats.prefill_tps, "decode_tps": stats.decode_tps}


def describe_stats(stats: Stats) -> str:
    """The figures of an answer, aligned, for people."""
    rows = (
        ("prompt", describe_prompt(stats)),
        ("answer", f"{stats.generated_tokens:,} tokens, {stats.decode_tps:.1f} tokens/s"),
        ("first token", f"{stats.first_token_s:.2f} s"),
        ("peak memory", human_bytes(stats.peak_bytes)),
    )
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def describe_prompt(stats: Stats) -> str:
    """Where the prompt's KV came from, and why not more of it was restored, on one line."""
    sources = (
        (stats.restored_ram_tokens, "from RAM"),
        (stats.restored_ssd_tokens, "from SSD"),
        (stats.computed_tokens, f"computed at {stats.prefill_tps:.1f} tokens/s"),
    )
    parts = ", ".join(f"{n:,} {source}" for n, source in sources if n)
    text = f"{stats.prompt_tokens:,} tokens: {parts}"
    miss = stats.miss
    if miss is None or miss.n_tokens < FEW:
        return text
    if miss.reason == "dropped":
        why = f"KV from token {miss.token:,} on was given up for lack of memory, or damaged"
    else:
        why = f"differs from token {miss.token:,} on: had {miss.held!r}, got {miss.prompt!r}"
    return f"{text}; {why} ({miss.n_tokens:,} tokens again, {miss.cost_s:.1f} s)"
