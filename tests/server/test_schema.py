"""Requests that are made up from the OpenAPI document: none of them is an error of the server."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.pytest.lazy import get_all_tests

from mlxkv.errors import ModelNotFound
from mlxkv.server.app import create_app
from mlxkv.server.config import ServerConfig
from tests.support.fake_engine import MODEL, FakeEngine

ENGINE = FakeEngine()
APP = create_app(ENGINE, ServerConfig(hosts=("testserver",)))


def without_long_lists(schema: Any) -> None:
    """Drop the bounds of lists from the document: requests just past them take minutes to make.

    `test_large_requests` tries those bounds.
    """
    for each in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(each, dict | list):
            without_long_lists(each)
    if isinstance(schema, dict) and isinstance(schema.get("maxItems"), int):
        del schema["maxItems"]


OPERATIONS = [
    (method.upper(), path) for path, methods in APP.openapi()["paths"].items() for method in methods
]


@pytest.fixture(scope="module")
def document() -> BaseSchema:
    without_long_lists(APP.openapi())
    schema = schemathesis.openapi.from_asgi("/openapi.json", APP)
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    return schema


@pytest.fixture(autouse=True)
def nothing_to_break(tmp_path, monkeypatch):
    """Made-up names are names: of no model here, and none is fetched."""

    def pull(name, *, report):
        raise ModelNotFound(f"no model named {name!r}")

    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path))
    monkeypatch.setattr("mlxkv.store.hub.snapshots", lambda *_: [])
    monkeypatch.setattr("mlxkv.store.hub.cached_repos", lambda *_: [])
    monkeypatch.setattr("mlxkv.store.resolve.pull", pull)


def is_answered(case: Case) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL
    answer = case.call()
    assert answer.status_code in (200, 400, 404, 405, 413)
    if answer.status_code != 200 and case.method != "HEAD":  # which has no body
        assert answer.json()["error"]


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda x: x)
def test_no_request_is_an_error_of_the_server(document, method, path):
    """Requests are made here: schemathesis' own `parametrize` makes all of them at collection."""
    settings = hypothesis.settings(
        max_examples=6,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    one = document.include(method=method, path=path)
    [made] = get_all_tests(schema=one, test_func=is_answered, settings=settings, given_kwargs=None)
    made.ok()[1]()


def test_the_document_says_what_every_route_takes_and_how_errors_look():
    paths = APP.openapi()["paths"]
    assert "/v1/chat/completions" in paths
    for methods in paths.values():
        for route in methods.values():
            assert "422" not in route["responses"] and "4XX" in route["responses"]
            assert route["summary"] and route["description"]
