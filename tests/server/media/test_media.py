"""Pictures and sound of requests, through the clients of all three APIs."""

from __future__ import annotations

import base64
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from mlxkv.server.media import read
from mlxkv.server.media.abilities import Abilities
from tests.support.fake_engine import MODEL, FakeEngine, says, stats

PNG, WAV = b"\x89PNG\r\n\x1a\n a picture", b"RIFF a recording"
CODED, HEARD = base64.b64encode(PNG).decode(), base64.b64encode(WAV).decode()
URL = f"data:image/png;base64,{CODED}"
ALL = Abilities(frozenset({"image", "audio"}), (70, 280, 1120))
NOTE = "[image left out: this model reads text only]"


@pytest.fixture(autouse=True)
def able(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> list[Abilities]:
    """What the model takes, its last item."""
    engine.script, found = says("A cat"), [ALL]

    async def abilities_of(engine: Any, model: Any) -> Abilities:
        return found[-1]

    monkeypatch.setattr(read, "abilities_of", abilities_of)
    return found


def chat(url: str, content: Any, **more: Any) -> str | None:
    messages: Any = [{"role": "user", "content": content}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        made = client.chat.completions.create(model=MODEL, messages=messages, **more)
    return made.choices[0].message.content


def image_url(address: str = URL, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address, **more}}


def image(name: str, data: bytes = PNG, **more: Any) -> dict[str, Any]:
    return {"type": "image", "image": data, "name": name, **more}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def contents(engine: FakeEngine) -> list[Any]:
    """The contents of the last request's messages."""
    return [message["content"] for message in engine.last.request.prompt]  # pyright: ignore


PICTURE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": CODED},
}


class TestOpenAI:
    def test_pictures_stand_where_they_were_among_the_texts(self, url, engine):
        parts = [text("one"), text("two"), image_url(), text("three"), image_url()]
        assert chat(url, parts) == "A cat"
        assert contents(engine) == [[
            text("one\ntwo"),
            image("messages.0.content.2"),
            text("three"),
            image("messages.0.content.4"),
        ]]  # fmt: skip

    @pytest.mark.parametrize(
        ("detail", "budget"), [("low", 70), ("high", 1120), ("auto", None), (None, None)]
    )
    def test_the_detail_is_a_budget_where_the_model_has_budgets(
        self, url, engine, able, detail, budget
    ):
        more = {} if detail is None else {"detail": detail}
        chat(url, [image_url(**more)])
        assert contents(engine)[0][0].get("budget") == budget
        able.append(Abilities(frozenset({"image"})))
        chat(url, [image_url(**more)])
        assert "budget" not in contents(engine)[0][0]

    def test_a_recording_is_heard(self, url, engine):
        chat(url, [{"type": "input_audio", "input_audio": {"data": HEARD, "format": "wav"}}])
        assert contents(engine) == [
            [{"type": "audio", "audio": WAV, "name": "messages.0.content.0"}]
        ]

    def test_a_tool_may_give_pictures(self, url, engine):
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        messages = [
            {"role": "user", "content": "look"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [text("here"), image_url()]},
        ]
        body = {"model": MODEL, "messages": messages}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
        assert contents(engine)[2] == [text("here"), image("messages.2.content.1")]

    def test_responses_take_pictures_and_sound_in_messages_and_results(self, url, engine):
        picture = {"type": "input_image", "image_url": URL, "detail": "low"}
        sound = {"type": "input_audio", "input_audio": {"data": HEARD, "format": "wav"}}
        said = {"type": "input_text", "text": "What?"}
        items: Any = [
            {"role": "user", "content": [said, picture, sound]},
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [picture]},
        ]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            made = client.responses.create(model=MODEL, input=items)
            assert made.output_text == "A cat"
            first = contents(engine)
            client.responses.create(model=MODEL, input="And?", previous_response_id=made.id)
        user, _, result = first
        heard = {"type": "audio", "audio": WAV, "name": "input.0.content.2"}
        assert user == [text("What?"), image("input.0.content.1", budget=70), heard]
        assert result == [image("input.2.output.0", budget=70)]
        assert contents(engine)[0][1]["image"] == PNG and contents(engine)[-1] == "And?"

    def test_only_users_and_tools_have_pictures(self, url):
        picture = {"type": "input_image", "image_url": URL}
        body = {"model": MODEL, "input": [{"role": "system", "content": [picture]}]}
        error = httpx.post(f"{url}/v1/responses", json=body).json()["error"]
        assert error["param"] == "input.0.content.0.input_image"
        assert "role system" in error["message"]


