from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxkv.launch.programs import PROGRAMS
from tests.support.command_line import assert_one_line, chat_model, environment, mlxkv
from tests.support.fake_program import FakePrograms, fake_programs
from tests.support.server_process import Server

NAMES = [program.name for program in PROGRAMS]
PATH = f"/usr/bin{os.pathsep}/bin"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def listens(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) == 0


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with one model, which is small and knows no tools."""
    chat_model(tmp_path / "models" / "chatty")
    return tmp_path


@pytest.fixture
def programs(home: Path) -> FakePrograms:
    return fake_programs(home / "bin")


@pytest.fixture
def env(home: Path, programs: FakePrograms) -> dict[str, str]:
    """An environment with the fake programs, in which no server runs."""
    return environment(
        home,
        PATH=f"{programs.folder}{os.pathsep}{PATH}",
        MLXKV_SERVER=f"127.0.0.1:{free_port()}",
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs already, with one model, an alias of it, and a key."""
    home = tmp_path_factory.mktemp("served")
    chat_model(home / "models" / "chatty")
    server = Server(environment(home, MLXKV_API_KEY="secret"), "--alias", "gpt-4o=chatty")
    yield server
    server.stop()


def beside(served: Server, env: dict[str, str]) -> dict[str, str]:
    """The environment of a user of a server that runs; no model lies in its own folder."""
    models = str(Path(env["HOME"]) / "none")
    return env | {"MLXKV_SERVER": served.url, "MLXKV_API_KEY": "secret", "MLXKV_MODELS": models}


# A server of its own.


def test_a_program_gets_a_server_for_as_long_as_it_runs(env, programs, home):
    done = mlxkv("launch", "claude", "--", "-p", "--model", "x", env=env | {"FAKE_EXIT": "7"})
    assert done.returncode == 7, done.stderr
    seen = programs.seen()
    assert seen["arguments"] == ["-p", "--model", "x"]
    url = seen["environment"]["ANTHROPIC_BASE_URL"]
    assert seen["environment"]["ANTHROPIC_MODEL"] == "chatty"
    (log,) = (home / ".cache" / "mlxkv" / "logs").iterdir()
    assert str(log) in done.stderr
    assert f"chatty is loaded\nmlxkv: listening on {url}\n" in log.read_text()
    assert not listens(url)
    assert "needs 16,384" in done.stderr
    assert "no tools" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_the_programs_and_its_server_ends_with_it(env, programs, number):
    process = started(env | {"FAKE_WAIT": "1", "FAKE_TRAP": number.name}, programs)
    url = programs.seen()["environment"]["ANTHROPIC_BASE_URL"]
    assert listens(url)
    # Ctrl-C goes to all processes of the terminal, `kill` to the one that it names.
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(40) == 40 + number
    assert not listens(url)


def test_a_program_that_crashes_ends_its_server(env, programs):
    done = mlxkv("launch", "claude", env=env | {"FAKE_KILL": "1"})
    assert done.returncode == 128 + signal.SIGKILL
    assert not listens(programs.seen()["environment"]["ANTHROPIC_BASE_URL"])


def test_a_killed_launcher_takes_its_server_along(env, programs):
    process = started(env | {"FAKE_WAIT": "1"}, programs)
    url = programs.seen()["environment"]["ANTHROPIC_BASE_URL"]
    process.kill()
    process.wait(10)
    until(lambda: not listens(url))
    os.killpg(process.pid, signal.SIGKILL)  # the program, which nothing told to end


