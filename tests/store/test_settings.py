"""What a model runs with: who goes before whom, what is refused, and how it is shown."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlxkv
from mlxkv.base import device
from mlxkv.checkpoint import mlxkv_json
from mlxkv.cli import main
from mlxkv.convert import convert
from mlxkv.errors import ConfigError, UsageError
from mlxkv.kv.types import allowed_kv_types
from mlxkv.store.settings import CALLER, COMMAND_LINE, REQUEST, Given, effective
from mlxkv.terminal.answer_options import AnswerOptions
from mlxkv.terminal.local import LocalSpeaker
from mlxkv.terminal.slash_commands import Chat, execute
from tests.support.command_line import assert_one_line, chat_model, environment

# Per setting: what the command line, the environment and the file say, and what nobody's saying is.
SAID: dict[str, tuple[Any, str, Any, Any]] = {
    "context": (100, "200", 300, 1024),
    "kv_type": ("q8", "q4", "auto", "native"),
    "memory": ("1GiB", "2GiB", "3GiB", device.memory_limit()),
    "overflow": ("shift", "stop", "shift", "stop"),
    "keep": (1, "2", 3, 0),
    "draft": ("off", "lookup", "off", "lookup"),
}
NOBODY = {"context": "config.json", "memory": "machine"}
GIB = 1 << 30


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("made") / "m")


@pytest.fixture
def model(made, tmp_path) -> Path:
    """A model whose folder is the test's own."""
    folder = tmp_path / "models" / "chatty"
    folder.mkdir(parents=True)
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def call(model, tmp_path, monkeypatch, capfd) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`mlxkv ARGS` in this process."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        with Path("/dev/null").open() as nothing, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", nothing)
            code = main(list(args))
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(args, code, out, err)

    return run


def write(model: Path, **values: Any) -> None:
    (model / "mlxkv.json").write_text(json.dumps(values))


def as_bytes(value: Any) -> Any:
    return int(value[0]) * GIB if isinstance(value, str) and value.endswith("GiB") else value


# Who goes before whom.


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(range(4), 2)])
def test_who_comes_first_decides_and_is_named(model, monkeypatch, name, first, second):
    on_line, in_environment, in_file, nobody = SAID[name]
    says = {first, second}
    if 1 in says:
        monkeypatch.setenv(f"MLXKV_{name.upper()}", in_environment)
    if 2 in says:
        write(model, **{name: in_file})
    given = Given(**{name: on_line} if 0 in says else {}, origin=COMMAND_LINE)
    setting = next(s for s in effective(model, given) if s.name == name)
    values = (on_line, in_environment, in_file, nobody)
    origins = (COMMAND_LINE, f"MLXKV_{name.upper()}", "mlxkv.json", NOBODY.get(name, "default"))
    assert str(as_bytes(setting.value)) == str(as_bytes(values[first]))
    assert setting.origin == origins[first]


def test_nobody_says_anything(model):
    found = {s.name: (s.value, s.origin) for s in effective(model)}
    assert found == {
        "context": (1024, "config.json"),
        "kv_type": ("native", "default"),
        "memory": (device.memory_limit(), "machine"),
        "overflow": ("stop", "default"),
        "keep": (0, "default"),
        "draft": ("lookup", "default"),
    }


def test_a_request_goes_before_all_others(model, monkeypatch):
    monkeypatch.setenv("MLXKV_CONTEXT", "200")
    found = effective(model, Given(overflow="shift")).asked(100, None, 4)
    assert [s.origin for s in found] == [
        REQUEST,
        "default",
        "machine",
        CALLER,
        REQUEST,
        "default",
    ]
    assert (found.context.value, found.overflow.value, found.keep.value) == (100, "shift", 4)


def test_an_empty_variable_and_a_null_say_nothing(model, monkeypatch):
    monkeypatch.setenv("MLXKV_CONTEXT", " ")
    write(model, context=None)
    assert effective(model).context.origin == "config.json"


def test_auto_is_what_the_machine_allows_and_goes_before_a_variable(model, monkeypatch):
    monkeypatch.setenv("MLXKV_MEMORY", "1GiB")
    assert effective(model, Given(memory="auto")).memory.value == device.memory_limit()


def test_the_record_of_a_model_stands_beside_its_settings(model):
    write(model, name="chatty", source="gguf", origin="x.gguf", context=512)
    assert effective(model).context.value == 512
    record = mlxkv_json.read_record(model)
    assert record is not None and record.origin == "x.gguf"


