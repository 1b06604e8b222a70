"""Whatever a request raises, wherever it raises it, ends that request alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlxkv
from mlxkv.base import device
from mlxkv.engine.ahead.next_turn import NextTurns
from mlxkv.engine.asleep import answers as sleep
from mlxkv.engine.clients import Clients
from mlxkv.engine.engine import ThreadedEngine
from mlxkv.engine.messages import Ask
from mlxkv.engine.queue import waiting
from mlxkv.engine.restarts import MAX_DEATHS, Restarted
from mlxkv.engine.tally import Tally
from mlxkv.errors import InternalError, MlxkvError
from mlxkv.generation import decoder
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request
from mlxkv.generation.session import Session
from mlxkv.sampling.grammar import Grammar, Masker
from mlxkv.text.tokenizer import Tokenizer
from tests.support.command_line import chat_model
from tests.support.threaded_engine import running

BAD, GOOD = "a bad prompt", "a good prompt"


class Panic(BaseException):
    """What a panic in a Rust library looks like: no Exception."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("faults") / "m", family="llama")


@pytest.fixture(scope="module")
def expected(model) -> list[int]:
    with mlxkv.load(model, dtype="float32") as llm:
        return llm.generate(GOOD, max_tokens=12).tokens


@pytest.fixture(scope="module")
def engine() -> Iterator[ThreadedEngine]:
    with running() as made:
        yield made


async def collect(answer: AsyncIterable[Chunk]) -> list[int]:
    return [chunk.token async for chunk in answer if chunk.token is not None]


def ask(model: Path, prompt: str, **options: Any) -> Ask:
    return Ask(str(model), Request.of(prompt, **{"max_tokens": 12, **options}), client="test")


@pytest.fixture(scope="module")
def bad_ids(model) -> list[int]:
    return Tokenizer.from_dir(model).encode(BAD)


def is_bad(args: tuple[Any, ...], ids: list[int]) -> bool:
    """Whether a call is for the bad prompt: its text, its tokens, or its session is there."""
    for each in args:
        request = each.request if isinstance(each, Generation) else each
        if isinstance(request, Request) and request.prompt == BAD:
            return True
        known = each._known if isinstance(each, Session) else each
        if isinstance(known, list) and known[: len(ids)] == ids:
            return True
    return False


PLACES: list[tuple[Any, str, type[BaseException]]] = [
    (waiting, "make_ready", Panic),
    (waiting, "make_ready", SystemExit),
    (sleep, "begin", Panic),
    (Generation, "restore", Panic),
    (Generation, "row", Panic),
    *((Generation, "add", each) for each in (Panic, KeyboardInterrupt, MemoryError)),
    *((Session, each, Panic) for each in ("prefilling", "before_step", "cut_due", "append")),
]


@pytest.mark.parametrize(("owner", "name", "error"), PLACES)
def test_what_a_request_raises_ends_it_alone(
    owner, name, error, model, engine, expected, bad_ids, caplog, monkeypatch
):
    whole = getattr(owner, name)

    def failing(*args: Any, **options: Any) -> Any:
        if is_bad(args, bad_ids):
            raise error("stop here")
        return whole(*args, **options)

    monkeypatch.setattr(owner, name, failing)

    async def run() -> list[Any]:
        answers = [engine.submit(ask(model, prompt)) for prompt in (GOOD, BAD, GOOD)]
        return await asyncio.gather(*map(collect, answers), return_exceptions=True)

    with caplog.at_level(logging.WARNING):
        first, failed, last = asyncio.run(run())
    assert first == last == expected
    assert isinstance(failed, InternalError) and failed.status == 500
    assert "stop here" not in str(failed)
    assert engine.alive and engine.restarts == 0
    lines = [each for each in caplog.records if each.getMessage().startswith("a request failed")]
    assert len(lines) == 1 and "stop here" in lines[0].getMessage()
    assert "\n" not in lines[0].getMessage() and lines[0].exc_info is None


def test_a_batch_that_fails_costs_none_but_the_row_that_fails_it(model, engine, expected,
                                                                 monkeypatch):  # fmt: skip
    whole = decoder.choose

    def failing(logits: Any, rows: Any) -> Any:
        if any(each.sampler.params.seed == 13 for each in rows.values()) and 3 in seen:
            raise Panic("stop here")
        seen.append(len(rows))
        return whole(logits, rows)

    seen: list[int] = []
    monkeypatch.setattr(decoder, "choose", failing)

    async def run() -> list[Any]:
        asks = [ask(model, GOOD), ask(model, BAD, seed=13, temperature=1.0), ask(model, GOOD)]
        answers = [engine.submit(each) for each in asks]
        return await asyncio.gather(*map(collect, answers), return_exceptions=True)

    first, failed, last = asyncio.run(run())
    assert first == last == expected and isinstance(failed, InternalError)


