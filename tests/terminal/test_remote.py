"""`mlxkv run` with a server: the same answers, the same errors, and nothing loaded here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlxkv.engine.messages import Busy
from mlxkv.errors import (
    CheckpointError,
    Hint,
    KVCacheFull,
    MlxkvError,
    ModelNotFound,
    OutOfMemory,
    UsageError,
)
from mlxkv.generation.outputs import Chunk, Miss, join_parts
from mlxkv.memory.types import Rung
from mlxkv.parsers.events import ToolCall
from mlxkv.sampling.grammar import Grammar
from mlxkv.server.client import Server as Address
from mlxkv.store.settings import Given
from mlxkv.terminal.answer_options import AnswerOptions
from mlxkv.terminal.remote import RemoteSpeaker
from tests.support.command_line import TEMPLATE, assert_one_line, chat_model, environment, mlxkv
from tests.support.fake_engine import MODEL, FakeEngine, options_of, says, serving, stats
from tests.support.server_process import Server
from tests.support.terminal import Terminal, stop_an_answer, talk_twice

THINKS = TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% else %}<think>{% endif %}{% endif %}",
)
HEAVY = ("mlx.core", "numpy", "tokenizers", "jinja2", "huggingface_hub", "pydantic", "fastapi")


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> dict[str, str]:
    """The machine that has the models."""
    home = tmp_path_factory.mktemp("home")
    models = home / "models"
    # No answer fills its context while a test waits.
    chat_model(models / "chatty", max_position_embeddings=200_000)
    chat_model(models / "plain", ascii=True)
    chat_model(models / "base", template=False)
    chat_model(models / "thinker", template=THINKS)
    chat_model(models / "advised", ascii=True)
    advice = {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.3}
    (models / "advised" / "generation_config.json").write_text(json.dumps(advice))
    return environment(home, MLXKV_KV=str(home / "kv"))


@pytest.fixture(scope="module")
def server(here) -> Iterator[Server]:
    made = Server(here)
    yield made
    assert made.stop() == 0, "".join(made.lines)
    assert not any("Traceback" in line for line in made.lines), "".join(made.lines)


@pytest.fixture(scope="module")
def away(tmp_path_factory) -> dict[str, str]:
    """A machine that has none."""
    return environment(tmp_path_factory.mktemp("away"))


def running(server: Server) -> int:
    return httpx.get(f"{server.url}/stats.json").json()["running"]


def within_s(seconds: float, reached: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


# The same as here.


@pytest.mark.parametrize(
    "args",
    [
        ("chatty", "hello", "-n", "12"),
        ("chatty", "hello", "-n", "40", "--system", "Be brief.", "--repeat-penalty", "1.3"),
        ("chatty", "hello", "-n", "40", "-t", "1.1", "--seed", "7", "--top-k", "50",
         "--top-p", "0.9", "--min-p", "0.001"),
        ("chatty", "hello", "-n", "60", "-t", "1", "--seed", "3", "--stop", "e", "--stop", "zz"),
        ("chatty", "x" * 100, "-n", "200", "--context", "160", "--overflow", "shift",
         "--keep", "10"),
        ("chatty", "x" * 300, "-n", "5", "--context", "100", "--truncate"),
        ("base", "hello", "-n", "12", "--raw"),
        ("thinker", "hello", "-n", "20"),
        ("thinker", "hello", "-n", "20", "--no-think"),
        ("advised", "hello", "-n", "20", "--seed", "5"),
    ],
)  # fmt: skip
def test_an_answer_is_the_one_of_a_model_here(server, here, away, args):
    local = mlxkv("run", *args, "--dtype", "float32", "--json", env=here)
    remote = mlxkv("run", *args, "--server", server.url, "--json", env=away)
    assert (local.returncode, remote.returncode) == (0, 0), remote.stderr
    assert remote.stderr == local.stderr
    expected, found = json.loads(local.stdout), json.loads(remote.stdout)
    assert found["text"] or found["reasoning"]
    same = ("model", "text", "reasoning", "tool_calls", "finish_reason", "error")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    same = ("prompt_tokens", "generated_tokens", "shifted_tokens", "rungs")
    assert {key: found["stats"][key] for key in same} == {
        key: expected["stats"][key] for key in same
    }
    # The API has no ids of tokens, and the server's memory is not this answer's.
    assert (found["tokens"], found["memory"], found["stats"]["peak_bytes"]) == (None, None, None)


def test_text_goes_to_stdout_and_reasoning_and_figures_do_not(server, here, away):
    args = ("thinker", "hello", "-n", "20")
    local = mlxkv("run", *args, "--dtype", "float32", env=here)
    remote = mlxkv("run", *args, "--server", server.url, env=away)
    assert (remote.stdout, remote.stderr) == (local.stdout, local.stderr)
    assert remote.stderr.startswith("(reasoning)\n")
    verbose = mlxkv("run", *args, "--server", server.url, "--verbose", "--draft", "off", env=away)
    assert verbose.stdout == remote.stdout
    figures = verbose.stderr.removeprefix(remote.stderr)
    assert [line.split("  ")[0] for line in figures.splitlines()] == [
        "", "prompt", "answer", "first token",
    ]  # fmt: skip
    assert " from RAM" in figures and "20 tokens" in figures


def test_a_shift_is_said_here_too(server, away):
    done = mlxkv(
        "run", "chatty", "x" * 100, "-n", "200", "--context", "160", "--overflow", "shift",
        "--server", server.url, env=away,
    )  # fmt: skip
    assert done.returncode == 0
    assert "the context of 160 tokens was full: the oldest" in done.stderr


# While it is written.


@pytest.fixture
def long_answer(server, away) -> Iterator[subprocess.Popen[bytes]]:
    """A `run` that is in the middle of an answer without end."""
    assert running(server) == 0
    command = [sys.executable, "-m", "mlxkv.cli", "run", "chatty", "hello", "--server", server.url]
    process = subprocess.Popen(
        command,
        env=away,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    yield process
    process.kill()
    process.communicate()


def test_pieces_come_while_it_is_written_and_ctrl_c_ends_it_here_and_there(server, long_answer):
    assert long_answer.stdout is not None
    start = long_answer.stdout.read(20)
    assert len(start) == 20
    assert (long_answer.poll(), running(server)) == (None, 1)
    long_answer.send_signal(signal.SIGINT)
    out, err = long_answer.communicate(timeout=30)
    assert (long_answer.returncode, err) == (130, b"")
    assert out.endswith(b"\n")
    assert within_s(30, lambda: running(server) == 0), "the server goes on with it"


def test_who_is_killed_leaves_nothing_behind(server, long_answer):
    assert long_answer.stdout is not None
    long_answer.stdout.read(20)
    long_answer.kill()
    assert within_s(30, lambda: running(server) == 0)


def test_a_reader_that_goes_away_ends_it_quietly_here_and_there(server, long_answer):
    assert long_answer.stdout is not None and long_answer.stderr is not None
    long_answer.stdout.read(20)
    long_answer.stdout.close()
    assert long_answer.stderr.read() == b""
    assert long_answer.wait(30) != 0
    assert within_s(30, lambda: running(server) == 0)
    long_answer.stdout = None  # for `communicate`


def test_ctrl_c_before_the_first_word_cancels_too(fake, engine, away):
    engine.script = lambda ask: [30.0, *says("Hi")(ask)]
    n_before = len(engine.answers)
    command = ["-m", "mlxkv.cli", "run", "-m", MODEL, "hello", "--server", str(fake[1])]
    process = subprocess.Popen(
        [sys.executable, *command],
        env=away,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert within_s(30, lambda: len(engine.answers) > n_before)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"\n", b"")
    assert engine.answers[-1].cancelled.wait(10)


def test_what_is_waited_for_is_shown_and_goes_before_an_error_is(server, away):
    with Terminal(Path(away["HOME"]), "nonesuch", "hello", "--server", server.url) as terminal:
        terminal.child.expect_exact("waiting for the model\r\x1b[Kmlxkv: ")


def test_a_server_that_dies_is_one_line(here, away):
    made = Server(here)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxkv.cli", "run", "chatty", "hello", "--server", made.url],
        env=away,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(20)
    made.stop(signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    # What the system says of it depends on what was under way.
    broken = (f"mlxkv: {made.url} closed", f"mlxkv: the connection to {made.url} broke")
    assert err.decode().startswith(broken), err
    assert err.count(b"\n") == 1


# Which server, and whether one at all.


def test_a_server_that_only_the_environment_names_is_not_asked(here):
    closed = {**here, "MLXKV_SERVER": "127.0.0.1:9"}
    assert mlxkv("run", "chatty", "hello", "-n", "2", env=closed).returncode == 0


def test_the_server_of_the_environment_is_asked_where_one_is_wanted(server, away):
    env = {**away, "MLXKV_SERVER": server.url}
    assert mlxkv("run", "chatty", "hello", "-n", "2", "--use-server", env=env).returncode == 0
    done = mlxkv("run", "chatty", "hello", "--use-server", "--server", "127.0.0.1:9", env=env)
    assert_one_line(done, 2, "no server at http://127.0.0.1:9", "mlxkv serve")


@pytest.mark.parametrize("prompt", ["hello", None])
def test_a_lone_name_is_a_model_that_the_server_has(server, away, prompt):
    args = ("run", "-n", "3", "--server", server.url, "--json")
    done = mlxkv(*args, "chatty", *([prompt] if prompt else ()), env=away, stdin="piped")
    assert json.loads(done.stdout)["model"] == "chatty"
    # No model there either: it is a prompt for the default one, which is not there.
    assert_one_line(mlxkv(*args, "talkative", env=away), 3, "smollm2:135m", "not found")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--dtype", "float32"), ["--dtype", "mlxkv serve"]),
        (("--memory", "4GiB"), ["--memory", "mlxkv serve"]),
        (("--kv-type", "q8"), ["--kv-type", "mlxkv serve"]),
        (("--kv-from", "notes"), ["--kv-from", "this machine"]),
        (("--context", "1"), ["--context must be a whole number, 2 or more"]),
        (("--overflow", "wrap"), ["--overflow must be one of stop, shift"]),
        (("--temperature", "-1"), ["--temperature must be 0 or more"]),
        (("--raw", "--system", "x"), ["--system has no place"]),
        (("--raw", "--think"), ["--think has no place"]),
    ],
)
def test_what_cannot_go_to_a_server_is_refused_before_it_is_asked(away, args, words):
    # Nobody listens there.
    done = mlxkv("run", "chatty", "hello", "--server", "127.0.0.1:9", *args, env=away)
    assert_one_line(done, 2, *words)


def test_a_key_without_a_server_is_refused(here):
    done = mlxkv("run", "chatty", "hello", "--api-key", "x", env=here)
    assert_one_line(done, 2, "--api-key", "--use-server")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("nonesuch", "hello"), 3, ["answered 404", "'nonesuch' not found"]),
        (("./chatty", "hello"), 3, ["answered 404", "'./chatty'"]),
        (("base", "hello"), 4, ["answered 422", "chat_template", "give a text"]),
        (("chatty", "x" * 100, "--context", "64"), 2, ["64 are allowed", "truncate: true"]),
        (("chatty", "hello", "--seed", str(2**64)), 2, ["--seed"]),
        (("chatty", "hello", *["--stop", "x"] * 17), 2, ["answered 400", "stop"]),
    ],
)
def test_what_the_server_refuses_is_one_line_with_its_words(server, away, args, code, words):
    assert_one_line(mlxkv("run", *args, "--server", server.url, env=away), code, *words)


def test_a_wish_past_what_the_model_has_is_met_in_part(server, away):
    wishes = ("--think", "--context", "300000", "-n", "2")
    done = mlxkv("run", "chatty", "hello", *wishes, "--server", server.url, env=away)
    assert done.returncode == 0, done.stderr


def test_a_key_is_sent(here, away):
    made = Server(here, "--api-key", "secret")
    try:
        run = ("run", "chatty", "hello", "-n", "2", "--server", made.url)
        assert_one_line(mlxkv(*run, env=away), 2, "answered 401", "API key is required")
        wrong = mlxkv(*run, "--api-key", "wrong", env=away)
        assert_one_line(wrong, 2, "answered 401", "unknown API key")
        assert mlxkv(*run, "--api-key", "secret", env=away).returncode == 0
        assert mlxkv(*run, env={**away, "MLXKV_API_KEY": "secret"}).returncode == 0
    finally:
        assert made.stop() == 0


# Nothing is loaded here.


def assert_light(script: str, env: Mapping[str, str]) -> None:
    check = f"import sys; found = [m for m in {HEAVY} if m in sys.modules]; assert not found, found"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{script}\n{check}"],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("more", [("--verbose",), ("--json",), ("--raw",), ("--overflow", "shift")])
def test_an_answer_imports_nothing_heavy(server, away, more):
    args = ["run", "chatty", "hello", "-n", "3", "--server", server.url, *more]
    assert_light(f"from mlxkv.cli import main; assert main({args!r}) == 0", away)


def test_a_chat_imports_nothing_heavy(server, away, tmp_path):
    script = f"""
