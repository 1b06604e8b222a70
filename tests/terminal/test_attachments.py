"""Pictures and recordings of messages, with a model that repeats what it was given."""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mlxkv.errors import MediaError, UsageError
from mlxkv.generation.outputs import Chunk
from mlxkv.sampling.params import SamplingParams
from mlxkv.server.client import Server
from mlxkv.store.settings import Given
from mlxkv.terminal import repl
from mlxkv.terminal.answer_options import AnswerOptions
from mlxkv.terminal.completion import Completions
from mlxkv.terminal.files import attachments, microphone
from mlxkv.terminal.files.attachments import Attachment
from mlxkv.terminal.files.dropped import split
from mlxkv.terminal.one_shot import one_answer
from mlxkv.terminal.remote import RemoteSpeaker
from mlxkv.terminal.slash_commands import COMMANDS, Chat, execute
from mlxkv.terminal.start import Start


def encoded(form: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, form)
    return file.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG")
WAV = microphone.wav(np.full(400, 0.5, np.float32), 16_000)
SIZE = f"{len(PNG)} B"


class Talk:
    """A conversation that keeps what is sent."""

    append_only = None
    begun = None

    def __init__(self, system: str | None):
        self.messages: list[dict[str, Any]] = []

    def send(self, text: Any, **options: Any) -> Iterator[Chunk]:
        yield Chunk("Seen.", finish_reason="stop")
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "Seen."},
        ]

    def clear(self) -> None:
        self.messages = []

    def restore_turns(self, turns: Sequence[dict[str, Any]]) -> None:
        self.messages = list(turns)


