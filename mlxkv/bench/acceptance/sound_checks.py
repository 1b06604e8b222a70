"""Sound: speech is made by espeak-ng if that is installed."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.bench.acceptance.limit_checks import within
from mlxkv.bench.acceptance.media import different, needs, shown_again
from mlxkv.bench.acceptance.report import Skip, Wrong, brief, holds, said
from mlxkv.bench.acceptance.subject import Subject, parts, user
from mlxkv.llm.plan import plan

if TYPE_CHECKING:
    import numpy as np

SPOKEN = "The train to Hamburg leaves at seven from platform nine."
QUESTION = "What is the capital of France?"
DIGITS = {"7": "seven", "9": "nine"}
ALIKE = 0.8
"""Part of the words that a transcript must have in their order."""
SPEECH_S = 60
RATE = 16_000
LONG_S = 35.0


def spoken(text: str) -> bytes:
    """A WAV file of a spoken sentence.

    Raises:
        Skip: espeak-ng is not installed, or fails.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise Skip("espeak-ng, which makes the speech, is not installed")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "speech.wav"
        command = [program, "-v", "en", "-s", "140", "-w", str(file), text]
        try:
            done = subprocess.run(command, capture_output=True, timeout=SPEECH_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Skip(f"espeak-ng failed: {type(error).__name__}") from None
        if done.returncode or not file.exists():
            raise Skip(f"espeak-ng failed with {done.returncode}")
        return file.read_bytes()


def tone(seconds: float = 2.0, hertz: float = 220) -> tuple[np.ndarray, int]:
    """A tone that comes and goes."""
    import numpy as np

    at = np.arange(round(RATE * seconds)) / RATE
    loud = (at % 5.0 < 4.0) * (0.6 + 0.4 * np.sin(7 * at))
    return (0.2 * loud * np.sin(2 * np.pi * hertz * at)).astype(np.float32), RATE


def marked(subject: Subject, n: int) -> tuple[np.ndarray, int]:
    """A tone that no earlier run had."""
    return tone(2.0, 200 + 100 * n + int(subject.mark, 16) % 4096 / 64)


def about(question: str, sound: Any) -> list[dict[str, Any]]:
    """A question about sound."""
    return user(parts(("audio", sound), question))


def words(text: str) -> Sequence[str]:
    """The words of a sentence, numbers spelled out."""
    found = (match[0] for match in re.finditer(r"\w+", text.casefold()))
    return [DIGITS.get(word, word) for word in found]


def transcribes(subject: Subject) -> str:
    """A spoken sentence is written down."""
    needs(subject, "audio")
    text = subject.llm.transcribe(spoken(SPOKEN)).text
    alike = difflib.SequenceMatcher(None, words(SPOKEN), words(text), autojunk=False).ratio()
    if alike < ALIKE:
        raise Wrong(f"{alike:.0%} of {SPOKEN!r}; got {brief(text)!r}")
    return brief(text)


def answers(subject: Subject) -> str:
    """A spoken question is answered."""
    needs(subject, "audio")
    made = subject.ask(about("Answer the question in one word.", spoken(QUESTION)))
    holds(made.stats.audio_tokens > 0, "it is not in the prompt")
    said(made.text, ["Paris"])
    return brief(made.text)


def is_heard(subject: Subject) -> str:
    """What the model says next depends on the sound."""
    needs(subject, "audio")
    sounds = (marked(subject, n) for n in (3, 12))
    return different(subject, *(about("What is this?", sound) for sound in sounds))


def long_sound(subject: Subject) -> str:
    """A recording of more than 30 seconds is transcribed in windows."""
    needs(subject, "audio")
    *_, last = subject.llm.stream_transcript(tone(LONG_S), max_tokens=4)
    holds(last.transcript is not None, "there is no transcript at the end")
    holds(last.done_s == LONG_S, f"it ended at {last.done_s} of {LONG_S:.0f} s")
    return f"{LONG_S:.0f} s"


def another_question(subject: Subject) -> str:
    """Another question about a recording computes nothing of it."""
    needs(subject, "audio")
    sound = marked(subject, 1)
    return shown_again(subject, about("What is this?", sound), about("How loud is it?", sound))


def memory(subject: Subject) -> str:
    """Peak memory with sound is within the plan for it."""
    needs(subject, "audio")
    sound, llm = marked(subject, 2), subject.llm
    stats = subject.ask(about("What is this?", sound), max_tokens=8).stats
    context = stats.prompt_tokens + 8
    planned = plan(llm.path, context=context, kv_type=llm.kv_type, audio=[sound])
    return within(subject, stats, planned)
