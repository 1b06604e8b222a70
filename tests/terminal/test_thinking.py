"""Reasoning on the command line and in the chat: switched on and off, and apart from the answer."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Chunk
from mlxkv.parsers.events import ToolCall
from mlxkv.sampling.params import SamplingParams
from mlxkv.store.settings import Given
from mlxkv.terminal import repl
from mlxkv.terminal.answer_options import AnswerOptions
from mlxkv.terminal.console import Aside
from mlxkv.terminal.local import LocalSpeaker
from mlxkv.terminal.one_shot import Printer
from mlxkv.terminal.slash_commands import Chat, execute
from tests.support.chat_templates.cases import TEMPLATES
from tests.support.command_line import TEMPLATE, assert_one_line, chat_model, environment, mlxkv

# Opens the reasoning in the prompt, unless it is switched off.
OPENED = TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% else %}<think>{% endif %}{% endif %}",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    chat_model(home / "models" / "thinker", template=OPENED, special=("<think>", "</think>"))
    chat_model(home / "models" / "chatty")
    return home


def test_reasoning_goes_to_stderr_and_the_answer_alone_to_stdout(home):
    done = mlxkv("run", "thinker", "hello", "-n", "8", env=environment(home))
    assert (done.returncode, done.stdout) == (0, "\n")
    assert done.stderr.startswith("(reasoning)\n")
    thought = done.stderr.removeprefix("(reasoning)\n").removesuffix("\n\n")
    done = mlxkv("run", "thinker", "hello", "-n", "8", "--json", env=environment(home))
    answer = json.loads(done.stdout)
    assert (answer["text"], answer["reasoning"], answer["tool_calls"]) == ("", thought, [])
    assert done.stderr == ""


def test_no_think_switches_reasoning_off(home):
    done = mlxkv("run", "thinker", "hello", "-n", "8", "--no-think", env=environment(home))
    assert len(done.stdout) > 4
    assert done.stderr == ""


def test_a_switch_that_the_model_lacks_is_one_line(home):
    env = environment(home)
    assert_one_line(mlxkv("run", "chatty", "hello", "--think", env=env), 2, "no switch")
    done = mlxkv("run", "thinker", "hello", "--raw", "--think", env=env)
    assert_one_line(done, 2, "--raw", "--think")
    done = mlxkv("run", "chatty", "hello", "--no-think", "-n", "2", env=env)
    assert done.returncode == 0, "a model that cannot think does not"


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def aside(stream: io.StringIO) -> str:
    words = Aside(stream)
    words.end()
    words.write("so ")
    words.write("it is")
    words.end()
    words.end()
    return stream.getvalue()


def test_reasoning_is_dimmed_on_a_terminal_and_labelled_elsewhere(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert aside(Screen()) == "\x1b[2mso it is\x1b[0m\n\n"
    assert aside(io.StringIO()) == "(reasoning)\nso it is\n\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert aside(Screen()) == "(reasoning)\nso it is\n\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert aside(Screen()) == "(reasoning)\nso it is\n\n"


def test_a_call_that_nobody_runs_is_written_as_the_model_wrote_it(capsys):
    printer = Printer()
    for chunk in (
        Chunk("", 1, reasoning="hm"),
        Chunk("So:", 2),
        Chunk("", 3, tool_calls=(ToolCall("<tool_call>{}</tool_call>", "f"),)),
    ):
        printer(chunk)
    printer.end()
    written = capsys.readouterr()
    assert written.out == "So:<tool_call>{}</tool_call>"
    assert written.err == "(reasoning)\nhm\n\n"


class Talk:
    """A conversation whose template rewrites earlier turns from the second answer on."""

    def __init__(self, system: str | None = None, kv_from: str | None = None):
        self.append_only: bool | None = None
        self.sent: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []

    def restore_turns(self, turns: list[dict[str, Any]]) -> None:
        self.messages = turns

    def send(self, text: str, **options: Any):
        self.append_only = False if self.sent else None
        self.sent.append(options)
        yield Chunk("Hi.", 1, "stop")


@pytest.fixture
def chat():
    source = TEMPLATES["reasoning"].read_text()
    tokenizer = SimpleNamespace(chat_template=ChatTemplate(source), id_of=lambda token: None)
    llm = SimpleNamespace(tokenizer=tokenizer, conversation=Talk, recommended=SamplingParams())
    chat = Chat(LocalSpeaker(llm, "thinker", Given()), AnswerOptions())  # type: ignore[arg-type]
    chat.begin(None)
    return chat


@pytest.mark.parametrize(
    ("line", "think"),
    [("think", True), ("think on", True), ("think off", False), ("nothink", False),
     ("think default", None)],
)  # fmt: skip
def test_set_think_is_for_the_answers_that_follow(chat, capsys, line, think):
    assert execute(chat, f"/set {line}").startswith("think = ")
    repl.answer(chat, "hello")
    assert chat.conversation.sent[-1]["think"] is think
    capsys.readouterr()


@pytest.mark.parametrize(
    ("line", "said"),
    [("/set think loudly", "takes on, off, low, medium, high, default; got 'loudly'"),
     ("/set think high", "reads no reasoning_effort")],
)  # fmt: skip
def test_what_cannot_be_set_changes_nothing(chat, line, said):
    with pytest.raises(UsageError, match=said):
        execute(chat, line)
    assert chat.settings.think is None


def test_a_template_that_rewrites_earlier_answers_is_said_once(chat, capsys):
    for expected in (0, 1, 0):
        repl.answer(chat, "hello")
        assert capsys.readouterr().err.count("rewrites earlier answers") == expected


def test_saved_reasoning_is_loaded_again(chat, tmp_path):
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi.", "reasoning_content": "hm"},
    ]
    file = tmp_path / "talk.json"
    content = {"format": "mlxkv conversation", "version": 1, "model": "x", "messages": turns}
    file.write_text(json.dumps(content))
    chat.settings = AnswerOptions(think=False)
    execute(chat, f"/load {file}")
    assert chat.conversation.messages == turns
    assert chat.settings.think is False