class TestAnthropic:
    def test_pictures_come_in_messages_and_in_results(self, url, engine):
        use = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True}
        messages: Any = [
            {"role": "user", "content": [text("See"), PICTURE]},
            {"role": "user", "content": "and tell"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [{**result, "content": [text("odd"), PICTURE]}]},
        ]
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
            made = client.messages.create(model=MODEL, max_tokens=9, messages=messages)
            assert client.messages.count_tokens(model=MODEL, messages=messages).input_tokens == 10
        assert made.content[0].text == "A cat"  # pyright: ignore
        user, _, tool = contents(engine)
        assert user == [text("See"), image("messages.0.content.1"), text("and tell")]
        assert tool == [text("Error: odd"), image("messages.3.content.0.content.1")]


class TestOllama:
    def test_pictures_stand_before_their_message(self, url, engine):
        with ollama.Client(url) as client:
            client.chat(MODEL, [{"role": "user", "content": "What?", "images": [PNG, PNG]}])
            pictures = [image("messages.0.images.0"), image("messages.0.images.1")]
            assert contents(engine) == [[*pictures, text("What?")]]
            client.generate(MODEL, "What?", images=[PNG])
            assert contents(engine) == [[image("images.0"), text("What?")]]
            client.generate(MODEL, images=[PNG])
            assert contents(engine) == [[image("images.0")]]

    def test_the_model_reads_no_pictures_without_its_template(self, url):
        body = {"model": MODEL, "prompt": "a", "raw": True, "images": [CODED]}
        answer = httpx.post(f"{url}/api/generate", json=body)
        assert answer.status_code == 400 and answer.json()["error"].startswith("images: ")

    @pytest.mark.parametrize("role", ["system", "assistant"])
    def test_only_users_and_tools_have_pictures(self, url, role):
        messages = [{"role": role, "content": "a", "images": [CODED]}]
        answer = httpx.post(f"{url}/api/chat", json={"model": MODEL, "messages": messages})
        assert answer.status_code == 400 and "messages.0: images" in answer.json()["error"]


PICTURE_OF = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": [image_url()]}]},
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]
    },
    "/v1/messages": {
        "max_tokens": 9,
        "messages": [{"role": "user", "content": [PICTURE]}],
    },
    "/api/chat": {"messages": [{"role": "user", "content": "", "images": [CODED]}]},
    "/api/generate": {"prompt": "", "images": [CODED]},
}
RESULT_OF = {
    "/v1/chat/completions": (
        {"messages": [{"role": "tool", "tool_call_id": "c", "content": [text("a"), image_url()]}]},
        f"a\n{NOTE}",
        "messages.content.image_url",
    ),
    "/v1/messages": (
        {
            "max_tokens": 9,
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c", "name": "look", "input": {}}],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "c",
                            "content": [text("a"), PICTURE],
                        }
                    ],
                },
            ],
        },
        f"a\n\n{NOTE}",
        "messages.content.content.image",
    ),
    "/api/chat": (
        {"messages": [{"role": "tool", "content": "a", "images": [CODED]}]},
        f"{NOTE}\na",
        "messages.images",
    ),
}


def test_usage_has_the_tokens_of_media(url, engine):
    engine.script = says("ok", stats=stats(image_tokens=5, audio_tokens=3))
    for path, place in (
        ("/v1/chat/completions", ("usage", "prompt_tokens_details")),
        ("/v1/responses", ("usage", "input_tokens_details")),
        ("/v1/messages", ("usage", "prompt_cache")),
        ("/api/chat", ("prompt_cache",)),
    ):
        found = post(url, path, **PICTURE_OF[path]).json()
        for name in place:
            found = found[name]
        assert (found["image_tokens"], found["audio_tokens"]) == (5, 3)
    engine.script = says("ok")
    usage = post(url, "/v1/chat/completions", **PICTURE_OF["/v1/chat/completions"]).json()["usage"]
    assert "image_tokens" not in usage["prompt_tokens_details"]


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(url + path, json={"model": MODEL, "stream": False, **body})