def started(env: dict[str, str], programs: FakePrograms) -> subprocess.Popen[bytes]:
    """A launched program that has written its record, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxkv", "launch", "claude"],
        env=env,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(programs.record.exists)
    return process


def test_a_server_that_cannot_start_is_one_line_with_its_code(env, home, programs):
    (home / "models" / "chatty" / "model.safetensors").write_bytes(b"broken")
    done = mlxkv("launch", "claude", env=env)
    assert done.returncode == 4, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("mlxkv: the server did not start: ")
    assert "model.safetensors" in last
    assert not programs.record.exists()


def test_a_folder_of_the_users_lends_no_modules_to_the_server(env, programs, home):
    project = home / "project"
    project.mkdir()
    (project / "uvicorn.py").write_text("raise SystemExit('the wrong uvicorn')")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mlxkv", "launch", "claude"],
        env=env,
        cwd=project,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert programs.seen()["folder"] == str(project)


# A server that runs.


@pytest.mark.parametrize("name", NAMES)
def test_each_program_is_pointed_at_the_server_that_runs(served, env, programs, name, home):
    done = mlxkv("launch", name, "-m", "gpt-4o", "--", "tail", env=beside(served, env))
    assert done.returncode == 0, done.stderr
    seen = programs.seen()
    assert seen["arguments"][-1] == "tail"
    ours = {k: v for k, v in seen["environment"].items() if not k.startswith("MLXKV_SERVER")}
    text = json.dumps([seen["arguments"], ours, seen["files"]])
    assert served.url in text
    assert "gpt-4o" in text
    assert "secret" in json.dumps([ours, seen["files"]])
    assert "secret" not in json.dumps(seen["arguments"])
    assert not (home / ".cache" / "mlxkv" / "logs").exists()
    assert {path.name for path in home.iterdir()} <= {"bin", "models", "none", "state", "hf"}


@pytest.mark.parametrize("name", NAMES)
def test_print_is_a_shell_script_that_does_the_same(served, env, programs, name):
    there = beside(served, env)
    arguments = ("launch", name, "-m", "gpt-4o")
    assert mlxkv(*arguments, "--", "a b", env=there).returncode == 0
    launched = programs.seen()
    printed = mlxkv(*arguments, "--print", "--", "a b", env=there)
    assert printed.returncode == 0, printed.stderr
    subprocess.run(["sh", "-e"], input=printed.stdout.encode(), env=there, check=True)
    assert alike(programs.seen()) == alike(launched)


def alike(seen: dict[str, Any]) -> object:
    """A record without the folder of the files, and without what a shell adds."""
    text = json.dumps(seen)
    found = json.loads(text.replace(seen["beside"], "FOLDER") if seen["beside"] else text)
    for name in ("PWD", "OLDPWD", "SHLVL", "_"):
        found["environment"].pop(name, None)
    return found


def test_the_only_model_of_a_server_is_taken_whatever_aliases_it_has(served, env, programs):
    assert mlxkv("launch", "claude", env=beside(served, env)).returncode == 0
    assert programs.seen()["environment"]["ANTHROPIC_MODEL"] == "chatty"


def test_the_last_model_of_several_is_taken_under_its_alias(served, env, programs):
    there, other = beside(served, env), Path(served.env["HOME"]) / "models" / "other"
    chat_model(other, max_position_embeddings=64)
    try:
        assert_one_line(mlxkv("launch", "claude", env=there), 2, "--model", "chatty", "other")
        assert not programs.record.exists()
        assert mlxkv("launch", "claude", "-m", "gpt-4o", env=there).returncode == 0
        assert mlxkv("launch", "claude", env=there).returncode == 0
    finally:
        shutil.rmtree(other)
    assert programs.seen()["environment"]["ANTHROPIC_MODEL"] == "gpt-4o"


def test_a_model_that_the_server_does_not_have_is_not_found(served, env, programs):
    done = mlxkv("launch", "claude", "-m", "other", env=beside(served, env))
    assert_one_line(done, 3, "'other' not found")
    assert not programs.record.exists()


def test_a_wrong_key_is_said_and_starts_no_server(served, env, programs):
    there = beside(served, env) | {"MLXKV_API_KEY": "wrong"}
    assert_one_line(mlxkv("launch", "claude", env=there), 2, "401")


# Which model.


def test_the_model_that_was_run_last_is_taken(env, programs, home):
    chat_model(home / "models" / "other")
    done = mlxkv("launch", "claude", "--print", env=env)
    assert_one_line(done, 2, "--model", "chatty", "other")
    assert mlxkv("run", "other", "hi", "-n", "1", env=env).returncode == 0
    done = mlxkv("launch", "claude", "--print", env=env)
    assert "ANTHROPIC_MODEL=other\n" in done.stdout
    assert "mlxkv serve --model other" in done.stderr


def test_without_a_model_it_says_how_to_get_one(env, home):
    there = env | {"MLXKV_MODELS": str(home / "none")}
    assert_one_line(mlxkv("launch", "claude", env=there), 2, "mlxkv pull")
    assert_one_line(mlxkv("launch", "claude", "-m", "org/name", env=there), 3, "mlxkv pull org/")


# What a user can do wrong.


def test_a_program_that_is_not_installed_says_how_to_install_it(env):
    done = mlxkv("launch", "qwen", env=env | {"PATH": PATH})
    assert_one_line(done, 2, "Qwen Code is not installed", "npm install -g @qwen-code/qwen-code")


@pytest.mark.parametrize("arguments", [["emacs"], []])
def test_a_program_that_is_not_in_the_table_is_named(env, arguments):
    assert_one_line(mlxkv("launch", *arguments, env=env), 2, "PROGRAM")


def test_list_tells_which_programs_are_installed(env, programs):
    (programs.folder / "codex").unlink()
    rows = mlxkv("launch", "--list", env=env).stdout.splitlines()
    installed = {row.split()[0]: " yes " in row for row in rows[1:]}
    assert installed == {name: name != "codex" for name in NAMES}
