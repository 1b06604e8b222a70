"""A chat whose process ended goes on, with the answer that had begun."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mlxkv
from mlxkv.errors import UsageError
from mlxkv.store.settings import Given
from mlxkv.terminal import last_chat, repl
from mlxkv.terminal.answer_options import AnswerOptions
from mlxkv.terminal.local import LocalSpeaker
from mlxkv.terminal.slash_commands import Chat, execute
from tests.support.command_line import chat_model

SETTINGS = AnswerOptions(temperature=1.0, seed=3, max_tokens=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("resume") / "m", ascii=True)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def chat_of(folder: Path) -> Chat:
    llm = mlxkv.load(folder, dtype="float32")
    chat = Chat(LocalSpeaker(llm, "m", Given()), SETTINGS)
    chat.begin("Be brief.")
    return chat


def said(chat: Chat) -> list[str]:
    return [turn["content"] for turn in chat.conversation.messages]


class Killed(BaseException):
    """The process ends here."""


def test_a_begun_answer_goes_on_to_the_same_token(folder, monkeypatch, capsys):
    whole = chat_of(folder)
    repl.answer(whole, "hello")
    repl.answer(whole, "and then")
    expected = said(whole)

    monkeypatch.setattr(last_chat, "EVERY", 8)
    first = chat_of(folder)
    repl.answer(first, "hello")
    kept: list[Any] = []

    def keep(*args: Any) -> None:
        last_keep(*args)
        kept.append(args)
        if len(kept) == 3:  # the message, 8 tokens, 16 tokens
            raise Killed

    last_keep = last_chat.keep
    monkeypatch.setattr(last_chat, "keep", keep)
    with pytest.raises(Killed):
        repl.answer(first, "and then")
    monkeypatch.setattr(last_chat, "keep", last_keep)
    first.speaker.close()
    raw = json.loads(last_chat.chat_file().read_text())
    assert raw["pending"] == "and then" and len(raw["begun"]["written"]["tokens"]) == 16
    assert last_chat.chat_file().stat().st_mode & 0o777 == 0o600

    capsys.readouterr()
    second = chat_of(folder)
    repl._resume(second)
    assert said(second) == expected
    assert said(second)[-1] in capsys.readouterr().out
    assert json.loads(last_chat.chat_file().read_text())["pending"] is None
    repl.answer(second, "go on")
    assert len(said(second)) == 7


def test_an_ended_chat_goes_on_at_its_next_message(folder):
    first = chat_of(folder)
    repl.answer(first, "hello")
    execute(first, "/set parameter top_k 5")
    repl.answer(first, "again")
    second = chat_of(folder)
    assert last_chat.resume(second, repl.load_conversation) == (None, None)
    assert said(second) == said(first) and second.settings.top_k == 5


def test_without_a_last_chat_it_is_one_line(folder):
    with pytest.raises(UsageError, match="there is no last chat"):
        last_chat.resume(chat_of(folder), repl.load_conversation)


def test_the_answer_of_another_model_begins_anew(folder):
    chat = chat_of(folder)
    repl.answer(chat, "hello")
    begun = SimpleNamespace(prompt=[1], seed=1, written=SimpleNamespace(to_json=dict))
    last_chat.keep({**repl.content_of(chat), "model": "other"}, "next", begun)  # pyright: ignore[reportArgumentType]
    assert last_chat.resume(chat_of(folder), repl.load_conversation) == ("next", None)
    last_chat.keep(repl.content_of(chat), "next", begun)  # pyright: ignore[reportArgumentType]
    assert last_chat.resume(chat_of(folder), repl.load_conversation) == ("next", None), "damaged"
