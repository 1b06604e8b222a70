from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import pytest

from mlxkv.errors import OutputError, UsageError
from mlxkv.memory.types import KVUse, MemoryStats
from mlxkv.sampling.params import SamplingParams
from mlxkv.store.settings import COMMAND_LINE, Given, Setting
from mlxkv.terminal import repl, slash_commands
from mlxkv.terminal.answer_options import AnswerOptions, with_defaults
from mlxkv.terminal.local import LocalSpeaker
from mlxkv.terminal.slash_commands import Chat, Leave, execute
from tests.support.command_line import chat_model
from tests.support.terminal import Terminal, stop_an_answer, talk_twice


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home whose model has a context that no answer fills while a test waits."""
    home = tmp_path_factory.mktemp("home")
    chat_model(home / "models" / "chatty", max_position_embeddings=200_000)
    chat_model(home / "models" / "base", template=False)
    return home


# In a terminal.


def test_a_chat_has_turns_commands_and_an_end(home, tmp_path):
    saved = tmp_path / "talk.json"
    with Terminal(home, "chatty", "--system", "Be brief.") as terminal:
        assert "chatty: /? for help, /bye or Ctrl-D to leave\n" in terminal.prompt()
        talk_twice(terminal, saved)
        assert "no command '/nonesuch'" in terminal.say("/nonesuch")
        assert "forgotten" in terminal.say("/clear")
        assert "5 messages" in terminal.say(f"/load {saved}")
        terminal.press("\x04")
        assert terminal.end()[1] == 0
    content = json.loads(saved.read_text())
    assert [m["role"] for m in content["messages"]] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in content["messages"][:2]] == ["Be brief.", "hello"]
    assert content["parameters"]["max_tokens"] == 8


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(home):
    with Terminal(home, "chatty") as terminal:
        stop_an_answer(terminal)
        assert "max_tokens = 4" in terminal.say("/set max_tokens 4")
        terminal.say("/set verbose")
        after = terminal.say("go on")
        assert "4 tokens" in after
        assert " from RAM, " in after
        assert terminal.child.isalive()


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_leaves(home):
    with Terminal(home, "chatty", "-n", "4") as terminal:
        terminal.prompt()
        terminal.press("half a line\x03")
        assert "4" in terminal.say("/show parameters"), "the half line is gone"
        terminal.press("\x03")
        assert "Ctrl-C once more" in terminal.prompt()
        terminal.press("\x03")
        assert terminal.end()[1] == 0


def test_a_message_may_have_several_lines(home, tmp_path):
    saved = tmp_path / "talk.json"
    with Terminal(home, "chatty", "-n", "2") as terminal:
        terminal.prompt()
        terminal.child.sendline('"""one')
        terminal.child.expect(r"\.\.\.")
        terminal.child.sendline("two")
        terminal.child.expect(r"\.\.\.")
        terminal.say('three"""')
        terminal.press("four\x1b\r")
        terminal.say("five")
        terminal.say(f"/save {saved}")
        terminal.child.sendline("/bye")
        assert terminal.end()[1] == 0
    said = [m["content"] for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"]
    assert said == ["one\ntwo\nthree", "four\nfive"]


def test_a_terminal_that_can_do_nothing_gets_plain_lines(home):
    with Terminal(home, "chatty", "-n", "2", TERM="dumb") as terminal:
        assert "\x1b" not in str(terminal.prompt())
        terminal.say("hello")
        assert "max_tokens       2" in terminal.say("/set")
        terminal.child.sendline("/bye")
        assert terminal.end()[1] == 0


def test_a_model_without_a_template_cannot_chat_and_says_so(home):
    with Terminal(home, "base") as terminal:
        text, code = terminal.end()
    assert code == 4
    assert "base has no chat template" in text
    assert "--raw" in text


# Without one.


class FakeConversation:
    """Keeps what it is told."""

    def __init__(self, system: str | None = None, kv_from: str | None = None):
        self.system, self.turns = system, []
        self.kv_bytes, self.kv_tokens = 2048, 7

    @property
    def messages(self):
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def set_system(self, text):
        self.system = text or None

    def clear(self):
        self.turns = []

    def restore_turns(self, turns):
        self.turns = list(turns)


@pytest.fixture
def chat():
    config = SimpleNamespace(model_type="llama", context=1024)
    memory = MemoryStats(10, 1, KVUse(7, 2048, 256, 4096), KVUse(), KVUse(), 0, 0, 0, 5, 0, 9, 2)
    llm = SimpleNamespace(
        adapters=(),
        stats=lambda: memory,
        config=config,
        path="/models/m",
        conversation=FakeConversation,
        recommended=SamplingParams(temperature=0.6),
        settings=(Setting("context", 512, COMMAND_LINE), Setting("overflow", "stop", "default")),
    )
    speaker = LocalSpeaker(llm, "m", Given())  # pyright: ignore[reportArgumentType]
    chat = Chat(speaker, AnswerOptions())
    chat.begin("Be brief.")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    chat.conversation.restore_turns(turns)
    return chat


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit"])
def test_leaving_has_three_names(line, chat):
    with pytest.raises(Leave):
        execute(chat, line)


def test_help_names_every_command_and_parameter(chat):
    text = execute(chat, "/?")
    assert text == execute(chat, "/help")
    for name in (
        *slash_commands.PARAMETERS,
        "/set",
        "/show",
        "/save",
        "/load",
        "/clear",
        "/bye",
        '"""',
    ):
        assert name in text


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set parameter temperature 0.5", "temperature", 0.5),
        ("/set temperature 0.5", "temperature", 0.5),
        ("/set top_k 40", "top_k", 40),
        ("/set seed 7", "seed", 7),
        ("/set max_tokens default", "max_tokens", None),
        ('/set stop "\n"', "stop", ("\n",)),
        ("/set stop none", "stop", ()),
    ],
)
def test_set_changes_a_parameter(line, name, value, chat):
    execute(chat, line)
    assert getattr(chat.settings, name) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set parameter heat 1", "temperature, top_k.*got 'heat'"),
        ("/set temperature warm", "temperature takes a number; got 'warm'"),
        ("/set temperature -1", "temperature"),
        ("/set top_p 2", "top_p"),
        ("/set max_tokens 0", "max_tokens"),
        ("/set system", "/set system takes the text"),
        ("/show weights", "/show takes model, system, parameters, memory"),
        ("/nonesuch", r"no command '/nonesuch'; /\? lists"),
        ("/save", "/save takes one name"),
        ("/save a b", "/save takes one name"),
        ("/load none.json", "no such file"),
    ],
)
def test_a_wrong_command_is_one_line_and_changes_nothing(line, message, chat):
    before = (chat.settings, chat.conversation.messages)
    with pytest.raises(UsageError, match=message) as error:
        execute(chat, line)
    assert "\n" not in str(error.value)
    assert (chat.settings, chat.conversation.messages) == before