def message_of(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return error if isinstance(error, str) else error["message"]


@pytest.mark.parametrize("path", PICTURE_OF)
def test_what_the_model_cannot_see_is_refused_by_its_field(url, able, path):
    able.append(Abilities(frozenset({"audio"})))
    answer = post(url, path, **PICTURE_OF[path])
    assert answer.status_code == 400
    assert f"model '{MODEL}' takes no pictures" in message_of(answer)
    assert message_of(answer).startswith(("messages.0.", "input.0.", "images.0"))


@pytest.mark.parametrize("path", RESULT_OF)
def test_a_note_stands_for_what_a_tool_gave_and_the_model_cannot_see(url, engine, able, path):
    able.append(Abilities())
    body, content, ignored = RESULT_OF[path]
    answer = post(url, path, **body)
    assert answer.status_code == 200, answer.text
    assert contents(engine)[-1] == content
    assert ignored in answer.headers["mlxkv-ignored"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://example.com/cat.png", "operator allow example.com"),
        ("HTTP://example.com/cat.png", "operator allow example.com"),
        ("file:///etc/hostname", "must be a data URL"),
        ("ftp://example.com/cat.png", "must be a data URL"),
        ("/etc/hostname", "must be a data URL"),
        (CODED, "must be a data URL"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,%%%", "is not base64"),
        ("data:image/png;base64", "without a comma"),
    ],
)
def test_an_address_that_gives_nothing_is_refused(url, engine, address, words):
    before = len(engine.asks)
    error = post(
        url, "/v1/chat/completions", messages=[{"role": "user", "content": [image_url(address)]}]
    ).json()["error"]
    assert error["param"] == "messages.0.content.0.image_url" and words in error["message"]
    assert error["code"] == "invalid_request" and len(engine.asks) == before


@pytest.mark.parametrize(
    ("path", "part", "field"),
    [
        ("/v1/chat/completions", {"type": "video_url", "video_url": {"url": URL}}, "video_url"),
        ("/v1/chat/completions", {"type": "file", "file": {"file_data": URL}}, "file"),
        ("/v1/responses", {"type": "input_file", "file_data": URL}, "input_file"),
        ("/v1/responses", {"type": "input_image", "file_id": "f"}, "input_image.image_url"),
        ("/v1/messages", {"type": "document", "source": PICTURE["source"]}, "base64"),
        ("/v1/messages", {"type": "image", "source": {"type": "file", "file_id": "f"}}, "file"),
    ],
)
def test_parts_that_no_model_takes_are_refused_by_their_field(url, path, part, field):
    message = {"role": "user", "content": [part]}
    body = {"input": [message]} if path == "/v1/responses" else {"messages": [message]}
    answer = post(url, path, max_tokens=9, **body)
    assert answer.status_code == 400
    assert "content.0" in message_of(answer) and field in message_of(answer)


def test_a_request_has_so_many_files_and_they_so_many_bytes(url, monkeypatch):
    monkeypatch.setattr(read, "MAX_FILES", 2)
    content = [image_url()] * 3
    answer = post(url, "/v1/chat/completions", messages=[{"role": "user", "content": content}])
    assert answer.status_code == 413 and "more than 2" in message_of(answer)
    monkeypatch.setitem(read.KINDS, "image", ("pictures", len(PNG) - 1))
    for path, body in PICTURE_OF.items():
        answer = post(url, path, **body)
        assert answer.status_code == 413 and f"than {len(PNG) - 1} bytes" in message_of(answer)


def test_a_request_has_so_many_urls(url):
    content = [image_url(f"https://example.com/{i}") for i in range(17)]
    answer = post(url, "/v1/chat/completions", messages=[{"role": "user", "content": content}])
    assert answer.status_code == 413 and "17 URLs" in message_of(answer)


def test_a_picture_of_a_megabyte_comes_whole(url, engine):
    data = bytes(range(256)) * 4096
    with ollama.Client(url) as client:
        client.chat(MODEL, [{"role": "user", "content": "What?", "images": [data]}])
    assert contents(engine)[0][0]["image"] == data
