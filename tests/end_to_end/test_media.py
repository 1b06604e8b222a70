"""Pictures and sound as users send them: a process, a tiny Gemma 4, clients of all three APIs."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import ollama
import openai
import pytest
from PIL import Image

from mlxkv.terminal.files.microphone import wav
from tests.support.command_line import assert_one_line, environment, mlxkv
from tests.support.server_process import Server
from tests.support.tiny_media import write_gemma4

MODEL, QUESTION = "tiny", "What is this?"
TIME = np.arange(33 * 16_000)
TONE = 0.5 * np.sin(TIME / 5) * (TIME % 160_000 > 16_000)
SOUND = wav(TONE[:32_000].astype(np.float32), 16_000)
LONG = wav(TONE.astype(np.float32), 16_000)
"""33 s with a pause every ten."""


def png(seed: int) -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 255, (48, 96, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Pictures(BaseHTTPRequestHandler):
    """A server of one picture, and of a redirect to a path that it is asked for."""

    def do_GET(self) -> None:
        data, (path, _, there) = png(1), self.path.partition("?")
        self.send_response(302 if path == "/to" else 200)
        self.send_header("location", there)
        self.send_header("content-type", "image/png")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    """The address of a server of pictures."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    folder = home / "models" / MODEL
    folder.mkdir(parents=True)
    write_gemma4(folder, eos_token_id=[2, *range(9, 440, 5)])  # transcripts of some words
    return home


@pytest.fixture(scope="module")
def server(home, pictures) -> Iterator[Server]:
    made = Server(environment(home), "--allow-media-from", pictures)
    yield made
    assert made.stop() == 0, "".join(made.lines)
    assert not [line for line in made.lines if "failed" in line]


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def shown(url: str) -> list[Any]:
    picture = {"type": "image_url", "image_url": {"url": url}}
    content = [picture, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64_of(data)}"


def ask(client: openai.OpenAI, messages: list[Any]) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=6, temperature=0
    )


def ollama_chat(server: Any, message: dict[str, Any], options: dict[str, Any]) -> Any:
    """An answer's text over Ollama's API, the tokens of the prompt, and the restored of them."""
    body = {"model": MODEL, "messages": [message], "options": options, "stream": False}
    made = httpx.post(f"{server.url}/api/chat", json=body, timeout=60).json()
    text = made["message"]["content"]
    return text, made["prompt_eval_count"], made["prompt_eval_cached_count"]


def test_a_picture_is_the_same_prompt_in_all_apis_and_is_computed_once(server, client, pictures):
    first = ask(client, shown(data_url(png(1))))
    n, text = first.usage.prompt_tokens, first.choices[0].message.content
    assert text
    n_picture = first.usage.prompt_tokens_details.image_tokens
    again = ask(client, shown(f"http://{pictures}/a.png"))
    moved = ask(client, shown(f"http://{pictures}/to?/a.png"))
    item = {"type": "input_image", "image_url": data_url(png(1)), "detail": "auto"}
    asked: Any = [{"role": "user", "content": [item, {"type": "input_text", "text": QUESTION}]}]
    response = client.responses.create(
        model=MODEL, input=asked, max_output_tokens=16, temperature=0
    )
    assert response.output_text.startswith(text)
    for usage in (again.usage, moved.usage):
        assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (n, n - 1)
    assert response.usage.input_tokens_details.cached_tokens == n - 1

    block = {"type": "base64", "media_type": "image/png", "data": base64_of(png(1))}
    picture: Any = {"type": "image", "source": block}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as other:
        asked = [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}]
        made = other.messages.create(
            model=MODEL, max_tokens=6, messages=asked, extra_body={"temperature": 0}
        )
        assert made.content[0].text == text  # pyright: ignore[reportAttributeAccessIssue]
        assert (made.usage.input_tokens, made.usage.cache_read_input_tokens) == (1, n - 1)
        call = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "t", "content": [picture]}
        asked = [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ]
        made = other.messages.create(model=MODEL, max_tokens=6, messages=asked)
        found: Any = made.usage.model_extra
        assert found["prompt_cache"]["image_tokens"] == n_picture

    options = {"temperature": 0, "num_predict": 6}
    message = {"role": "user", "content": QUESTION, "images": [base64_of(png(1))]}
    with ollama.Client(server.url) as local:
        assert {"vision", "audio"} <= set(local.show(MODEL).capabilities or [])
    assert ollama_chat(server, message, options) == (text, n, n - 1)


def test_sound_is_heard_and_written_down(server, client):
    part = {"type": "input_audio", "input_audio": {"data": base64_of(SOUND), "format": "wav"}}
    made = ask(client, [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}])
    assert made.usage.prompt_tokens_details.audio_tokens == 50  # one for 40 ms
    message = {"role": "user", "content": QUESTION, "images": [base64_of(SOUND)]}
    _, n, n_cached = ollama_chat(server, message, {"num_predict": 6})
    assert (n, n_cached) == (made.usage.prompt_tokens, n - 1)
    made = {}
    for form in ("json", "text", "srt", "vtt", "verbose_json"):
        made[form] = client.audio.transcriptions.create(
            model=MODEL, file=("a.wav", LONG), response_format=form
        )
    text = made["json"].text
    assert text and made["text"] == f"{text}\n"
    assert len(made["verbose_json"].segments) == made["srt"].count(" --> ") == 4
    assert made["vtt"].startswith("WEBVTT\n\n00:00:0") and made["verbose_json"].duration == 33
    stream = client.audio.transcriptions.create(model=MODEL, file=("a.wav", LONG), stream=True)
    *deltas, done = stream
    assert "".join(event.delta for event in deltas) == done.text == text  # pyright: ignore


def test_what_cannot_be_read_is_one_line_in_every_api(server, client, home, pictures):
    bad = png(2)[:999]
    bodies: dict[str, Any] = {
        "/v1/chat/completions": {"messages": shown(data_url(bad))},
        "/v1/responses": {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": data_url(bad)}]}
            ]
        },
        "/api/chat": {"messages": [{"role": "user", "content": "", "images": [base64_of(bad)]}]},
    }
    for path, body in bodies.items():
        for stream in (False, True):
            answer = httpx.post(server.url + path, json={"model": MODEL, "stream": stream, **body})
            assert answer.status_code == 400 and "0: the picture is damaged" in answer.text
    for url in ("http://127.0.0.1:1/a.png", f"http://{pictures}/to?http://127.0.0.1:1/a.png"):
        with pytest.raises(openai.BadRequestError, match="operator allow 127") as caught:
            ask(client, shown(url))
        assert "--" not in caught.value.message
    click = wav(np.full(10, 0.5, np.float32), 16_000)
    with pytest.raises(openai.BadRequestError, match=r"a\.wav: 0\.001 s of sound"):
        client.audio.transcriptions.create(model=MODEL, file=("a.wav", click))

    (home / "cut.png").write_bytes(bad)
    (home / "click.wav").write_bytes(click)
    for *command, file in (
        ("run", MODEL, "Hi", "--image", "cut.png"),
        ("run", "--server", server.url, "-m", MODEL, "Hi", "--image", "cut.png"),
        ("transcribe", MODEL, "click.wav"),
    ):
        done = mlxkv(*command, str(home / file), env=environment(home))
        assert_one_line(done, 2, file)