def test_a_new_system_prompt_begins_a_new_conversation(chat):
    execute(chat, '/set system "You are a pirate."')
    assert chat.conversation.messages == [{"role": "system", "content": "You are a pirate."}]
    assert execute(chat, "/show system") == "You are a pirate.\n"


def test_show_has_model_parameters_and_memory(chat):
    text = execute(chat, "/show")
    for word in ("m (llama, context 1,024)", "temperature", "2.0 KiB used (7 tokens)"):
        assert word in text


def test_what_is_not_set_is_the_models_recommendation(chat):
    text = execute(chat, "/set")
    assert "temperature      0.6 (default)" in text
    assert "repeat_penalty   1.1 (default)" in text
    assert "top_k            default" in text
    execute(chat, "/set temperature 0")
    assert chat.effective.temperature == 0
    advice = chat.speaker.recommended
    assert with_defaults(AnswerOptions(top_k=3), advice) == AnswerOptions(temperature=0.6, top_k=3)


def test_what_is_saved_is_what_is_loaded(chat, tmp_path):
    file = tmp_path / "my talk.json"
    before = chat.conversation.messages
    execute(chat, "/set seed 7")
    execute(chat, '/set stop "END"')
    execute(chat, f'/save "{file}"')
    chat.begin(None)
    chat.settings = AnswerOptions()
    assert "3 messages" in execute(chat, f'/load "{file}"')
    assert chat.conversation.messages == before
    assert chat.system == "Be brief."
    assert chat.settings == AnswerOptions(seed=7, stop=("END",))
    assert [path.name for path in tmp_path.iterdir()] == ["my talk.json"]


