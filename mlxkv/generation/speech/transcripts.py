"""Speech to text: what a model is asked, window by window, and what its answers become.

Nothing here runs a model or knows of requests: `transcribing` is given a function that answers
messages, and a front end that answers in another way uses `windows`, `messages_for` and `Joined`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxkv.errors import UsageError
from mlxkv.generation.speech.seams import Seams, Segment
from mlxkv.generation.speech.windows import LONGEST_S, SUBTITLE_S, Window, windows

if TYPE_CHECKING:
    import numpy as np

    from mlxkv.generation.outputs import Chunk

FORMATS = ("text", "json", "srt", "vtt", "verbose_json")
TOKENS_A_SECOND = 16
"""Most tokens of a transcript: fast speech has 8, and a loop must end."""

Ask = Callable[[list[dict[str, Any]], int], Iterable["Chunk"]]
"""Streams the answer to messages, of at most so many tokens."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A whole transcript.

    Args:
        segments: in order; none is empty.
        duration_s: of the recording.
        language: as it was given.
    """

    segments: tuple[Segment, ...]
    text: str
    duration_s: float
    language: str | None = None

    def formatted(self, format: str) -> str:
        """As a file of one of `FORMATS`.

        Raises:
            UsageError: no such format.
        """
        return formatted(self, format)


@dataclass(frozen=True, slots=True)
class Heard:
    """A step of a transcript.

    Args:
        text: what is added to the text; may be "".
        done_s: seconds of the recording that are done.
        duration_s: of the recording.
        transcript: the whole, in the last step.
    """

    text: str
    done_s: float
    duration_s: float
    transcript: Transcript | None = None


def longest_window(format: str) -> float:
    """Seconds of a window: shorter where its text is shown with its time.

    Raises:
        UsageError: no such format.
    """
    if format not in FORMATS:
        raise UsageError(f"must be one of {', '.join(FORMATS)}; got {format!r}", field="format")
    return SUBTITLE_S if format in ("srt", "vtt", "verbose_json") else LONGEST_S


def instruction(language: str | None = None, hint: str | None = None) -> str:
    """What the model is asked: the wording that Gemma's model cards recommend.

    Args:
        language: as text, such as "German"; None for the recording's own.
        hint: names and words that occur, or a style.
    """
    what = f"in {language} into {language} text" if language else "in its original language"
    lines = [
        f"Transcribe the following speech segment {what}.",
        "",
        "Follow these specific instructions for formatting the answer:",
        "* Only output the transcription, with no newlines.",
        "* When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, "
        "and write 3 instead of three.",
    ]
    if hint and hint.strip():
        lines.append(f"* Take spelling and style from this context: {' '.join(hint.split())}")
    return "\n".join(lines)


def messages_for(samples: np.ndarray, rate: int, text: str, name: str = "") -> list[dict[str, Any]]:
    """The messages that ask for one window's transcript.

    Args:
        samples: of the window.
        text: see `instruction`.
        name: of the recording, for messages.
    """
    sound = {"type": "audio", "audio": (samples, rate), "name": name}
    return [{"role": "user", "content": [sound, {"type": "text", "text": text}]}]


def max_tokens(n_samples: int, rate: int) -> int:
    """Most tokens of a window's transcript."""
    return 64 + round(TOKENS_A_SECOND * n_samples / rate)


