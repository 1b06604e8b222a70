from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.support.command_line import assert_one_line, chat_model, environment, mlxkv
from tests.support.server_process import Server


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    chat_model(home / "models" / "chatty")
    return environment(home)


def test_an_alias_is_made_listed_run_and_deleted(env):
    made = mlxkv("alias", "gpt-4o", "chatty", env=env)
    assert (made.returncode, made.stdout) == (0, "gpt-4o stands for chatty\n")
    assert mlxkv("alias", env=env).stdout.split() == ["NAME", "MODEL", "gpt-4o", "chatty"]
    assert json.loads(mlxkv("alias", "gpt-4o", "--json", env=env).stdout) == {"gpt-4o": "chatty"}
    ran = mlxkv("run", "gpt-4o", "hi", "-n", "2", "--temperature", "0", env=env)
    same = mlxkv("run", "chatty", "hi", "-n", "2", "--temperature", "0", env=env)
    assert (ran.returncode, ran.stdout) == (0, same.stdout)
    assert mlxkv("alias", "--delete", "gpt-4o", env=env).returncode == 0
    assert mlxkv("alias", env=env).stdout == ""
    assert_one_line(mlxkv("run", "-m", "gpt-4o", "hi", env=env), 3, "gpt-4o")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["smollm2:135m", "chatty"], 2, "built-in"),
        (["chatty", "smollm2:135m"], 2, "stored"),
        (["mine", "nothing"], 3, "nothing"),
        (["--delete"], 2, "NAME"),
        (["--delete", "mine"], 3, "mine"),
        (["mine"], 3, "mine"),
    ],
)
def test_what_is_no_alias_is_one_line(env, arguments, code, words):
    assert_one_line(mlxkv("alias", *arguments, env=env), code, words)


@pytest.mark.parametrize(
    ("pair", "code", "words"),
    [("gpt-4o", 2, "NAME=MODEL"), ("chatty=chatty", 2, "stored"), ("x=nothing", 3, "nothing")],
)
def test_serve_refuses_a_wrong_alias_before_it_starts(env, pair, code, words):
    assert_one_line(mlxkv("serve", "--port", "0", "--alias", pair, env=env), code, words)


def test_serve_loads_a_model_by_its_alias_and_has_it_once(env):
    assert mlxkv("alias", "stored-name", "chatty", env=env).returncode == 0
    server = Server(env, "--alias", f"here={Path(env['MLXKV_MODELS']) / 'chatty'}",
                    "--model", "stored-name")  # fmt: skip
    try:
        turn = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        for name in ("here", "stored-name", "chatty"):
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=turn | {"model": name})
            assert answer.json()["model"] == name, answer.text
        loaded = httpx.get(f"{server.url}/api/ps").json()["models"]
        assert [row["name"] for row in loaded] == ["chatty"]
        ids = [row["id"] for row in httpx.get(f"{server.url}/v1/models").json()["data"]]
        assert ids == ["chatty", "here", "stored-name"]
    finally:
        server.stop()