from mlxkv.server.client import Server
from mlxkv.terminal.slash_commands import Chat, execute
from mlxkv.terminal.remote import RemoteSpeaker
from mlxkv.terminal.repl import answer
from mlxkv.terminal.answer_options import AnswerOptions
from mlxkv.store.settings import Given
speaker = RemoteSpeaker(Server.at({server.url!r}), "chatty", Given())
chat = Chat(speaker, AnswerOptions(max_tokens=3))
chat.begin(None)
answer(chat, "hello")
for line in ("/show", "/set seed 1", "/set think off", "/save {tmp_path}/x.json",
             "/load {tmp_path}/x.json", "/load thinker", "/clear"):
    execute(chat, line)
"""
    assert_light(script, away)


# A chat.


def test_a_chat_with_a_server_has_turns_and_commands(server, away, tmp_path):
    home, saved = Path(away["HOME"]), tmp_path / "talk.json"
    with Terminal(home, "chatty", "--server", server.url, "--system", "Be brief.") as terminal:
        assert f"chatty on {server.url}: /? for help" in terminal.prompt()
        talk_twice(terminal, saved)
        shown = terminal.say("/show")
        assert f"server           {server.url}" in shown
        assert "chatty (llama, context 200,000)" in shown
        assert "the memory is the server's: `mlxkv ps` shows it" in shown
        assert "no switch for reasoning" in terminal.say("/set think on")
        assert "forgotten" in terminal.say("/clear")
        assert "5 messages" in terminal.say(f"/load {saved}")
        assert "'nonesuch' not found" in terminal.say("/load nonesuch")
        assert "base has no chat template" in terminal.say("/load base")
        assert "thinker is loaded" in terminal.say("/load thinker")
        assert "(reasoning)" in terminal.say("hello")
        terminal.press("\x04")
        assert terminal.end()[1] == 0
    content = json.loads(saved.read_text())
    assert [m["role"] for m in content["messages"]] == ["system", *["user", "assistant"] * 2]


def talk(home: Path, file: Path, model: str, *args: str) -> list[dict[str, Any]]:
    """What is said in three turns of a chat."""
    with Terminal(home, model, "-n", "12", *args) as terminal:
        terminal.prompt()
        for line in ("hello", "and again", "once more", f"/save {file}"):
            terminal.say(line)
        terminal.child.sendline("/bye")
        assert terminal.end()[1] == 0
    return json.loads(file.read_text())["messages"]


@pytest.mark.parametrize("model", ["plain", "advised"])
def test_a_chat_with_a_server_says_what_a_chat_here_says(server, here, away, tmp_path, model):
    seed = ("--seed", "3")
    local = talk(Path(here["HOME"]), tmp_path / "here", model, "--dtype", "float32", *seed)
    remote = talk(Path(away["HOME"]), tmp_path / "away", model, "--server", server.url, *seed)
    assert len(remote) == 6 and all(message["content"] for message in remote)
    assert remote == local


def test_ctrl_c_stops_an_answer_of_the_server_and_the_chat_goes_on(server, away):
    with Terminal(Path(away["HOME"]), "chatty", "--server", server.url) as terminal:
        stop_an_answer(terminal)
        assert within_s(30, lambda: running(server) == 0)
        terminal.say("/set max_tokens 4")
        terminal.say("/set verbose")
        assert "4 tokens" in terminal.say("go on")


def test_a_chat_that_cannot_begin_says_why(server, away):
    for args, code, words in (
        (("-m", "nonesuch", "--server", server.url), 3, "'nonesuch' not found"),
        (("base", "--server", server.url), 4, "base has no chat template"),
        (("chatty", "--server", "127.0.0.1:9"), 2, "no server at"),
    ):
        with Terminal(Path(away["HOME"]), *args) as terminal:
            text, found = terminal.end()
        assert (found, words in text) == (code, True), text


# What is said between the two.


@pytest.fixture(scope="module")
def fake() -> Iterator[tuple[FakeEngine, Address]]:
    engine = FakeEngine()
    with serving(engine) as url:
        yield engine, Address.at(url, "")


@pytest.fixture
def engine(fake) -> FakeEngine:
    fake[0].busy = None
    return fake[0]


@pytest.fixture
def speaker(fake) -> RemoteSpeaker:
    return RemoteSpeaker(fake[1], MODEL, Given())


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hi.", "reasoning_content": "hm"},
    {"role": "user", "content": "again"},
]


def test_what_is_set_arrives_and_what_is_not_does_not(fake, engine, speaker):
    engine.script = says("Hi")
    list(speaker.stream(MESSAGES, AnswerOptions()))
    assert (engine.last.request.prompt, options_of(engine.last)) == (MESSAGES, {})
    every = AnswerOptions(
        max_tokens=9, temperature=0.5, top_k=4, top_p=0.75, min_p=0.25, repeat_penalty=1.5, seed=6,
        stop=("a", "b"), truncate=True, think="low", format={"type": "object"},
    )  # fmt: skip
    given = Given(context=64, overflow="shift", keep=3, draft="off")
    list(RemoteSpeaker(fake[1], MODEL, given).stream(MESSAGES, every))
    assert options_of(engine.last) == {
        "max_tokens": 9, "temperature": 0.5, "top_k": 4, "top_p": 0.75, "min_p": 0.25,
        "repeat_penalty": 1.5, "seed": 6, "stop": ["a", "b"], "truncate": True, "think": "low",
        "context": 64, "overflow": "shift", "keep": 3, "draft": "off",
    }  # fmt: skip
    assert engine.last.request.format == Grammar("json_schema", '{"type": "object"}')
    list(
        RemoteSpeaker(fake[1], MODEL, Given(overflow="stop")).stream(
            "Once", AnswerOptions(think=None)
        )
    )
    assert (engine.last.request.prompt, options_of(engine.last)) == ("Once", {"overflow": "stop"})


def test_zeros_are_set_too(engine, speaker):
    engine.script = says("Hi")
    settings = AnswerOptions(temperature=0, top_k=0, min_p=0, seed=0, think=False)
    list(speaker.stream(MESSAGES, settings))
    assert options_of(engine.last) == {
        "temperature": 0, "top_k": 0, "min_p": 0, "seed": 0, "think": False,
    }  # fmt: skip


def test_the_figures_are_those_of_the_engine(engine, speaker):
    miss = Miss("diverged", 6, "a|b", "a|c", 3, 0.5)
    rungs = (Rung("cache", 256, 1 << 20), Rung("packed", 512, 1 << 21, "q8"))
    expected = stats(generated_tokens=2, miss=miss, rungs=rungs, diverged_at=6, shifted_tokens=5)
    engine.script = lambda ask: [
        Chunk("", 1, reasoning="hm "),
        Chunk("", 2, reasoning="so"),
        Chunk("Hel", 3),
        Chunk("lo", 4, "length", expected),
    ]
    chunks = list(speaker.stream(MESSAGES, AnswerOptions()))
    assert join_parts(chunks) == ("Hello", "hm so", ())
    last = chunks[-1]
    assert last.finish_reason == "length" and last.stats is not None
    assert 0 < last.stats.first_token_s < 10
    known = {"peak_bytes": None, "first_token_s": last.stats.first_token_s}
    assert last.stats == replace(expected, **known)


def test_an_answer_that_memory_ended_says_so(engine, speaker):
    error = KVCacheFull(512, 768, 600, hints=[Hint("memory", "1GiB")])
    engine.script = says("Hel", reason="memory", error=error)
    *_, last = speaker.stream(MESSAGES, AnswerOptions())
    assert last.finish_reason == "memory"
    assert type(last.error) is OutOfMemory and str(last.error) == error.text


def test_a_call_that_nobody_runs_is_text(engine, speaker):
    call = ToolCall("<call>{}</call>", "f")
    engine.script = lambda ask: [
        Chunk("So: ", 1),
        Chunk("", 2, "stop", stats(), tool_calls=(call,)),
    ]
    chunks = list(speaker.stream(MESSAGES, AnswerOptions()))
    assert join_parts(chunks) == ("So: <call>{}</call>", "", ())


@pytest.mark.parametrize("n_before", [0, 1])
def test_an_error_has_its_kind_before_the_first_word_and_after_it(engine, speaker, n_before):
    before = [Chunk("Hel", 1)] * n_before
    engine.script = lambda ask: [*before, CheckpointError("weights are damaged")]
    said = []
    with pytest.raises(CheckpointError, match="answered 422: weights are damaged"):
        for chunk in speaker.stream(MESSAGES, AnswerOptions()):
            said.append(chunk.text)
    assert said == ["Hel"] * n_before


def test_a_full_queue_is_no_lack_of_memory(engine, speaker):
    engine.busy = Busy(2.0)
    with pytest.raises(MlxkvError, match="answered 503: too many requests") as caught:
        list(speaker.stream(MESSAGES, AnswerOptions()))
    assert caught.value.exit_code == 1


def test_an_answer_that_is_left_is_cancelled_and_stays_in_the_history(engine, speaker):
    engine.script = lambda ask: [Chunk("Hel", 1), 30.0, Chunk("lo", 2, "stop", stats())]
    talk = speaker.conversation("Be brief.")
    chunks = talk.send("hello", max_tokens=5)
    assert next(chunks).text == "Hel"
    chunks.close()
    assert engine.answers[-1].cancelled.wait(10)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hel"}]
    assert talk.messages == [{"role": "system", "content": "Be brief."}, *turns]


def test_an_answer_without_its_last_line_is_an_error(engine, speaker):
    engine.script = lambda ask: [Chunk("Hel", 1)]
    with pytest.raises(MlxkvError, match="before the answer was complete"):
        list(speaker.stream(MESSAGES, AnswerOptions()))


def test_a_message_that_fails_is_not_in_the_history(engine, speaker):
    engine.script = lambda ask: [CheckpointError("weights are damaged")]
    talk = speaker.conversation(None)
    with pytest.raises(CheckpointError):
        list(talk.send("hello"))
    assert talk.messages == []
    engine.script = lambda ask: [
        Chunk("", 1, reasoning="hm"), Chunk("Hi.", 2), Chunk("", 3, "stop", stats()),
    ]  # fmt: skip
    list(talk.send("hello"))
    engine.script = says("Hi again.")
    list(talk.send("again"))
    assert engine.last.request.prompt == MESSAGES[1:]
    talk.clear()
    list(talk.send("hello"))
    assert engine.last.request.prompt == MESSAGES[1:2]


def test_the_context_is_that_of_the_loaded_model(fake):
    assert RemoteSpeaker(fake[1], MODEL, Given()).context == 1
    assert RemoteSpeaker(fake[1], MODEL, Given(context=64)).context == 64
    assert RemoteSpeaker(fake[1], "other", Given()).context is None
    assert RemoteSpeaker(Address.at("127.0.0.1:9"), MODEL, Given()).context is None


def test_a_model_that_is_not_there_is_not_found(fake, speaker):
    with pytest.raises(ModelNotFound, match="'other' not found"):
        speaker.other("other")


def test_kv_of_this_machine_is_refused(speaker):
    with pytest.raises(UsageError, match="this machine's"):
        speaker.stream(MESSAGES, AnswerOptions(), None, object())
