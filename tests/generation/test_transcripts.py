"""Transcripts of long recordings, with a listener that hears words at known times."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlxkv.errors import OutOfMemory, UsageError
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.speech.seams import Seams, Segment
from mlxkv.generation.speech.transcripts import (
    FORMATS,
    Transcript,
    formatted,
    instruction,
    longest_window,
    messages_for,
    transcribing,
)
from mlxkv.generation.speech.windows import windows

RATE = 1000


class Speech:
    """Words at known times, and the sound of them.

    Args:
        pauses: seconds between sentences; none where the speech never stops.
        noise: loudness of the background.
    """

    def __init__(self, seed: int, n: int, pauses: bool, noise: float = 0.0):
        self.rng = rng = random.Random(seed)
        vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(150)]
        self.words: list[tuple[int, int, str]] = []
        t = 0
        for i in range(n):
            length = rng.randint(120, 450)
            self.words.append((t, t + length, rng.choice(vocabulary)))
            t += length + (rng.randint(0, 40) if pauses else 0)
            if pauses and i % 12 == 11:
                t += rng.randint(300, 900)
        generator = np.random.default_rng(seed)
        self.samples = np.zeros(t + 50, np.float32)
        for start, end, _ in self.words:
            self.samples[start:end] = generator.normal(0, 0.1, end - start)
        self.samples += generator.normal(0, noise, len(self.samples)).astype(np.float32)

    @property
    def text(self) -> str:
        return " ".join(word for *_, word in self.words)

    def hear(self, messages: list[dict[str, Any]], n_tokens: int) -> Iterator[Chunk]:
        """What a listener writes: words that are cut are heard in part."""
        part, _ = messages[0]["content"]
        sound, _ = part["audio"]
        begin = (sound.ctypes.data - self.samples.ctypes.data) // self.samples.itemsize
        end, heard = begin + len(sound), []
        for start, stop, word in self.words:
            if begin <= start and stop <= end:
                heard.append(word)
            elif stop > begin and start < end:
                cut = self.rng.randint(0, len(word))
                heard.append(word[:cut] if start < end < stop else word[cut:])
        text = " ".join(word for word in heard if word) + "\n"
        while text:
            n = self.rng.randint(1, 9)
            yield Chunk(text[:n])
            text = text[n:]

    def transcript(self, longest_s: float = 30.0) -> Transcript:
        *steps, last = transcribing(self.hear, self.samples, RATE, longest_s=longest_s)
        assert last.transcript is not None
        assert "".join(step.text for step in steps) == last.transcript.text
        done = [step.done_s for step in [*steps, last]]
        assert done == sorted(done) and done[-1] == len(self.samples) / RATE
        return last.transcript


@pytest.mark.parametrize("pauses", [True, False])
@pytest.mark.parametrize("longest_s", [10.0, 30.0])
@pytest.mark.parametrize("seed", range(8))
def test_no_word_at_a_seam_is_lost_or_doubled(seed, pauses, longest_s):
    speech = Speech(seed, 400, pauses)
    made = speech.transcript(longest_s)
    assert made.text == speech.text
    assert " ".join(segment.text for segment in made.segments) == speech.text
    assert len(made.segments) >= len(speech.samples) / RATE / longest_s
    for a, b in itertools.pairwise(made.segments):
        assert 0 <= a.start_s < a.end_s <= b.start_s < b.end_s <= made.duration_s


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.02])
def test_windows_end_in_pauses_also_above_noise(noise):
    speech = Speech(1, 400, pauses=True, noise=noise)
    parts = windows(speech.samples, RATE)
    assert len(parts) > 4
    for part in parts:
        assert not part.overlaps
        assert part.end - part.begin <= 30 * RATE
        cut = [w for w in speech.words if w[0] + 20 < part.end < w[1] - 20]
        assert cut == [], part


def test_steady_sound_has_windows_that_overlap_by_two_seconds():
    samples = np.random.default_rng(0).normal(0, 0.1, 100 * RATE).astype(np.float32)
    parts = windows(samples, RATE)
    assert parts[0].begin == 0 and parts[-1].end == len(samples)
    for a, b in itertools.pairwise(parts):
        assert b.overlaps and a.end - b.begin == 2 * RATE
        assert 28 * RATE <= a.end - a.begin <= 30 * RATE


def test_silence_is_in_no_window():
    tone = np.sin(np.arange(5 * RATE)).astype(np.float32)
    silent = np.zeros(60 * RATE, np.float32)
    first, second = windows(np.concatenate((silent, tone, silent, tone, silent)), RATE)
    for part, begin in ((first, 60), (second, 125)):
        assert (begin - 1) * RATE <= part.begin <= begin * RATE
        assert (begin + 5) * RATE <= part.end <= (begin + 6) * RATE
    assert windows(silent, RATE) == windows(silent[:0], RATE) == []
    (short,) = windows(tone[:7], RATE)
    assert (short.begin, short.end) == (0, 7)
    (last,) = transcribing(lambda *_: [], silent, RATE)
    assert last.transcript == Transcript((), "", 60.0)


def seams(*texts: str) -> list[str]:
    """The texts of windows that all overlap."""
    made = Seams()
    for i, text in enumerate(texts):
        made.begin(overlaps=i > 0, overlapped=i + 1 < len(texts))
        made.feed(text)
        made.end()
    return made.texts


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        ("See the quick brown fo", "ick brown fox. It", ["See the quick brown", "fox. It"]),
        ("the quick brown fox jum", "quick brown fox, he", ["the quick brown fox,", "he"]),
        ("at last, Okay then we go", "OK then we go. Good", ["at last, Okay then we go.", "Good"]),
        ("nothing in common", "with this text", ["nothing in common", "with this text"]),
        ("see the", "a the end", ["see the", "a the end"]),
        ("see the", "the end", ["see the", "end"]),
        ("Er sagte \u00fcbrigens", "\u00dcbrigens, ja", ["Er sagte \u00fcbrigens,", "ja"]),
        ("", "only this", ["", "only this"]),
        ("only this", "", ["only this", ""]),
        ("\u4eca\u65e5\u306f\u826f\u3044\u5929", "\u306f\u826f\u3044\u5929\u6c17\u3067\u3059",
         ["\u4eca\u65e5\u306f\u826f\u3044\u5929", "\u6c17\u3067\u3059"]),
    ],
)  # fmt: skip
def test_texts_are_joined_where_both_have_the_same_words(first, second, joined):
    assert seams(first, second) == joined


def test_an_answer_that_ends_for_want_of_memory_raises_and_one_at_its_limit_says_so():
    speech = Speech(3, 20, pauses=False)

    def ask(messages: list[dict[str, Any]], n_tokens: int) -> list[Chunk]:
        assert n_tokens == 64 + round(16 * len(speech.samples) / RATE)
        return [Chunk("some words", finish_reason="length")]

    *_, last = transcribing(ask, speech.samples, RATE)
    assert last.transcript is not None and last.transcript.segments[0].is_cut

    def fail(messages: list[dict[str, Any]], n_tokens: int) -> list[Chunk]:
        return [Chunk("so", finish_reason="memory", error=OutOfMemory("no room"))]

    with pytest.raises(OutOfMemory, match="no room"):
        list(transcribing(fail, speech.samples, RATE))


MADE = Transcript(
    (Segment(0.0, 2.5, "One & <two>"), Segment(3661.0004, 3662.9996, "--> three")),
    "One & <two> --> three",
    3700.0,
    "English",
)


def test_formats():
    assert formatted(MADE, "text") == "One & <two> --> three\n"
    assert formatted(MADE, "srt") == (
        "1\n00:00:00,000 --> 00:00:02,500\nOne & <two>\n\n"
        "2\n01:01:01,000 --> 01:01:03,000\n-> three\n"
    )
    assert formatted(MADE, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nOne &amp; &lt;two&gt;\n\n"
        "01:01:01.000 --> 01:01:03.000\n-&gt; three\n"
    )
    assert json.loads(formatted(MADE, "json")) == {"text": MADE.text}
    verbose = json.loads(formatted(MADE, "verbose_json"))
    assert verbose["duration"] == 3700.0 and verbose["language"] == "English"
    assert verbose["segments"][1] == {"id": 1, "start": 3661.0, "end": 3663.0, "text": "--> three"}
    assert [longest_window(f) for f in FORMATS] == [30.0, 30.0, 10.0, 10.0, 10.0]
    with pytest.raises(UsageError, match="must be one of text, json, srt, vtt, verbose_json"):
        formatted(MADE, "ass")


def test_the_model_is_asked_with_the_sound_first():
    sound = np.zeros(10, np.float32)
    (message,) = messages_for(sound, RATE, instruction("German", " Names:\nZo\u00eb "), "a.wav")
    audio, text = message["content"]
    assert audio == {"type": "audio", "audio": (sound, RATE), "name": "a.wav"}
    assert text["text"].startswith(
        "Transcribe the following speech segment in German into German text.\n"
    )
    assert text["text"].endswith("context: Names: Zo\u00eb")
    assert "in its original language." in instruction()