def test_save_writes_over_a_conversation_and_nothing_else(chat, tmp_path):
    file = tmp_path / "talk.json"
    execute(chat, f"/save {file}")
    execute(chat, f"/save {file}")
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UsageError, match="not a conversation that /save wrote"):
        execute(chat, f"/save {notes}")
    assert notes.read_text() == "mine"
    with pytest.raises(OutputError):
        execute(chat, f"/save {tmp_path}/none/talk.json")


MESSAGE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a conversation"),
        ({"version": 3}, "version 3 is not known; 1 and 2 are"),
        ({"messages": None}, "'messages' must be a list"),
        ({"messages": ["hi"]}, r"messages\[0\] must have a role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\] must have a role"),
        ({"messages": [MESSAGE, {"role": "user"}]}, r"messages\[1\] must have a role"),
        ({"messages": [MESSAGE, {"role": "user", "content": 1}]}, r"messages\[1\]"),
        ({"messages": [MESSAGE, {"role": "system", "content": "x"}]}, "only the first"),
        ({"parameters": {"heat": 1}}, "'parameters' must hold only"),
        ({"parameters": {"temperature": "hot"}}, "temperature"),
        ({"parameters": {"max_tokens": 1.5}}, "'max_tokens' must be a whole number"),
        ({"parameters": {"stop": "x"}}, "'stop' must be a list"),
    ],
)
def test_a_conversation_file_is_checked_before_anything_changes(change, message, chat, tmp_path):
    file = tmp_path / "talk.json"
    good = {"format": slash_commands.FORMAT, "version": 1, "model": "m", "messages": [MESSAGE]}
    file.write_text(json.dumps({**good, **change}))
    before = (chat.settings, chat.system, chat.conversation.messages)
    with pytest.raises(UsageError, match=message):
        execute(chat, f"/load {file}")
    assert (chat.settings, chat.system, chat.conversation.messages) == before


def test_a_file_that_is_no_json_is_one_line(chat, tmp_path):
    for data in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(UsageError, match="not a conversation"):
            execute(chat, f"/load {tmp_path / 'x.json'}")


def test_a_conversation_of_another_model_says_so(chat, tmp_path):
    file = tmp_path / "talk.json"
    execute(chat, f"/save {file}")
    chat.speaker.name = "other"
    assert "they were made with m, this is other" in execute(chat, f"/load {file}")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (['"""one"""'], "one"),
        (['"""one', "two", 'three"""'], "one\ntwo\nthree"),
        (['"""', "one", '"""'], "one"),
        (['  """one', 'two"""  '], "one\ntwo"),
        (['say """x"""'], 'say """x"""'),
    ],
)
def test_three_quotes_hold_several_lines(lines, message):
    asked = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return lines[len(asked) - 1]

    assert repl.read_message(ask) == message
    assert asked == [repl.PROMPT, *[repl.CONTINUED] * (len(lines) - 1)]


def test_ctrl_c_raises_before_the_answer_begins_and_only_marks_it_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with repl._interrupts() as interrupted:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not interrupted.seen
        interrupted.in_decode = True
        signal.raise_signal(signal.SIGINT)
        assert interrupted.seen
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_history_is_kept_where_only_the_user_can_read_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = repl.history_file()
    assert path == tmp_path / "mlxkv" / "history"
    assert path is not None
    assert path.stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert repl.history_file() is None