# What is refused.


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("CONTEXT", "long", "a whole number, 2 or more; got 'long'"),
        ("CONTEXT", "1", "a whole number, 2 or more; got 1"),
        ("CONTEXT", "-5", "a whole number"),
        (
            "KV_TYPE",
            "q5",
            f"{allowed_kv_types()}; got 'q5'",
        ),
        ("MEMORY", "lots", "like 16GiB, 500MB or auto; got 'lots'"),
        ("OVERFLOW", "wrap", "one of stop, shift; got 'wrap'"),
        ("KEEP", "1.5", "a whole number, 0 or more; got '1.5'"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(model, monkeypatch, name, text, allowed):
    monkeypatch.setenv(f"MLXKV_{name}", text)
    with pytest.raises(UsageError, match=f"^MLXKV_{name} must be {allowed}"):
        effective(model)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"context": "512"}, "context must be a whole number, 2 or more; got '512'"),
        ({"context": True}, "context must be a whole number"),
        ({"keep": 1.5}, "keep must be a whole number"),
        ({"memory": [1]}, "memory must be like 16GiB"),
        ({"kv_type": 8}, "kv_type must be one of native"),
        ({"overflow": "wrap"}, "overflow must be one of stop, shift"),
        ({"contxt": 512}, "key 'contxt' is not known; settings are context, kv_type, memory"),
        ([], "must be a JSON object"),
        ({"context": 4096}, "context must be at most the model's own context, 1,024; got 4,096"),
    ],
)
def test_a_settings_file_that_is_wrong_is_named_with_its_key(model, content, said):
    (model / "mlxkv.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"chatty/mlxkv\.json: {said}"):
        effective(model)


def test_a_context_past_the_models_own_is_refused_with_both_numbers(model, monkeypatch):
    assert effective(model, Given(context=1024)).context.value == 1024
    with pytest.raises(UsageError, match=r"context must be at most .* 1,024; got 1,025"):
        effective(model, Given(context=1025))
    monkeypatch.setenv("MLXKV_CONTEXT", "1025")
    with pytest.raises(UsageError, match=r"MLXKV_CONTEXT must be at most .* 1,024; got 1,025"):
        effective(model)
    assert effective(model, Given(context=9)).context.value == 9, "what is outdone does not count"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"context": 0}, "context"),
        ({"kv_type": "q5"}, "kv_type must be one of native, q8, k8v4, q4"),
        ({"memory": "lots"}, "memory must be like 16GiB, 500MB or auto; got 'lots'"),
        ({"overflow": ""}, "overflow"),
        ({"keep": -1}, "keep"),
    ],
)
def test_a_wrong_argument_is_refused_before_a_model_is_looked_for(given, said):
    with pytest.raises(UsageError, match=said):
        mlxkv.load("/no/such", **given)


# Where it counts.


