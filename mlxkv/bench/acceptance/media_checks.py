"""Pictures and sound. Pictures are drawn, and speech is made by espeak-ng if that is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.bench.acceptance.report import Skip, Wrong, holds, said
from mlxkv.bench.acceptance.subject import Subject, parts, user
from mlxkv.kv.types import STEP

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SPOKEN = "The train to Hamburg leaves at seven from platform nine."
SPEECH_S = 60


def _needs(subject: Subject, kind: str) -> None:
    subject.needs_chat()
    if kind not in subject.kinds:
        raise Skip(f"the model takes no {'pictures' if kind == 'image' else 'sound'}")


def drawn(*shapes: tuple[str, str, tuple[int, int]], words: str = "") -> Image:
    """A white picture of 512 x 384 pixels with shapes (`circle` or `square`, colour, corner)."""
    from PIL import Image, ImageDraw, ImageFont

    made = Image.new("RGB", (512, 384), "white")
    draw = ImageDraw.Draw(made)
    for shape, colour, (x, y) in shapes:
        draw_shape = draw.ellipse if shape == "circle" else draw.rectangle
        draw_shape((x, y, x + 96, y + 96), fill=colour)
    if words:
        draw.text((64, 144), words, "black", ImageFont.load_default(96))
    return made


CIRCLE = ("circle", "red", (32, 144))


def _about(subject: Subject, question: str, *pictures: Image) -> str:
    _needs(subject, "image")
    content = parts(*(("image", picture) for picture in pictures), question)
    return subject.ask(user(content)).text


def describes(subject: Subject) -> str:
    """A red circle is described."""
    answer = _about(subject, "What is in this picture?", drawn(CIRCLE))
    said(answer, ["red"], ["circle", "dot", "disc", "disk", "ball", "round"])
    return answer.strip()[:60]


def counts(subject: Subject) -> str:
    """Three squares are counted."""
    squares = [("square", "blue", (x, 144)) for x in (32, 208, 384)]
    answer = _about(subject, "How many squares are there? Answer with a number.", drawn(*squares))
    said(answer, ["3", "three"])
    return answer.strip()[:60]


def locates(subject: Subject) -> str:
    """A circle is on the left."""
    question = "Is the circle on the left or on the right? Answer in one word."
    answer = _about(subject, question, drawn(CIRCLE))
    said(answer, ["left"])
    return answer.strip()[:60]


def reads(subject: Subject) -> str:
    """Digits are read."""
    answer = _about(subject, "What number is written here?", drawn(words="42817"))
    said(answer, ["42817", "42,817", "42 817"])
    return answer.strip()[:60]


def compares(subject: Subject) -> str:
    """Two pictures are told apart."""
    question = "Which picture shows a square, the first or the second? Answer in one word."
    pictures = drawn(CIRCLE), drawn(("square", "green", (208, 144)))
    answer = _about(subject, question, *pictures)
    said(answer, ["second", "2"])
    return answer.strip()[:60]


def picture_reuse(subject: Subject) -> str:
    """Another question about a picture computes nothing of the picture."""
    _needs(subject, "image")
    return _second_question(subject, "image", drawn(CIRCLE, ("circle", "green", (300, 40))))


def second_picture(subject: Subject) -> str:
    """A second picture computes only itself and what follows."""
    _needs(subject, "image")
    subject.needs_pages()
    first = user(parts(("image", drawn(("square", "red", (10, 10)))), "What is this?"))
    n_first = subject.ask(first, max_tokens=1).stats.prompt_tokens
    answer = {"role": "assistant", "content": "A square."}
    second = user(parts(("image", drawn(("square", "blue", (10, 10)))), "And this?"))
    stats = subject.ask([*first, answer, *second], max_tokens=1).stats
    new = stats.prompt_tokens - n_first
    holds(
        stats.computed_tokens <= new + STEP,
        f"{stats.computed_tokens:,} tokens were computed, and {new:,} are new",
    )
    return f"{stats.restored_tokens:,} of {stats.prompt_tokens:,} tokens restored"


def _second_question(subject: Subject, kind: str, source: object) -> str:
    subject.needs_pages()
    question, other = "What is this?", "Tell me more about it, please."
    bare = subject.ask(user(question), max_tokens=1).stats.prompt_tokens
    first = subject.ask(user(parts((kind, source), question)), max_tokens=1).stats
    n_rows = first.prompt_tokens - bare
    holds(n_rows > 0, "it takes no place in the prompt")
    again = subject.ask(user(parts((kind, source), other)), max_tokens=1).stats
    holds(
        again.restored_tokens >= n_rows
        and again.computed_tokens < again.prompt_tokens - n_rows + 1,
        f"{again.computed_tokens:,} of {again.prompt_tokens:,} tokens were computed, and "
        f"{n_rows:,} are its own",
    )
    return f"{again.restored_tokens:,} of {again.prompt_tokens:,} tokens restored"


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
        done = subprocess.run(command, capture_output=True, timeout=SPEECH_S, check=False)
        if done.returncode or not file.exists():
            raise Skip(f"espeak-ng failed with {done.returncode}")
        return file.read_bytes()


def transcribes(subject: Subject) -> str:
    """A spoken sentence is written down."""
    _needs(subject, "audio")
    text = subject.llm.transcribe(spoken(SPOKEN)).text
    wanted = re.findall(r"\w+", SPOKEN.casefold().replace("seven", "7").replace("nine", "9"))
    heard = re.findall(r"\w+", text.casefold().replace("seven", "7").replace("nine", "9"))
    n_right = sum(word in heard for word in wanted)
    if n_right < 0.8 * len(wanted):
        raise Wrong(f"{n_right} of {len(wanted)} words; got {text[:60]!r}")
    return text[:60]


def hears(subject: Subject) -> str:
    """A question about what was said is answered."""
    _needs(subject, "audio")
    content = parts(("audio", spoken(SPOKEN)), "Which city does the train go to?")
    answer = subject.ask(user(content)).text
    said(answer, ["Hamburg"])
    return answer.strip()[:60]


def sound_reuse(subject: Subject) -> str:
    """Another question about a recording computes nothing of the recording."""
    _needs(subject, "audio")
    return _second_question(subject, "audio", (tone(), 16_000))


def long_sound(subject: Subject) -> str:
    """A recording of more than 30 seconds is transcribed in windows."""
    _needs(subject, "audio")
    *_, last = subject.llm.stream_transcript((tone(35.0), 16_000), max_tokens=4)
    holds(last.transcript is not None, "there is no transcript at the end")
    holds(last.done_s == 35.0, f"it ended at {last.done_s} of 35 s")
    return "35 s"


def tone(seconds: float = 2.0) -> np.ndarray:
    """Samples of a tone that comes and goes, at 16 kHz."""
    import numpy as np

    at = np.arange(round(16_000 * seconds)) / 16_000
    loud = (at % 5.0 < 4.0) * (0.6 + 0.4 * np.sin(7 * at))
    return (0.2 * loud * np.sin(2 * np.pi * 220 * at)).astype(np.float32)