class Speaker:
    """A model of these kinds."""

    name, title, can_chat, context = "m", "m", True, 100
    recommended = SamplingParams()

    def __init__(self, *kinds: str):
        self.media_kinds = frozenset(kinds)
        self.asked: Any = None

    def conversation(self, system: str | None, kv_from: Any = None) -> Talk:
        return Talk(system)

    def memory(self) -> None:
        return None

    def stream(self, prompt: Any, *args: Any) -> Iterator[Chunk]:
        self.asked = prompt
        yield Chunk("Seen.", finish_reason="stop")


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, Path]:
    """Files by name; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    contents = {
        "a.png": PNG,
        "My Photo (1).PNG": PNG + b"1",
        "Screenshot 2026-01-01 at 3.45.12\u202fPM.png": PNG + b"2",
        "it's.jpg": JPEG,
        "b.m4a": WAV,
        "cut.png": PNG[: len(PNG) // 2],
        "no-suffix": WAV,
        "notes.txt": b"text",
        "text.jpg": b"text",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


def chat_of(*kinds: str, **options: Any) -> Chat:
    chat = Chat(Speaker(*kinds), AnswerOptions(), **options)  # pyright: ignore[reportArgumentType]
    chat.begin(None)
    return chat


def sent(chat: Chat) -> Any:
    """The last message of the user."""
    return [m["content"] for m in chat.conversation.messages if m["role"] == "user"][-1]


def picture(data: bytes, name: str) -> dict[str, Any]:
    return {"type": "image", "image": data, "name": name}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "name",
    ["a.png", "My Photo (1).PNG", "Screenshot 2026-01-01 at 3.45.12\u202fPM.png", "it's.jpg"],
)
def test_a_dropped_path_is_found_in_every_spelling_of_terminals(name, files):
    path = files[name]
    escaped = "".join(c if c.isalnum() or c in "/._-\u202f" else f"\\{c}" for c in str(path))
    for spelled in (
        escaped,  # Terminal, iTerm2
        shlex.quote(str(path)),  # VS Code
        f'"{path}"',
        path.as_uri(),  # Linux
        str(path),  # as Finder copies it
        f"~/{path.name}",
        f"./{path.name}",
    ):
        (found,) = [part for part in split(f"{spelled} ") if isinstance(part, Path)]
        assert found.read_bytes() == path.read_bytes(), spelled
        before, found, behind = split(f"What is ({spelled}) about?")
        assert isinstance(found, Path) and found.name == name
        assert (before, behind) == ("What is (", ") about?")


def test_several_dropped_files_keep_their_order(files):
    a, b = files["a.png"], files["b.m4a"]
    assert split(f"{a} {b} compare them") == [a, " ", b, " compare them"]
    assert split(f"First {a}, then '{b}'.") == ["First ", a, ", then ", b, "."]
    assert split(f"{a}\n{b}\nWhat are they?") == [a, "\n", b, "\nWhat are they?"]


@pytest.mark.parametrize(
    "message",
    [
        "a.png and b.m4a by name alone",
        "https://example.org/a.png",
        "x/a.png, or a/no/such/file.png",
        "/no/such/file.png",
        "./notes.txt is text, and so is .",
        "'don't",
        "file://other.example/a.png",
        "see /\0.png or /" + "x" * 5000 + ".png",
        "code = ./a.png\nmore code",
        "",
    ],
)
def test_what_is_no_dropped_file_stays_text(message, files):
    assert split(message) == [message]


def test_a_message_with_a_path_has_the_picture_in_its_place(files, capsys):
    chat = chat_of("image", "audio")
    repl._turn(chat, f"{files['a.png']}")
    assert sent(chat) == [picture(PNG, "a.png")]
    assert f"(with picture a.png, {SIZE})" in capsys.readouterr().out
    chat.image_budget = 560
    repl._turn(chat, f"Is {files['a.png']} like {files['no-suffix']}?")
    sound = {"type": "audio", "audio": WAV, "name": "no-suffix"}
    assert sent(chat) == [
        text("Is"), {**picture(PNG, "a.png"), "budget": 560}, text("like"), sound, text("?"),
    ]  # fmt: skip
    repl._turn(chat, "and again")
    assert sent(chat) == "and again"


def test_commands_attach_files_to_the_next_message(files, capsys):
    chat = chat_of("image", "audio")
    assert execute(chat, "/image a.png") == f"(the next message has picture a.png, {SIZE})\n"
    execute(chat, "/image My Photo (1).PNG")
    execute(chat, f"/audio {shlex.quote(str(files['b.m4a']))}")
    repl._turn(chat, "Compare.")
    kinds = [part["type"] for part in sent(chat)]
    assert kinds == ["image", "image", "audio", "text"]
    repl._turn(chat, "And now?")
    assert sent(chat) == "And now?"
    for line, why in {
        "/image nothing.png": "nothing.png: no such file",
        "/image b.m4a": "b.m4a: no picture that can be read",
        "/audio notes.txt": "notes.txt: no sound that can be read",
        "/image": "/image takes the path of a file",
        "/image .": "not a file",
    }.items():
        with pytest.raises(UsageError, match=why):
            execute(chat, line)
    assert chat.attached == []


def test_a_damaged_file_is_refused_before_the_message_and_costs_no_other(files):
    chat = chat_of("image")
    execute(chat, "/image a.png")
    for line in ("/image cut.png", "/image text.jpg", "./cut.png", "What is ./text.jpg?"):
        with pytest.raises(MediaError, match=r"(cut\.png|text\.jpg): not a picture"):
            repl._turn(chat, line)
    repl._turn(chat, "What is it?")
    assert sent(chat) == [picture(PNG, "a.png"), text("What is it?")]


def test_tab_completes_commands_and_the_paths_of_their_files(files, tmp_path):
    (tmp_path / "album 1").mkdir()
    (tmp_path / "album 1" / "c.png").touch()

    def lines(line: str) -> list[str]:
        found = Completions(COMMANDS).get_completions(Document(line), CompleteEvent())
        return [line[: len(line) + one.start_position] + one.text for one in found]

    assert lines("/im") == ["/image"] and lines("/s") == ["/save", "/set", "/show"]
    assert lines("/image M") == [r"/image My\ Photo\ \(1\).PNG"]
    assert lines("/image a.png al") == [r"/image a.png album\ 1/"]
    assert lines(r"/image ~/album\ 1/") == [r"/image ~/album\ 1/c.png"]
    assert lines("/audio ./") == [r"/audio ./album\ 1/", "/audio ./b.m4a"]
    assert "/load notes.txt" in lines("/load ")
    for line in ("", "/image no/such/", "/set ", "what is /im", "/clear a"):
        assert lines(line) == []
    for line in lines("/image "):
        if not line.endswith("/") and "cut" not in line and "text" not in line:
            execute(chat_of("image"), line)  # as it is spelled, it is found


def test_a_model_that_cannot_take_it_says_so(files, capsys):
    chat = chat_of("audio")
    for line in (f"{files['a.png']} ", "/image a.png"):
        with pytest.raises(UsageError, match="m takes no pictures"):
            repl._turn(chat, line)
    repl._turn(chat, f"Where is {files['a.png']}?")
    assert sent(chat) == f"Where is {files['a.png']}?"
    assert "(m takes no pictures: a.png stays a text)" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no command '/nonesuch'"):
        repl._turn(chat, "/nonesuch")


def test_a_saved_chat_has_paths_and_reads_them_again(files, tmp_path, capsys):
    chat = chat_of("image")
    repl._turn(chat, f"Look: {files['a.png']}")
    repl._turn(chat, f"And {files['My Photo (1).PNG']}")
    execute(chat, "/save talk.json")
    content = json.loads((tmp_path / "talk.json").read_text())
    assert content["version"] == 2
    part = content["messages"][0]["content"][1]
    assert part["path"] == str(files["a.png"]) and "image" not in part
    assert "\\u0000" not in (tmp_path / "talk.json").read_text()

    again = chat_of("image")
    assert execute(again, "/load talk.json") == "4 messages\n"
    assert again.conversation.messages == chat.conversation.messages
    execute(again, "/save again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content

    files["a.png"].unlink()
    files["My Photo (1).PNG"].write_bytes(PNG + b"changed")
    third = chat_of("image")
    shown = execute(third, "/load talk.json")
    assert "(picture a.png is gone: a note stands in its place)" in shown
    assert "(picture My Photo (1).PNG has changed: a note stands in its place)" in shown
    first = third.conversation.messages[0]["content"]
    assert first == "Look:\n[picture a.png, which is not here any more]"


def test_text_alone_is_saved_as_before(files, tmp_path):
    chat = chat_of()
    repl._turn(chat, "hello")
    execute(chat, "/save talk.json")
    content = json.loads((tmp_path / "talk.json").read_text())
    assert content["version"] == 1 and content["messages"][0]["content"] == "hello"


@pytest.mark.parametrize(
    "content",
    [
        [],
        [{"type": "image"}],
        [{"type": "image", "path": 3, "sha256": "x", "name": "n"}],
        [{"type": "text"}],
        ["text"],
        3,
    ],
)
def test_a_file_of_other_content_is_refused(content, files, tmp_path):
    chat = chat_of("image")
    message = {"role": "user", "content": content}
    raw = {"format": "mlxkv conversation", "version": 2, "messages": [message]}
    (tmp_path / "bad.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=r"messages\[0\] must have"):
        execute(chat, "/load bad.json")


class Killed(BaseException):
    """The process ends here."""


def test_the_last_chat_goes_on_with_its_picture(files, capsys):
    chat = chat_of("image")
    parts = [text("Look:"), picture(PNG, "a.png")]
    chat.paths[Attachment("image", "a.png", PNG).digest] = str(files["a.png"])

    def send(*args: Any, **options: Any) -> Iterator[Chunk]:
        raise Killed
        yield

    chat.conversation.send = send
    with pytest.raises(Killed):
        repl.answer(chat, parts)
    again = chat_of("image")
    repl._resume(again)
    assert sent(again) == parts
    assert ">>> Look: (picture a.png)" in capsys.readouterr().out


def test_one_answer_has_files_before_its_prompt(files, capsys):
    speaker = Speaker("image")
    attached = [attachments.read(files["a.png"])]

    def ask(raw: bool, model: Speaker) -> int:
        start = Start(AnswerOptions(), attached=attached)
        return one_answer(model, "What is this?", start, raw=raw, as_json=False)  # pyright: ignore[reportArgumentType]

    assert ask(False, speaker) == 0
    assert speaker.asked[-1]["content"] == [picture(PNG, "a.png"), text("What is this?")]
    with pytest.raises(UsageError, match="m takes no pictures"):
        ask(False, Speaker())
    with pytest.raises(UsageError, match="has no place with --raw"):
        ask(True, speaker)


def test_a_server_gets_files_in_base64(monkeypatch):
    speaker = RemoteSpeaker(Server.at("127.0.0.1:9", None), "m", Given())
    shown = {"capabilities": ["completion", "vision", "audio"]}
    monkeypatch.setattr(Server, "ask", lambda *args: shown)
    assert speaker.media_kinds == {"image", "audio"}
    bodies = []
    monkeypatch.setattr(Server, "lines", lambda self, path, body: bodies.append(body) or _done())
    content = [text("Is"), picture(b"PNG", "a.png"), text("a cat?")]
    list(speaker.stream([{"role": "user", "content": content}], AnswerOptions()))
    (message,) = bodies[0]["messages"]
    assert message == {"role": "user", "content": "Is\na cat?", "images": ["UE5H"]}


def _done() -> Iterator[dict[str, Any]]:
    yield {"message": {"content": "Yes."}, "done": True, "done_reason": "stop"}


def test_names_are_shown_without_control_characters(files, tmp_path):
    path = tmp_path / "\x1b[2Jx.png"
    path.write_bytes(PNG)
    assert attachments.read(path).name == "?[2Jx.png"


def test_the_microphone_is_for_macs_with_the_extra(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(UsageError, match="the microphone works on macOS only"):
        microphone.check()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UsageError, match=r"pip install 'mlxkv\[mic\]'"):
        microphone.check()


class Stream:
    """A microphone that gives one block."""

    block = np.array([[0.0], [0.5], [-2.0]], np.float32)

    def __init__(self, rate: int, channels: int, dtype: str, callback: Any):
        assert (rate, channels, dtype) == (16_000, 1, "float32")
        self.callback = callback

    def __enter__(self) -> None:
        self.callback(self.block, len(self.block), None, None)

    def __exit__(self, *error: object) -> None: ...


def test_what_the_microphone_hears_is_a_recording(monkeypatch, capsys):
    device = SimpleNamespace(InputStream=Stream, PortAudioError=OSError)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    stdin = SimpleNamespace(isatty=lambda: True, readline=lambda: "\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    made = attachments.recorded()
    assert (made.kind, made.data[:4], made.data[8:12]) == ("audio", b"RIFF", b"WAVE")
    assert made.data[44:] == np.array([0, 16383, -32767], "<i2").tobytes()
    monkeypatch.setattr(Stream, "block", np.zeros((5, 1), np.float32))
    with pytest.raises(UsageError, match="Privacy & Security > Microphone"):
        attachments.recorded()
