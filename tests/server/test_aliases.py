from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlxkv.store import refs
from tests.support.fake_engine import MODEL, serving
from tests.support.fake_engine_ollama import STORED, LoadingEngine, made_model, models

__all__ = ["made_model", "models"]

TURN = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": False}
ROUTES = ["/v1/chat/completions", "/v1/messages", "/api/chat"]


@pytest.fixture
def engine() -> LoadingEngine:
    """Has the stored model in memory too."""
    engine = LoadingEngine()
    engine.models.add(STORED)
    return engine


@pytest.fixture
def address(engine: LoadingEngine, models: Path) -> Iterator[str]:
    """A server with aliases of its own: `gpt-4o` of the stored model, `gpt-5` of the loaded one."""
    with serving(engine, aliases=(("gpt-4o", STORED), ("gpt-5", MODEL)), context=128) as found:
        yield found


def turn(address: str, route: str, model: str) -> dict[str, Any]:
    answer = httpx.post(address + route, json=TURN | {"model": model})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("alias", "model"),
    [("gpt-4o", STORED), ("gpt-4o:latest", STORED), ("gpt-5", MODEL), ("openai/stored", STORED)],
)
def test_an_answer_has_the_name_that_was_asked_for(address, engine, route, alias, model):
    refs.add_alias("openai/stored", STORED)
    assert turn(address, route, alias)["model"] == alias
    assert engine.last.model == model


def test_an_alias_made_while_the_server_runs_is_known(address, engine):
    assert httpx.post(f"{address}/v1/messages", json=TURN | {"model": "late"}).status_code == 404
    refs.add_alias("late", STORED)
    assert turn(address, "/v1/messages", "late")["model"] == "late"
    refs.remove_alias("late")
    assert httpx.post(f"{address}/v1/messages", json=TURN | {"model": "late"}).status_code == 404


def test_an_alias_whose_model_is_gone_is_not_found(address):
    refs.add_alias("late", "smollm2:135m")
    answer = httpx.post(f"{address}/v1/messages", json=TURN | {"model": "late"})
    assert answer.status_code == 404
    assert "'late' not found" in answer.json()["error"]["message"]


def test_models_and_tags_list_aliases(address):
    refs.add_alias("mine", STORED)
    ids = [row["id"] for row in httpx.get(f"{address}/v1/models").json()["data"]]
    assert ids == [MODEL, "gpt-4o", "gpt-5", "mine", STORED]
    tags = {row["name"]: row for row in httpx.get(f"{address}/api/tags").json()["models"]}
    assert tags.keys() == {STORED, "gpt-4o", "mine"}
    same = {"name", "model"}
    assert {k: v for k, v in tags["mine"].items() if k not in same} == {
        k: v for k, v in tags[STORED].items() if k not in same
    }
    assert httpx.get(f"{address}/v1/models/mine").json()["id"] == "mine"


def test_a_model_row_tells_the_effective_context_and_has_both_shapes(address):
    page = httpx.get(f"{address}/v1/models").json()
    ids = [row["id"] for row in page["data"]]
    assert (page["object"], page["has_more"]) == ("list", False)
    assert (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
    row = httpx.get(f"{address}/v1/models/gpt-4o").json()
    assert row["object"] == row["type"] == "model"
    assert row["display_name"] == "gpt-4o"
    assert row["context_length"] == row["max_model_len"] == row["max_input_tokens"] == 128
    assert httpx.get(f"{address}/v1/models/{MODEL}").json()["context_length"] == 4096


def test_show_tells_the_effective_context_of_an_alias(address):
    shown = httpx.post(f"{address}/api/show", json={"model": "gpt-4o"}).json()
    family = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{family}.context_length"] == 128
    assert "num_ctx 128" in shown["parameters"]
    assert shown["model_info"]["general.basename"] == "gpt-4o"


def test_a_context_past_the_models_own_is_its_own(engine, models):
    with serving(engine, context=1 << 40) as address:
        row = httpx.get(f"{address}/v1/models/{STORED}").json()
        shown = httpx.post(f"{address}/api/show", json={"model": STORED}).json()
    info = shown["model_info"]
    own = info[f"{info['general.architecture']}.context_length"]
    assert row["context_length"] == own < 1 << 40


def test_an_alias_deletes_no_model(address, models):
    refs.add_alias("mine", STORED)
    answer = httpx.request("DELETE", f"{address}/api/delete", json={"model": "mine"})
    assert answer.status_code == 400
    assert "alias" in answer.json()["error"]
    assert list(models.glob("*/config.json"))


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
def test_both_sdks_read_the_models(address, sdk):
    package = pytest.importorskip(sdk)
    if sdk == "openai":
        made = package.OpenAI(base_url=f"{address}/v1", api_key="none")
    else:
        made = package.Anthropic(base_url=address, api_key="none")
    with made as client:
        found = {model.id: model for model in client.models.list()}
        assert {"gpt-4o", STORED} <= found.keys()
        assert client.models.retrieve("gpt-4o").id == "gpt-4o"


def test_a_stored_model_that_drafts_keeps_its_name_and_no_path_shows(address, engine, models):
    engine.models.discard(STORED)
    body = TURN | {"model": MODEL, "draft": STORED}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200
    assert engine.last.request.draft == STORED
    assert engine.last.draft_path is not None and engine.last.draft_path.parent == models
