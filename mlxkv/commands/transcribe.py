"""`mlxkv transcribe`: speech to text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxkv.commands.options import Context, DType, Memory, Model
from mlxkv.errors import UsageError

if TYPE_CHECKING:
    from mlxkv.terminal.files.transcribe import Recording

PIPED = "-"


def transcribe(
    model: Model,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE... | -", help="Recordings; - for one that is piped in."),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="text, json, srt, vtt or verbose_json.")
    ] = "text",
    language: Annotated[
        str | None, typer.Option(help="What is spoken, such as German; default: the model tells.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Names and words that occur, or a style.")
    ] = None,
    mic: Annotated[
        bool, typer.Option("--mic", help="Record from the microphone first (macOS).")
    ] = False,
    context: Context = None,
    dtype: DType = "auto",
    memory: Memory = None,
) -> int:
    """Write the text of recordings, as it comes.

    Long ones are cut in pauses, or overlap where there are none, so that no word is lost.
    """
    from mlxkv.generation.speech.transcripts import longest_window
    from mlxkv.store.settings import COMMAND_LINE, Given
    from mlxkv.terminal.files.transcribe import transcribe as write
    from mlxkv.terminal.local import load_model

    longest_window(format)  # raises for a format that is none
    if len(files or ()) + mic > 1 and format in ("srt", "vtt"):
        raise UsageError(f"--format {format} takes one recording: its times start at 0")
    recordings = list(_recordings(files or [], mic))
    given = Given(context=context, memory=memory, origin=COMMAND_LINE)
    with load_model(model, dtype, given) as llm:
        return write(llm, recordings, format, language=language, prompt=prompt)


def _recordings(files: Sequence[str], mic: bool) -> Iterator[Recording]:
    """All recordings, checked before a model is loaded for them."""
    from mlxkv.terminal.files import microphone
    from mlxkv.terminal.files.attachments import printable
    from mlxkv.terminal.files.transcribe import Recording

    if not files and not mic:
        raise UsageError("there is nothing to transcribe: give files, or - and pipe one in")
    if files.count(PIPED) > 1:
        raise UsageError("- stands for the one recording that is piped in: give it once")
    if mic:
        yield Recording("the recording", microphone.record())
    for file in files:
        if file == PIPED:
            yield Recording("stdin", _piped())
            continue
        path = Path(file).expanduser()
        if not path.is_file():
            why = "not a file" if path.exists() else "no such file"
            raise UsageError(f"{printable(file)}: {why}")
        yield Recording(printable(file), path)


def _piped() -> bytes:
    from mlxkv.media.limits import MAX_SOUND_BYTES

    if sys.stdin.isatty():
        raise UsageError("- reads a recording that is piped in: mlxkv transcribe MODEL - < FILE")
    data = sys.stdin.buffer.read(MAX_SOUND_BYTES + 1)
    if len(data) > MAX_SOUND_BYTES:
        raise UsageError(f"stdin: more than the {MAX_SOUND_BYTES:,} bytes allowed")
    return data
