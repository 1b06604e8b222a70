"""POST /v1/audio/transcriptions, through OpenAI's own client."""

from __future__ import annotations

import io
import time
import wave
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from mlxkv.errors import KVCacheFull
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.speech.languages import language_name
from mlxkv.media.sound import RATE
from mlxkv.server.media.abilities import Abilities
from mlxkv.server.speech import routes, sounds
from mlxkv.server.speech.upload import MAX_FIELD_BYTES, MAX_FIELDS
from tests.support.fake_engine import MODEL, FakeEngine, options_of, says, serving, stats

PATH = "/v1/audio/transcriptions"


def wav(*seconds: float) -> bytes:
    """Noise and silence in turn, of these seconds, as the file of a recorder."""
    random = np.random.default_rng(1)
    parts = [random.normal(0, 3000 * (i % 2 == 0), round(s * RATE)) for i, s in enumerate(seconds)]
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(np.concatenate(parts).astype("<i2").tobytes())
    return file.getvalue()


SHORT, LONG = wav(0.5), wav(7, 2, 7)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
def able(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> list[Abilities]:
    """What the model takes, its last item; each window is answered with its number."""
    found, said = [Abilities(frozenset({"audio"}))], iter(range(1, 100))
    figures = stats(generated_tokens=2, audio_tokens=7)
    engine.script = lambda ask: says("Part", f" {next(said)}.", stats=figures)(ask)
    engine.asks.clear()

    async def abilities_of(engine: Any, model: Any) -> Abilities:
        return found[-1]

    monkeypatch.setattr(routes, "abilities_of", abilities_of)
    return found


def transcribe(client: openai.OpenAI, data: bytes = SHORT, **options: Any) -> Any:
    return client.audio.transcriptions.create(model=MODEL, file=("a.wav", data), **options)


def post(url: str, data: bytes = SHORT, name: str = "a.wav", **fields: Any) -> httpx.Response:
    return httpx.post(url + PATH, data={"model": MODEL, **fields}, files={"file": (name, data)})


def error_of(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def test_a_recording_is_one_question_to_the_model(client, engine):
    made = transcribe(client, language="de", prompt="Names: Ada,\nGrace")
    assert made.text == "Part 1."
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.type) == (10, 2, "tokens")
    (ask,) = engine.asks
    ((sound, asked),) = [message["content"] for message in ask.request.prompt]
    samples, rate = sound["audio"]
    assert (sound["type"], sound["name"]) == ("audio", "a.wav")
    assert (len(samples), rate) == (RATE // 2, RATE)
    assert "German" in asked["text"] and "Names: Ada, Grace" in asked["text"]
    assert options_of(ask) == {"max_tokens": 72, "temperature": 0.0}


def test_windows_are_asked_for_in_turn_and_have_their_times(client, engine):
    made = transcribe(client, LONG, response_format="verbose_json", temperature=0.5)
    assert made.text == "Part 1. Part 2." and made.duration == 16.0
    first, second = made.segments
    assert [first.text, second.text] == ["Part 1.", "Part 2."]
    assert first.start == 0 and 7 < first.end <= second.start < 9 and second.end == 16
    assert made.usage.input_tokens == 20
    assert made.usage.input_token_details == {"audio_tokens": 14, "text_tokens": 6}
    assert [options_of(ask)["temperature"] for ask in engine.asks] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("format", "kind", "text"),
    [
        ("text", "text/plain", "Part 1.\n"),
        ("srt", "text/plain", "1\n00:00:00,000 --> 00:00:00,500\nPart 1.\n"),
        ("vtt", "text/vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:00.500\nPart 1.\n"),
    ],
)
def test_text_and_subtitles_are_no_json(url, format, kind, text):
    answer = post(url, response_format=format)
    assert answer.status_code == 200 and answer.text == text
    assert answer.headers["content-type"].startswith(kind)


def test_a_stream_has_the_text_as_it_comes(client, url):
    events = list(transcribe(client, wav(18, 4, 18), stream=True))
    deltas, done = events[:-1], events[-1]
    assert {event.type for event in deltas} == {"transcript.text.delta"} and len(deltas) > 2
    assert "".join(event.delta for event in deltas) == done.text == "Part 1. Part 2."
    assert done.type == "transcript.text.done" and done.usage.output_tokens == 4
    assert post(url, stream="true").text.endswith("data: [DONE]\n\n")


def test_silence_says_nothing(client, engine):
    made = transcribe(client, wav(0, 2), response_format="verbose_json")
    assert made.text == "" and made.segments == [] and engine.asks == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"The cat sat.", "a.wav: "),
        (b"", "a.wav: the file is empty"),
        (SHORT[:44], "a.wav: "),
    ],
)
def test_what_is_no_sound_is_refused_by_its_name(url, engine, data, words):
    assert error_of(post(url, data)).startswith(words)
    assert engine.asks == []


