"""Adapters by the names of models, and by a field, in all APIs."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlxkv.cli import main
from mlxkv.server.media.abilities import Abilities
from mlxkv.server.speech import routes as speech
from mlxkv.store.adapter_names import MOST, fitting, kept_dir, named, shown, split
from mlxkv.store.adapters import stored_adapters
from tests.models.test_adapters import mlx_lm
from tests.server.test_transcriptions import SHORT
from tests.support.fake_engine import MODEL, serving
from tests.support.fake_engine_ollama import STORED, LoadingEngine, made_model, models

__all__ = ["made_model", "models"]

TURN = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": False}
ROUTES = ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions", "/api/chat"]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def engine() -> LoadingEngine:
    return LoadingEngine()


@pytest.fixture
def address(engine: LoadingEngine, models: Path, tmp_path: Path) -> Iterator[str]:
    """A server, with an adapter `mine` whose base is the stored model."""
    adapter = mlx_lm(tmp_path / "trained", {Q: (64, 64)}, model=f"org/{STORED.partition(':')[0]}")
    assert main(["adapters", "add", "mine", str(adapter)]) == 0
    with serving(engine) as found:
        yield found


def turn(address: str, route: str, **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {**TURN, **fields}
    if route == "/v1/completions":
        body["prompt"] = body.pop("messages")[0]["content"]
    if route == "/v1/responses":
        body["input"] = body.pop("messages")[0]["content"]
        del body["max_tokens"]
    return httpx.post(address + route, json=body)


@pytest.mark.parametrize("route", ROUTES)
def test_a_model_may_be_named_with_adapters(address, engine, route):
    path = str(kept_dir() / "mine")
    for name in (f"{MODEL}+mine", f"{MODEL}+mine:latest"):
        answer = turn(address, route, model=name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        assert (engine.last.model, engine.last.request.adapter) == (MODEL, (f"{path}=1.0",))
    turn(address, route, model=f"{MODEL}+mine=-0.5", adapter=["mine", "mine=2"])
    assert engine.last.request.adapter == (f"{path}=-0.5", f"{path}=1.0", f"{path}=2.0")
    turn(address, route, model=MODEL, adapter="mine")
    assert engine.last.request.adapter == (f"{path}=1.0",)


def test_an_adapter_that_is_not_here_is_not_found_and_no_path_is_one(address, tmp_path):
    for name in ("none", "org/none", str(tmp_path / "trained"), "../trained", ".."):
        for fields in ({"model": f"{MODEL}+{name}"}, {"model": MODEL, "adapter": name}):
            answer = turn(address, "/v1/chat/completions", **fields)
            assert answer.status_code == 404, answer.text
            assert "adapter" in answer.text
    there = tmp_path / "a=b"
    there.mkdir()
    for name in ("~nobody=1", "\u00e9" * 250 + "=1", f"{there}=1", f"{tmp_path}=1"):
        answer = turn(address, "/v1/chat/completions", model=MODEL, adapter=name)
        assert answer.status_code == 404, answer.text
    for n, status in ((MOST, 200), (MOST + 1, 400)):
        name = MODEL + "+mine" * n
        assert turn(address, "/v1/chat/completions", model=name).status_code == status
    for name in ("~nobody+mine", "a" * 5000 + "+mine"):
        assert turn(address, "/v1/chat/completions", model=name).status_code == 404
    # What lies on the server's disk changes no answer.
    for path in (there, tmp_path / "c=d"):
        answer = turn(address, "/api/chat", model=MODEL, adapter=str(path))
        assert answer.status_code == 400 and "a number" in answer.json()["error"]
    answer = turn(address, "/v1/messages", model=f"nowhere+{'mine'}")
    assert answer.status_code == 404
    answer = turn(address, "/api/chat", model=MODEL, adapter="mine=much")
    assert answer.status_code == 400 and "adapter" in answer.json()["error"]


def test_adapters_of_a_models_name_are_found_whatever_is_asked_of_it(
    address, engine, tmp_path, monkeypatch
):
    async def hears(*_: Any) -> Abilities:
        return Abilities(frozenset({"audio"}))

    monkeypatch.setattr(speech, "abilities_of", hears)
    path = str(kept_dir() / "mine")
    trained, sound = str(tmp_path / "trained"), {"file": ("a.wav", SHORT)}
    documents = {"query": "q", "documents": ["d"]}

    def rank(name: str) -> httpx.Response:
        return httpx.post(f"{address}/v1/rerank", json={"model": f"{MODEL}+{name}", **documents})

    def write_down(name: str) -> httpx.Response:
        model = {"model": f"{MODEL}+{name}"}
        return httpx.post(f"{address}/v1/audio/transcriptions", data=model, files=sound)

    def post(route: str, name: str, **fields: Any) -> httpx.Response:
        return httpx.post(address + route, json={"model": f"{MODEL}+{name}", **fields})

    body = {"model": f"{MODEL}+mine=0.5", "adapter": ["mine"], **documents}
    httpx.post(f"{address}/v1/rerank", json=body)
    assert engine.last.request.adapter == (f"{path}=0.5", f"{path}=1.0")
    for ask in (write_down, rank):
        engine.asks.clear()
        ask("mine=0.5")
        assert engine.last.request.adapter == (f"{path}=0.5",)
        engine.asks.clear()
        for name in ("none", "org/none", trained):
            assert ask(name).status_code == 404
        assert not engine.asks
    for route, fields in (("/api/generate", {}), ("/tokenize", {"prompt": "a"})):
        assert post(route, "mine", **fields).status_code == 200
        assert post(route, trained, **fields).status_code == 404
    for name, status in (("mine", 200), ("none", 404)):
        body = {"model": f"{STORED}+{name}"}
        assert httpx.post(f"{address}/api/show", json=body).status_code == status
    for route in ("/v1/embeddings", "/api/embed", "/api/embeddings"):
        answer = post(route, "mine", input="a", prompt="a")
        assert answer.status_code == 400 and "takes no adapters" in answer.text
        answer = httpx.post(address + route, json={"model": MODEL, "input": "a", "adapter": "mine"})
        assert answer.status_code == 400 and "adapter" in answer.text


def test_lists_have_models_under_the_adapters_made_for_them(address, engine, monkeypatch):
    loaded = [dataclasses.replace(each, adapters=(("mine=0.5", 1000),)) for each in engine.loaded()]
    monkeypatch.setattr(engine, "loaded", lambda *_: loaded)
    ids = {row["id"] for row in httpx.get(f"{address}/v1/models").json()["data"]}
    assert {STORED, f"{STORED}+mine", MODEL, f"{MODEL}+mine=0.5"} <= ids
    assert httpx.get(f"{address}/v1/models/{STORED}+mine").json()["id"] == f"{STORED}+mine"
    tags = {row["name"]: row for row in httpx.get(f"{address}/api/tags").json()["models"]}
    assert tags[f"{STORED}+mine"]["details"]["parent_model"] == STORED
    assert tags[f"{STORED}+mine"]["size"] < tags[STORED]["size"]
    ps = {row["name"]: row for row in httpx.get(f"{address}/api/ps").json()["models"]}
    assert ps[f"{MODEL}+mine=0.5"]["size"] == 1000


def refuse(path: str, **_: Any) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_names_of_adapters_are_read_and_shown(address, models, tmp_path, capsys, monkeypatch):
    assert split("a+b=2+org/c") == ("a", ("b=2", "org/c"))
    (tmp_path / "c++").mkdir()
    assert split(str(tmp_path / "c++")) == (str(tmp_path / "c++"), ())
    assert shown(named(["mine", "mine=0.5"])) == "mine+mine=0.5"
    assert shown(["/c/models--org--a--b/snapshots/0f/x.gguf=2.0"]) == "org/a--b=2"
    assert [each.name for each in fitting(models / "tiny-1k", stored_adapters())] == ["mine"]
    assert fitting(models, stored_adapters()) == []
    assert main(["adapters", "add", "mine", str(tmp_path / "trained")]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        assert main(["adapters", "rm", "mine"]) != 0
    assert "mine: Permission denied" in capsys.readouterr().err
    assert main(["adapters", "rm", "mine"]) == 0
    assert "removed mine" in capsys.readouterr().out
    assert stored_adapters() == []
