"""`mlxkv transcribe`, with a listener that tells how much it heard."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlxkv.commands import transcribe as command
from mlxkv.errors import MediaError, UsageError
from mlxkv.generation.outputs import Chunk
from mlxkv.llm.llm import LLM
from mlxkv.terminal.files.microphone import wav
from mlxkv.terminal.files.transcribe import Recording, clock, transcribe

RATE = 16_000


class Listener(LLM):
    """Writes the length of what it hears; takes sound unless told otherwise."""

    def __init__(self, *kinds: str):
        self.media = SimpleNamespace(kinds=frozenset(kinds))  # pyright: ignore
        self.asked: list[Any] = []

    def stream(self, prompt: Any, **options: Any) -> Iterator[Chunk]:
        sound, text = prompt[0]["content"]
        samples, rate = sound["audio"]
        self.asked.append((text["text"], options))
        yield Chunk(f"{len(samples) / rate:.1f} ")
        yield Chunk("seconds.\n", finish_reason="length" if len(samples) < rate else "stop")


@pytest.fixture
def sounds(tmp_path):
    """WAV files of 50 s with pauses every 10 s, of 0.5 s, and of silence."""
    time = np.arange(50 * RATE)
    tone = 0.5 * np.sin(time / 5) * (time % (10 * RATE) > RATE)
    files = {"long.wav": tone, "short.wav": tone[2 * RATE :][: RATE // 2], "silent.wav": 0 * tone}
    for name, samples in files.items():
        (tmp_path / name).write_bytes(wav(samples.astype(np.float32), RATE))
    return tmp_path


def test_text_comes_as_it_is_heard(sounds, capsys):
    llm = Listener("audio")
    recording = Recording("long.wav", sounds / "long.wav")
    assert transcribe(llm, [recording], "text", language="German", prompt=None) == 0
    out, err = capsys.readouterr()
    parts = [float(word) for word in out.split()[::2]]
    assert out == f"{' '.join(f'{n:.1f} seconds.' for n in parts)}\n" and err == ""
    assert len(parts) == 2 and 44 < sum(parts) <= 50 and max(parts) <= 30
    text, options = llm.asked[0]
    assert "in German into German text" in text
    assert options == {"max_tokens": 64 + round(16 * parts[0])}


def test_times_are_in_seconds_of_the_recording(sounds, capsys):
    llm = Listener("audio")
    transcribe(llm, [Recording("long.wav", sounds / "long.wav")], "verbose_json")
    made = json.loads(capsys.readouterr().out)
    assert made["duration"] == 50.0 and len(made["segments"]) == 5
    for i, segment in enumerate(made["segments"]):
        assert 10 * i <= segment["start"] < 10 * i + 1.1
        assert 10 * i + 9.4 < segment["end"] <= 10 * (i + 1) + 1
    transcribe(llm, [Recording("long.wav", sounds / "long.wav")], "srt")
    assert capsys.readouterr().out.count(" --> ") == 5


def test_several_recordings_are_told_apart(sounds, capsys):
    llm = Listener("audio")
    both = [Recording(name, sounds / name) for name in ("short.wav", "silent.wav")]
    transcribe(llm, both, "text")
    out, err = capsys.readouterr()
    assert out == "short.wav:\n0.5 seconds.\n\nsilent.wav:\n"
    assert "short.wav: 0:00 to 0:00: more text than can be spoken in that time; it was cut" in err
    assert "silent.wav: no speech was heard" in err
    transcribe(llm, both, "json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"file": "short.wav", "text": "0.5 seconds."},
        {"file": "silent.wav", "text": ""},
    ]


def test_a_recording_that_cannot_be_read_costs_no_other(sounds, capsys, monkeypatch):
    (sounds / "text.wav").write_text("no sound")
    some = [Recording(f"in/{n}.wav", sounds / f"{n}.wav") for n in ("text", "short")]
    llm = Listener("audio")
    assert transcribe(llm, some, "json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {"file": "in/short.wav", "text": "0.5 seconds."}
    assert "mlxkv: in/text.wav: not sound that can be read" in err
    with pytest.raises(MediaError, match=r"in/text\.wav: not sound"):
        transcribe(llm, some[:1], "text")

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "stream", interrupted)
    for format, end in (("text", "\n"), ("srt", "")):
        assert transcribe(llm, some[1:], format) == 130
        assert capsys.readouterr().out == end


def test_python_gets_the_whole_at_once_and_from_an_array(sounds):
    llm = Listener("audio")
    whole = llm.transcribe((np.full(RATE, 0.1, np.float32), RATE), temperature=0.5)
    assert whole.text == "1.0 seconds." and whole.duration_s == 1.0
    assert whole.formatted("srt").startswith("1\n00:00:00,000 --> 00:00:01,000\n1.0 seconds.")
    assert llm.asked[0][1] == {"max_tokens": 80, "temperature": 0.5}
    with pytest.raises(UsageError, match="takes no sound"):
        Listener("image").transcribe(b"RIFF")
    with pytest.raises(MediaError, match=r"call\.wav: not sound that can be read"):
        llm.transcribe(b"no sound", name="call.wav")
    with pytest.raises(UsageError, match="must be one of text, json"):
        llm.transcribe(b"RIFF", format="doc")


@pytest.mark.parametrize(
    ("files", "options", "why"),
    [
        ([], {}, "nothing to transcribe"),
        (["-", "-"], {}, "give it once"),
        (["none.wav"], {}, "none.wav: no such file"),
        (["."], {}, "not a file"),
        (["a.wav"], {"format": "ass"}, "must be one of text"),
        (["a.wav", "b.wav"], {"format": "srt"}, "takes one recording"),
    ],
)
def test_wrong_use_is_refused_before_a_model_is_loaded(files, options, why, monkeypatch):
    stdin = SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO())
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(UsageError, match=why):
        command.transcribe("no/such/model", files, **options)


def test_clock():
    assert [clock(s) for s in (0, 59.9, 61, 3723)] == ["0:00", "0:59", "1:01", "1:02:03"]