def test_a_masker_that_panics_ends_its_own_answer(model, engine, expected, monkeypatch):
    def failing(*_: Any) -> Any:
        raise Panic("stop here")

    monkeypatch.setattr(Masker, "allowed", failing)

    async def run() -> list[Any]:
        answers = [
            engine.submit(ask(model, GOOD)),
            engine.submit(ask(model, GOOD, format=Grammar("regex", "[a-z]+"))),
        ]
        return await asyncio.gather(*map(collect, answers), return_exceptions=True)

    good, failed = asyncio.run(run())
    assert good == expected and isinstance(failed, InternalError)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Session, "finish"), (Clients, "ended"), (NextTurns, "add"),
     (NextTurns, "pause"), (Tally, "answered")],
)  # fmt: skip
def test_what_fails_behind_an_answer_does_not_change_it(owner, name, model, engine, expected,
                                                        monkeypatch):  # fmt: skip
    def failing(*_: Any, **__: Any) -> Any:
        raise Panic("stop here")

    monkeypatch.setattr(owner, name, failing)
    assert asyncio.run(_one(engine, ask(model, GOOD))) == expected
    monkeypatch.undo()
    assert asyncio.run(_one(engine, ask(model, GOOD))) == expected and engine.restarts == 0


async def _one(engine: ThreadedEngine, asked: Ask) -> list[int]:
    return await collect(engine.submit(asked))


def test_a_load_that_panics_is_an_error_of_its_requests(tmp_path, engine, model, expected,
                                                        monkeypatch):  # fmt: skip
    other = chat_model(tmp_path / "other", family="llama")

    def failing(*_: Any) -> Any:
        raise Panic("stop here")

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "from_dir", failing)
        with pytest.raises(InternalError):
            asyncio.run(_one(engine, ask(other, GOOD)))
        assert asyncio.run(_one(engine, ask(model, GOOD))) == expected
    assert asyncio.run(_one(engine, ask(other, GOOD))) == expected


def test_a_loop_that_fails_starts_again_and_answers_go_on_the_first_time(model, monkeypatch):
    engine = ThreadedEngine(dtype="float32", max_running=2)
    engine.start()
    share_memory = engine._pool.share_memory
    chosen: dict[str, Any] = {"ignore_eos": True, "seed": 5, "temperature": 1.0}
    prompts = (GOOD, 400), (BAD, 300), ("a third", 20)
    asks = [ask(model, prompt, max_tokens=n, **chosen) for prompt, n in prompts]
    with mlxkv.load(model, dtype="float32") as llm:
        right = [list(llm.generate(x, max_tokens=n, **chosen).tokens) for x, n in prompts]

    def failing() -> None:
        monkeypatch.setattr(engine._pool, "share_memory", share_memory)
        raise Panic("stop here")

    async def run() -> None:
        await engine.load(str(model), keep_alive_s=-1)
        runtime = engine._pool.models()[0].scheduler.runtime
        readers = [aiter(engine.submit(x)) for x in asks]  # two run, and one waits
        found = [[(await anext(readers[i])).token] for i in (0, 1)] + [[]]
        monkeypatch.setattr(engine._pool, "share_memory", failing)
        rest = await asyncio.gather(*map(collect, readers))
        assert [a + b for a, b in zip(found, rest, strict=True)] == right
        assert engine._pool.models()[0].scheduler.runtime is runtime
        assert engine.alive and engine.restarts == 1 and not engine.failed
        reader = aiter(engine.submit(asks[0]))
        for n_restarts in (2, 3):
            await anext(reader)  # which may have waited here: the engine fails when it goes on
            monkeypatch.setattr(engine._pool, "share_memory", failing)
            while engine.restarts < n_restarts:
                await asyncio.sleep(0.001)
        with pytest.raises(Restarted) as caught:
            await collect(reader)
        assert caught.value.status == 503 and engine.restarts == 3

    try:
        asyncio.run(run())
    finally:
        engine.close()


def test_a_loop_that_fails_again_and_again_ends_the_engine(model, monkeypatch):
    engine, told = ThreadedEngine(dtype="float32"), []
    engine.on_failed = lambda: told.append(engine.failed)

    def failing() -> None:
        raise Panic("stop here")

    monkeypatch.setattr(engine._pool, "share_memory", failing)
    engine.start()
    while not told:
        engine._wake()
        engine._thread.join(0.01)
    assert engine.restarts == MAX_DEATHS and not engine.alive and told == [True]
    with pytest.raises(MlxkvError, match="stopped"):
        engine.submit(ask(model, GOOD))


def test_an_engine_that_cannot_start_has_failed(monkeypatch):
    engine, told = ThreadedEngine(dtype="float32"), []
    engine.on_failed = lambda: told.append(engine.failed)

    def failing(_: int) -> Any:
        raise Panic("stop here")

    monkeypatch.setattr(device, "hold_wired", failing)
    engine.start()
    while not told:
        engine._thread.join(0.01)
    assert told == [True] and not engine.alive
    engine.close()


def test_a_panic_is_an_exception_in_python_and_ctrl_c_is_not(model, expected, monkeypatch):
    raised: list[BaseException] = [Panic("stop here"), KeyboardInterrupt()]
    add = Generation.add

    def failing(self: Any, *args: Any) -> Any:
        if raised:
            raise raised.pop(0)
        return add(self, *args)

    monkeypatch.setattr(Generation, "add", failing)
    with mlxkv.load(model, dtype="float32") as llm:
        with pytest.raises(InternalError, match="stop here"):
            llm.generate(GOOD, max_tokens=12)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(GOOD, max_tokens=12)
        assert llm.generate(GOOD, max_tokens=12).tokens == expected