class Joined:
    """The answers to a recording's windows, in order, as one transcript.

    For each window `begin`, `feed` for each piece of its answer, and `end`.
    """

    def __init__(self, parts: Sequence[Window], n_samples: int, rate: int):
        self._parts, self._seams = parts, Seams()
        self._rate, self._duration_s = rate, n_samples / rate
        self._texts: list[str] = []
        self._cut: set[int] = set()
        self._i, self._done_s = -1, 0.0

    def begin(self) -> None:
        """Begin the next window."""
        self._i += 1
        parts, i = self._parts, self._i
        overlapped = i + 1 < len(parts) and parts[i + 1].overlaps
        self._seams.begin(overlaps=parts[i].overlaps, overlapped=overlapped)

    def feed(self, piece: str) -> Heard:
        """Add to its text."""
        return self._heard(self._seams.feed(piece), self._parts[self._i].begin)

    def end(self, is_cut: bool = False) -> Heard:
        """End the window; the last one's step has the transcript.

        Args:
            is_cut: its text ended at the limit of tokens.
        """
        if is_cut:
            self._cut.add(self._i)
        return self._heard(self._seams.end(), self._parts[self._i].end)

    def _heard(self, text: str, sample: int) -> Heard:
        if text:
            self._texts.append(text)
        self._done_s = max(self._done_s, sample / self._rate)  # windows may overlap
        return Heard(text, self._done_s, self._duration_s)

    def transcript(self, language: str | None = None) -> Transcript:
        """The whole; after the last window's end."""
        segments, parts = [], self._parts
        for i, text in enumerate(self._seams.texts):
            if text.strip():
                begin, end = self._seam(i), self._seam(i + 1)
                start_s, end_s = max(begin, parts[i].begin), min(end, parts[i].end)
                times = start_s / self._rate, end_s / self._rate
                segments.append(Segment(*times, text.strip(), i in self._cut))
        text = "".join(self._texts)
        return Transcript(tuple(segments), text, self._duration_s, language)

    def _seam(self, i: int) -> int:
        """Where window `i` takes over: in the middle of what it shares with the one before."""
        if i >= len(self._parts):
            return self._parts[-1].end
        begin = self._parts[i].begin
        return (begin + self._parts[i - 1].end) // 2 if self._parts[i].overlaps else begin


def transcribing(
    ask: Ask,
    samples: np.ndarray,
    rate: int,
    *,
    language: str | None = None,
    hint: str | None = None,
    longest_s: float = LONGEST_S,
    name: str = "",
) -> Generator[Heard]:
    """Transcribe a recording; the last step has the transcript.

    Args:
        ask: answers a window's messages.
        samples: mono, `[n]`.
        rate: samples in a second.
        language, hint: see `instruction`.
        longest_s: of a window, see `longest_window`.
        name: of the recording, for messages.

    Raises:
        OutOfMemory: an answer ended for want of memory.
    """
    parts = windows(samples, rate, longest_s)
    joined, text = Joined(parts, len(samples), rate), instruction(language, hint)
    for part in parts:
        sound = samples[part.begin : part.end]
        joined.begin()
        last = None
        for last in ask(messages_for(sound, rate, text, name), max_tokens(len(sound), rate)):
            yield joined.feed(last.text)
        if last is not None and last.error is not None:
            raise last.error
        yield joined.end(last is not None and last.finish_reason == "length")
    duration_s = len(samples) / rate
    yield Heard("", duration_s, duration_s, joined.transcript(language))


def formatted(transcript: Transcript, format: str) -> str:
    """A transcript as a file of that format.

    Raises:
        UsageError: no such format.
    """
    longest_window(format)
    match format:
        case "text":
            return f"{transcript.text}\n"
        case "srt":
            return "\n".join(
                f"{i}\n{_time(s.start_s, ',')} --> {_time(s.end_s, ',')}\n{_cue(s.text)}\n"
                for i, s in enumerate(transcript.segments, 1)
            )
        case "vtt":
            cues = (
                f"{_time(s.start_s, '.')} --> {_time(s.end_s, '.')}\n{_escaped(s.text)}\n"
                for s in transcript.segments
            )
            return "\n".join(("WEBVTT\n", *cues))
    return json.dumps(to_dict(transcript, format), ensure_ascii=False) + "\n"


def to_dict(transcript: Transcript, format: str = "verbose_json") -> dict[str, Any]:
    """A transcript as JSON has it, in the fields of OpenAI's API; times in seconds."""
    if format == "json":
        return {"text": transcript.text}
    return {
        "task": "transcribe",
        "language": transcript.language,
        "duration": round(transcript.duration_s, 3),
        "text": transcript.text,
        "segments": [
            {"id": i, "start": round(s.start_s, 3), "end": round(s.end_s, 3), "text": s.text}
            for i, s in enumerate(transcript.segments)
        ],
    }


def _time(seconds: float, point: str) -> str:
    """`00:01:02,345`."""
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"


def _cue(text: str) -> str:
    """Text that no reader takes for a line of times."""
    return text.replace("-->", "->")


def _escaped(text: str) -> str:
    return _cue(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