def test_a_model_that_hears_nothing_is_named(url, able):
    able.append(Abilities(frozenset({"image"})))
    assert error_of(post(url)) == f"model: '{MODEL}' takes no sound"
    assert "not found" in error_of(post(url, model="whisper-1"), 404)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": "diarized_json"}, "response_format: "),
        ({"stream": "true", "response_format": "srt"}, "stream is for"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities[]"),
        ({"timestamp_granularities[]": "segment"}, "timestamp_granularities is for"),
        ({"include[]": "logprobs"}, "include[]"),
        ({"temperature": "-1"}, "temperature: "),
        ({"temperature": "nan"}, "temperature: "),
        ({"language": "x" * 101}, "language: "),
        ({"prompt": "x" * (MAX_FIELD_BYTES + 1)}, "the form cannot be read"),
        ({f"x{i}": "1" for i in range(MAX_FIELDS)}, "the form cannot be read"),
    ],
)
def test_fields_that_cannot_be_met_are_refused(url, fields, words):
    assert words in error_of(post(url, **fields))


def test_the_body_is_a_form_with_one_file(url):
    assert "must be a form" in error_of(httpx.post(url + PATH, json={"model": MODEL}))
    assert "file: Field required" in error_of(httpx.post(url + PATH, files={"model": (None, "a")}))
    two = [("file", ("a.wav", SHORT)), ("file", ("b.wav", SHORT))]
    answer = httpx.post(url + PATH, data={"model": MODEL}, files=two)
    assert "Too many files" in error_of(answer)
    answer = httpx.post(
        url + PATH, content=b"--x\r\n", headers={"content-type": "multipart/form-data"}
    )
    assert "the form cannot be read" in error_of(answer)
    answer = post(url, chunking_strategy="auto", unheard_of="1")
    assert answer.headers["mlxkv-ignored"] == "unheard_of, chunking_strategy"


def test_a_form_is_bounded_like_every_body():
    with serving(FakeEngine(), max_body_bytes=10_000) as url:
        assert "larger than 10,000 bytes" in error_of(post(url), 413)


def test_no_recording_is_written_to_disk(client, monkeypatch):
    written = []
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", lambda self: written.append(1))
    assert transcribe(client, wav(18, 4, 18)).text == "Part 1. Part 2."
    assert written == []


def test_memory_that_ends_an_answer_is_an_error(client, url, engine):
    full = KVCacheFull(10, 20, 15)
    engine.script = lambda ask: [Chunk("Pa", 1), Chunk("", None, "memory", stats(), error=full)]
    assert "cannot grow" in error_of(post(url), 503)
    with pytest.raises(openai.APIError, match="cannot grow"):
        list(transcribe(client, stream=True))


def test_a_client_that_leaves_cancels_the_answer(url, engine):
    engine.script = lambda ask: [Chunk("Part", 1), 30.0]
    fields = {"model": MODEL, "stream": "true"}
    with httpx.stream("POST", url + PATH, data=fields, files={"file": SHORT}) as answer:
        lines = answer.iter_lines()
        assert "Part" in next(lines) and not engine.answers[-1].cancelled.is_set()
    assert engine.answers[-1].cancelled.wait(10)


def test_an_owner_has_so_much_sound_transcribed_at_a_time(url, engine, monkeypatch):
    monkeypatch.setattr(sounds, "MAX_SECONDS", 0.7)
    engine.script = lambda ask: [Chunk("Part", 1), 30.0]
    fields = {"model": MODEL, "stream": "true"}
    with httpx.stream("POST", url + PATH, data=fields, files={"file": SHORT}) as answer:
        lines = answer.iter_lines()
        assert "Part" in next(lines)
        assert "retry in" in error_of(post(url), 503)
    engine.script = says("Part", " 2")
    until = time.monotonic() + 10
    while (answer := post(url)).status_code == 503 and time.monotonic() < until:
        time.sleep(0.01)
    assert answer.json()["text"] == "Part 2"


def test_codes_of_languages_become_names():
    assert [language_name(text) for text in ("de", "PT-br", "zh_CN", "Klingon\n ", "", None)] == [
        "German", "Portuguese", "Chinese", "Klingon", None, None,
    ]  # fmt: skip
