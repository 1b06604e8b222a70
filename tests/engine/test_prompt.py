"""What a request's wishes become where a model does not go so far."""

from __future__ import annotations

import pytest

import mlxkv
from mlxkv.engine.prompt import fit_context, prepare
from mlxkv.errors import UsageError
from mlxkv.generation.request import Request
from tests.support.command_line import chat_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "m"
    with mlxkv.load(chat_model(path, family="llama", max_position_embeddings=1024)) as llm:
        yield llm


@pytest.mark.parametrize(("asked", "given"), [(None, 1024), (512, 512), (32768, 1024)])
def test_best_effort_takes_the_models_context_where_more_is_asked_for(llm, asked, given):
    request = Request.of("hello", context=asked, best_effort=True)
    bound, _ = fit_context(llm, request, prepare(llm, request))
    assert bound.context == given


def test_without_it_a_context_above_the_models_own_is_an_error(llm):
    request = Request.of("hello", context=32768)
    with pytest.raises(UsageError, match="context"):
        fit_context(llm, request, prepare(llm, request))


@pytest.mark.parametrize("prompt", ["", [], [{"role": "user", "content": ""}]])
def test_a_prompt_without_a_token_is_refused(tmp_path, prompt):
    path = chat_model(tmp_path / "m", family="llama", template="{{ messages[0].content }}")
    with mlxkv.load(path) as llm, pytest.raises(UsageError, match="the prompt is empty"):
        prepare(llm, Request.of(prompt))
