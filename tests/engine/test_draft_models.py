"""Models that draft in an engine: loaded for requests, counted, and kept as long as they are of
use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxkv.engine.engine import ThreadedEngine
from mlxkv.engine.messages import Ask
from mlxkv.engine.model_pool import key_of
from mlxkv.errors import UsageError
from mlxkv.generation.request import Request
from mlxkv.store.settings import Given
from tests.engine.test_engine import collect, stats, tokens
from tests.llm.test_drafts import Eager
from tests.support.command_line import chat_model
from tests.support.hybrid import hybrid_chat_model
from tests.support.threaded_engine import running

TEXT = "a text in which little is said twice, so that a model has to guess what comes next"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("engine")
    more = {"others": ("<|more|>",)}
    return {
        name: str(chat_model(root / name, special=more.get(name, ())))
        for name in ("large", "small", "others")
    }


@pytest.fixture
def engine() -> Iterator[ThreadedEngine]:
    with running() as made:
        yield made


def answer(engine: ThreadedEngine, model: str, **options) -> list:
    request = Request.of(TEXT, **{"max_tokens": 30, **options})
    return asyncio.run(collect(engine.submit(Ask(model, request))))


def eager(engine: ThreadedEngine, model: str) -> None:
    """Have all drafts computed, and nothing looked up."""
    loaded = engine._pool.find(key_of(model))
    assert loaded is not None
    loaded.scheduler.runtime.drafting.costs = Eager()
    loaded.scheduler.runtime.drafting.forget()


def test_a_request_gets_the_model_that_it_names_as_its_drafter(engine, models):
    plain = tokens(answer(engine, models["large"], draft="off"))
    eager(engine, models["large"])
    chunks = answer(engine, models["large"], draft=models["small"])
    assert tokens(chunks) == plain
    drafts = stats(chunks).drafts
    assert drafts is not None
    assert drafts.by["model"][1] > 5
    assert {loaded.name for loaded in engine.loaded()} == {models["large"], models["small"]}
    counts = engine.stats().models[models["large"]]
    assert counts.accepted_tokens["model"] == drafts.by["model"][1]
    small = next(each for each in engine.loaded() if each.name == models["small"])
    assert small.pages_ram_bytes > 0  # the prompt, once for all answers


def test_one_that_drafts_can_leave_and_comes_back(engine, models):
    answer(engine, models["large"], draft=models["small"])
    key = key_of(models["small"])
    small, large = engine._pool.find(key), engine._pool.find(key_of(models["large"]))
    assert small is not None
    assert large is not None
    assert small.expires_at() == pytest.approx(large.expires_at(), abs=1)
    asyncio.run(engine.unload(models["small"]))
    assert engine._pool.find(key) is None
    assert large.scheduler.runtime.draft_models.runtimes == []
    eager(engine, models["large"])
    drafts = stats(answer(engine, models["large"], draft=models["small"])).drafts
    assert drafts is not None
    assert "model" in drafts.by


def test_of_other_tokens_a_request_is_told_and_settings_are_logged(models, caplog):
    with running(given=Given(draft=models["others"])) as engine:
        assert len(tokens(answer(engine, models["large"]))) == 30
        assert "is answered without drafts of" in caplog.text
        with pytest.raises(UsageError, match="a model with the same tokens"):
            answer(engine, models["large"], draft=models["others"])
        assert len(tokens(answer(engine, models["large"]))) == 30
        assert caplog.text.count("is answered without drafts of") == 1


def test_a_model_that_waits_for_its_drafter_is_not_unloaded(engine, models):
    key = key_of(models["large"])
    asyncio.run(engine.load(models["large"]))
    large = engine._pool.find(key)
    assert large is not None
    real, seen = engine._pool.loading, []

    def loading(name: str, key_: str):
        seen.append(large.is_idle)
        return real(name, key_)

    engine._pool.loading = loading
    assert len(tokens(answer(engine, models["large"], draft=models["small"]))) == 30
    assert seen == [False]


def test_two_models_may_draft_for_each_other(engine, models):
    one, other = models["large"], models["small"]
    for model, drafter in ((one, other), (other, one), (one, other)):
        assert len(tokens(answer(engine, model, draft=drafter))) == 30
    ends = [engine._pool.find(key_of(model)).expires_at() for model in (one, other)]
    assert ends[0] == ends[1]


def test_a_model_that_drafts_is_loaded_under_the_name_that_asks_for_it(engine, models):
    request = Request.of(TEXT, max_tokens=2, draft="small")
    ask = Ask(models["large"], request, draft_path=Path(models["small"]))
    asyncio.run(collect(engine.submit(ask)))
    assert {each.name for each in engine.loaded()} == {models["large"], "small"}


def test_a_model_that_keeps_states_drafts_for_none(engine, models, tmp_path):
    hybrid = str(hybrid_chat_model(tmp_path / "hybrid"))
    with pytest.raises(UsageError, match="keep keys and values"):
        answer(engine, models["large"], draft=hybrid)