def test_a_model_is_loaded_with_what_is_effective(model, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_TYPE", "q8")
    write(model, context=64, keep=3)
    llm = mlxkv.load(model, overflow="shift")
    assert (llm.context, llm.kv_type) == (64, "q8")
    assert llm.settings.keep.value == 3
    assert llm.generate("hello", max_tokens=100).stats.shifted_tokens > 0
    assert mlxkv.load(model, kv_type="native").kv_type == "native"


def test_a_plan_is_for_what_would_run(model, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_TYPE", "q8")
    monkeypatch.setenv("MLXKV_MEMORY", "1GiB")
    write(model, context=512)
    plan = mlxkv.plan(model)
    assert (plan.context, plan.kv_type, plan.limit_bytes) == (512, "q8", GIB)
    wider = mlxkv.plan(model, 4096, kv_type="native", memory="2GiB")
    assert (wider.context, wider.kv_type, wider.limit_bytes) == (4096, "native", 2 * GIB)


def test_converting_takes_the_settings_along_and_not_the_record(model, tmp_path):
    write(model, name="chatty", source="gguf", origin="x.gguf", context=512, memory="1GiB")
    convert(model, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "mlxkv.json").read_text())
    assert content == {"context": 512, "memory": "1GiB"}
    (model / "mlxkv.json").unlink()
    convert(model, tmp_path / "plain")
    assert not (tmp_path / "plain" / "mlxkv.json").exists()


# The command line.


def test_show_prints_each_value_and_where_it_came_from(model, call, monkeypatch):
    monkeypatch.setenv("MLXKV_MEMORY", "2GiB")
    write(model, context=512, overflow="shift")
    card = json.loads(call("show", "chatty", "--json").stdout)
    assert card["context"] == 1024
    assert card["settings"] == {
        "context": {"value": 512, "origin": "mlxkv.json"},
        "kv_type": {"value": "native", "origin": "default"},
        "memory": {"value": 2 * GIB, "origin": "MLXKV_MEMORY"},
        "overflow": {"value": "shift", "origin": "mlxkv.json"},
        "keep": {"value": 0, "origin": "default"},
        "draft": {"value": "lookup", "origin": "default"},
    }
    text = call("show", "chatty").stdout
    for line in (
        "settings       context   512 tokens (mlxkv.json)",
        "               kv_type   native (default)",
        "               memory    2.0 GiB (MLXKV_MEMORY)",
        "               overflow  shift (mlxkv.json)",
        "               keep      0 tokens (default)",
        "               draft     lookup (default)",
    ):
        assert line in text.splitlines()


def test_run_stops_or_shifts_at_the_context_and_says_so(call):
    run = ("run", "chatty", "hello", "--json", "-n", "90", "--context", "64")
    stopped = call(*run)
    answer = json.loads(stopped.stdout)
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["prompt_tokens"] + len(answer["tokens"]) == 64
    assert stopped.stderr == ""
    shifted = call(*run, "--overflow", "shift", "--keep", "20")
    answer = json.loads(shifted.stdout)
    assert len(answer["tokens"]) == 90
    n = answer["stats"]["shifted_tokens"]
    line = f"mlxkv: the context of 64 tokens was full: the oldest {n:,} were dropped\n"
    assert n > 0 and shifted.stderr == line
    plain = call(*(arg for arg in run if arg != "--json"), "--overflow", "shift", "--keep", "20")
    assert plain.stderr == line
    assert plain.stdout == answer["text"] + "\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("run", "chatty", "hi", "--context", "2000"), ["--context", "1,024", "2,000"]),
        (("run", "chatty", "hi", "--context", "1"), ["--context"]),
        (("run", "chatty", "hi", "--overflow", "wrap"), ["--overflow", "stop, shift"]),
        (("run", "chatty", "hi", "--keep", "-1"), ["--keep"]),
        (("run", "chatty", "x" * 99, "--context", "64"), ["--truncate", "--overflow shift"]),
        (("run", "chatty", "hi", "--overflow", "shift", "--keep", "600"), ["600", "512"]),
        (("verify", "chatty", "--context", "2000"), ["--context", "1,024", "2,000"]),
        (("verify", "chatty", "--context", "500"), ["578", "500"]),
        (("kv", "save", "x", "a text", "-m", "chatty", "--context", "2000"), ["1,024", "2,000"]),
    ],
)
def test_bounds_that_cannot_be_are_one_line(call, args, words):
    assert_one_line(call(*args), 2, *words)


def test_every_command_reads_the_environment(call, monkeypatch):
    monkeypatch.setenv("MLXKV_CONTEXT", "2000")
    for args in (("run", "chatty", "hi"), ("plan", "chatty"), ("verify", "chatty"),
                 ("show", "chatty"), ("kv", "save", "x", "a text", "-m", "chatty")):  # fmt: skip
        assert_one_line(call(*args), 2, "MLXKV_CONTEXT", "1,024", "2,000")
    monkeypatch.setenv("MLXKV_CONTEXT", "512")
    assert json.loads(call("plan", "chatty", "--json").stdout)["context"] == 512


def test_a_chat_shows_its_settings_and_loads_the_next_model_with_them(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_MODELS", str(model.parent))
    chat_model(model.parent / "short", max_position_embeddings=64)
    chat_model(model.parent / "other", family="gemma3")
    given = Given(context=100, kv_type="q8", overflow="shift", origin=COMMAND_LINE)
    chat = Chat(LocalSpeaker(mlxkv.load("chatty"), "chatty", given), AnswerOptions())
    chat.begin(None)
    assert "context          1,024 tokens (config.json)" in execute(chat, "/show model")
    with pytest.raises(UsageError, match="64; got 100"):
        execute(chat, "/load short")
    assert chat.speaker.name == "chatty"
    execute(chat, "/load other")
    shown = execute(chat, "/show model")
    assert "context          100 tokens (command line)" in shown
    assert "overflow         shift (command line)" in shown
    assert isinstance(chat.speaker, LocalSpeaker) and chat.speaker.llm.kv_type == "q8"
