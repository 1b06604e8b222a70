"""An error names fields as the one who reads it knows them: options, an API's fields, arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from mlxkv.errors import PYTHON, ContextExceeded, Hint, KVCacheFull, MlxkvError, UsageError
from mlxkv.generation.context_shift import Bound
from mlxkv.generation.flight import error_of
from mlxkv.generation.request import Request
from mlxkv.kv.storage import storage_of
from mlxkv.kv.types import first_kv_type
from mlxkv.server.errors import ANTHROPIC, OLLAMA, OPENAI, RESPONSES, fields_of
from mlxkv.store.settings import Given
from mlxkv.terminal.spelling import RUN, Options
from tests.support.fake_engine import MODEL, FakeEngine, serving
from tests.test_rooms import MODULES, room_of

FLAG = re.compile(r"(?<![\w-])--[a-z]")
MESSAGES = [{"role": "user", "content": "hi"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "hi"},
}
FULL = KVCacheFull(
    256, 512, 300, "1 GiB", "3 MiB",
    [Hint("memory", "2MiB", "allows 512"), Hint("kv_type", "q8", "allows 500")],
)  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine()
    with serving(engine) as url:
        yield engine, url


def raised(make: Callable[..., Any], *args: Any, **options: Any) -> MlxkvError:
    with pytest.raises(MlxkvError) as caught:
        _ = make(*args, **options)
    return caught.value


def errors() -> Iterator[MlxkvError]:
    """What an answer can fail with, raised where it is."""
    bad = {
        "temperature": -1, "top_k": -1, "top_p": 2, "min_p": 2, "repeat_penalty": 0,
        "presence_penalty": 3, "frequency_penalty": -3, "min_tokens": -1,
        "repeat_last_n": -1, "seed": -1, "logit_bias": 3, "max_tokens": 0, "think": "much",
        "logprobs": 99, "stop": [""], "context": 1, "overflow": "fall", "keep": -1,
    }  # fmt: skip
    for name, value in bad.items():
        yield raised(Request.of, "a", **{name: value})
    yield raised(storage_of, "q5")
    yield raised(first_kv_type, "q5")
    yield raised(Given, memory="much")
    yield raised(lambda: Bound(256, lambda: 250).n_kept)
    damaged = error_of(sound=False, stuck=False)
    assert isinstance(damaged, MlxkvError)
    yield damaged
    yield ContextExceeded(300, 256)
    yield FULL


@pytest.mark.parametrize("error", [*errors()], ids=lambda e: f"{e.field}: {e.text}"[:40])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_of_an_api_names_an_option_of_the_command_line(server, error, path, stream):
    engine, url = server
    engine.script = lambda ask: [error]
    answer = httpx.post(url + path, json={"model": MODEL, "stream": stream} | PATHS[path])
    assert answer.status_code == error.status
    # A full context is told in the API's own words.
    assert ("300" if isinstance(error, ContextExceeded) else error.text[:20]) in answer.text
    assert not FLAG.search(answer.text)


@pytest.mark.parametrize("path", PATHS)
def test_a_bad_value_in_a_request_is_named_as_its_api_does(server, path):
    bad = {"options": {"num_ctx": 1}} if path.startswith("/api") else {"temperature": -1}
    answer = httpx.post(server[1] + path, json={"model": MODEL} | PATHS[path] | bad)
    assert answer.status_code == 400
    assert ("num_ctx" if path.startswith("/api") else "temperature") in answer.text
    assert not FLAG.search(answer.text)


def test_an_error_is_spelled_where_it_is_read():
    error = ContextExceeded(300, 256)
    said = {
        spelling: error.spelled(spelling).partition("; ")[2]
        for spelling in (PYTHON, RUN, OPENAI, RESPONSES, ANTHROPIC, OLLAMA)
    }
    assert said == {
        PYTHON: "try truncate=True or overflow='shift'",
        RUN: "try --truncate or --overflow shift",
        OPENAI: 'try overflow: "shift"',
        RESPONSES: 'try truncation: "auto" or overflow: "shift"',
        ANTHROPIC: "",
        OLLAMA: "try truncate: true or shift: true",
    }
    assert str(error) == error.spelled(PYTHON)


def test_the_field_to_blame_comes_first_and_settings_that_help_last():
    assert (
        str(raised(first_kv_type, "q5")) == "kv_type must be one of native, q8, k8v4, q4, auto, or "
        "formats of layers like k8v4,0=native,5=q8; got 'q5'"
    )
    assert raised(first_kv_type, "q5").spelled(RUN).startswith("--kv-type must be")
    limit = "the memory limit of 1 GiB allows 300, and other sequences hold 3 MiB"
    assert FULL.spelled(RUN).endswith(f"{limit}; --memory 2MiB allows 512; --kv-type q8 allows 500")
    assert FULL.spelled(OPENAI).endswith(limit)


def test_a_command_names_no_option_that_it_does_not_have():
    error = UsageError("must be short", field="name", hints=[Hint("raw", True), Hint("n", 1)])
    spelled = error.spelled(Options({"name": "NAME", "raw": "--raw"}))
    assert spelled == "NAME must be short; try --raw"
    assert error.spelled(Options({})) == "name must be short"


@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/messages", ANTHROPIC), ("/v1/messages/count_tokens", ANTHROPIC),
        ("/v1/messages-", OPENAI), ("/v1/responses", RESPONSES), ("/api/chat", OLLAMA),
        ("/v1/chat/completions", OPENAI), ("/", OPENAI),
    ],
)  # fmt: skip
def test_the_path_tells_the_names(path, fields):
    assert fields_of(path) is fields


def test_no_error_below_the_commands_has_an_option_in_its_text():
    """What is raised there may reach any interface."""
    found = []
    for dotted, file in MODULES.items():
        if room_of(dotted) in {"cli", "commands", "terminal"}:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(getattr(node, "func", None), "id", "")
            is_error = isinstance(node, ast.Raise) or (
                isinstance(node, ast.Call) and name.endswith(("Error", "Exception"))
            )
            if is_error:
                found += [
                    f"{dotted}:{part.lineno}: {part.value}"
                    for part in ast.walk(node)
                    if isinstance(part, ast.Constant) and FLAG.search(str(part.value))
                ]
    assert found == []
