"""`mlxkv transcribe`: the text of recordings, as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxkv.errors import INTERRUPTED, MediaError
from mlxkv.generation.speech.transcripts import Heard, Transcript, formatted, to_dict
from mlxkv.terminal.console import ProgressLine
from mlxkv.terminal.word_wrap import wrap_for

if TYPE_CHECKING:
    from mlxkv.llm.llm import LLM
    from mlxkv.media.sound import SoundSource


@dataclass(frozen=True)
class Recording:
    """A recording to transcribe, and what messages call it."""

    name: str
    source: SoundSource


def transcribe(llm: LLM, recordings: Sequence[Recording], format: str, **options: Any) -> int:
    """Write the text of each to stdout; the exit code.

    One of several that cannot be read is told, and the others are written.

    Args:
        format: see `LLM.stream_transcript`, and so for the options.
    """
    several, progress, code = len(recordings) > 1, ProgressLine(), 0
    for i, recording in enumerate(recordings):
        if several and format == "text":
            print(f"{'' if i == 0 else chr(10)}{recording.name}:", flush=True)
        try:
            steps = llm.stream_transcript(
                recording.source, name=recording.name, format=format, **options
            )
            made = _shown(recording.name, steps, progress, format == "text")
        except KeyboardInterrupt:
            sys.stdout.write("\n" if format == "text" else "")
            return INTERRUPTED
        except MediaError as error:
            if not several:
                raise
            progress.clear()
            print(f"mlxkv: {error}", file=sys.stderr)
            code = error.exit_code
            continue
        finally:
            progress.clear()
        if format != "text":
            sys.stdout.write(_whole(made, format, recording.name if several else None))
            sys.stdout.flush()
        _say_remarks(recording.name, made)
    return code


def _shown(name: str, steps: Iterator[Heard], progress: ProgressLine, streams: bool) -> Transcript:
    """Write text as it comes, and how far it is: on a terminal the text shows that itself."""
    wrap, wrote, heard = wrap_for(sys.stdout), False, None
    for heard in steps:
        if streams and heard.text:
            progress.clear()
            sys.stdout.write(wrap(heard.text) if wrap else heard.text)
            sys.stdout.flush()
            wrote = True
        if not (wrote and sys.stdout.isatty()):
            done, all_of_it = clock(heard.done_s), clock(heard.duration_s)
            progress(f"transcribing {name}: {done} of {all_of_it}")
    if wrote:
        progress.clear()
        print(flush=True)
    assert heard is not None and heard.transcript is not None
    return heard.transcript


def _whole(made: Transcript, format: str, name: str | None) -> str:
    if name is None:
        return formatted(made, format)
    return json.dumps({"file": name, **to_dict(made, format)}, ensure_ascii=False) + "\n"


def _say_remarks(name: str, made: Transcript) -> None:
    if not made.segments:
        print(f"mlxkv: {name}: no speech was heard", file=sys.stderr)
    for segment in made.segments:
        if segment.is_cut:
            times = f"{clock(segment.start_s)} to {clock(segment.end_s)}"
            text = f"{name}: {times}: more text than can be spoken in that time; it was cut"
            print(f"mlxkv: {text}", file=sys.stderr)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
