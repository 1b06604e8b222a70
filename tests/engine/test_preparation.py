"""Long prompts are prepared beside the engine's thread: other requests go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxkv.chat.interrupt import Interrupted, check_point
from mlxkv.engine.engine import ThreadedEngine
from mlxkv.engine.messages import Ask
from mlxkv.engine.prompt import make_ready
from mlxkv.engine.queue import waiting
from mlxkv.engine.queue.preparation import LONG, MAX_PREPARED, MAX_THREADS, Preparer, is_long
from mlxkv.errors import MlxkvError
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request
from tests.support.command_line import chat_model
from tests.support.threaded_engine import running

WAIT_S = 60
TEXT = "a b " * (LONG // 4)
SHORT = "hello"


class Gate:
    """Stands in for `make_ready`: preparing a long prompt takes until the gate is opened."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Semaphore(0)
        self.n_begun = self.n_interrupted = 0

    def __call__(self, runtime, request, owner=""):
        if request.prompt != SHORT:
            assert threading.current_thread().name.startswith("mlxkv prompt")
            self.n_begun += 1
            self.reached.release()
            try:
                while not self.opened.wait(0.01):
                    check_point()
            except Interrupted:
                self.n_interrupted += 1
                raise
        return make_ready(runtime, request, owner)


class Panic(BaseException):
    """Stands in for a panic in the tokenizer's library."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("preparation")
    return chat_model(root / "llama", max_position_embeddings=32_768)


@pytest.fixture
def gate(monkeypatch) -> Gate:
    made = Gate()
    monkeypatch.setattr(waiting, "make_ready", made)
    return made


@pytest.fixture
def engine(gate) -> Iterator[ThreadedEngine]:
    with running(next_turns=False) as made:
        yield made
        gate.opened.set()


def ask(model: Path, prompt: str) -> Ask:
    return Ask(str(model), Request.of(prompt, max_tokens=2, truncate=True, context=64))


async def answered(engine: ThreadedEngine, asked: Ask) -> list[Chunk]:
    return [chunk async for chunk in engine.submit(asked)]


async def reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.reached.acquire, timeout=WAIT_S)


def test_others_are_answered_while_a_long_prompt_is_prepared(engine, gate, model):
    async def scene() -> None:
        long = asyncio.create_task(answered(engine, ask(model, TEXT)))
        await reached(gate)
        for _ in range(3):
            assert (await answered(engine, ask(model, SHORT)))[-1].finish_reason == "length"
        assert not long.done()
        gate.opened.set()
        assert (await long)[-1].finish_reason == "length"

    asyncio.run(asyncio.wait_for(scene(), WAIT_S))
    assert gate.n_begun == 1


def test_a_client_that_leaves_ends_the_preparation_of_its_prompt(engine, gate, model):
    async def scene() -> None:
        left = engine.submit(ask(model, TEXT))
        reading = asyncio.create_task(anext(aiter(left), None))
        await reached(gate)
        left.cancel()
        assert await reading is None
        while not gate.n_interrupted:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scene(), WAIT_S))


def test_few_long_prompts_are_prepared_at_a_time(engine, gate, model):
    n = MAX_PREPARED + 3

    async def scene() -> None:
        asked = [asyncio.create_task(answered(engine, ask(model, TEXT))) for _ in range(n)]
        for _ in range(MAX_THREADS):
            await reached(gate)
        await answered(engine, ask(model, SHORT))
        assert gate.n_begun == MAX_THREADS
        gate.opened.set()
        for chunks in await asyncio.gather(*asked):
            assert chunks[-1].finish_reason == "length"

    asyncio.run(asyncio.wait_for(scene(), WAIT_S))
    assert gate.n_begun == n


def test_token_ids_are_counted_beside_the_engines_thread(engine, gate, model, monkeypatch):
    monkeypatch.setattr("mlxkv.engine.engine.make_ready", gate)

    async def scene() -> None:
        counted = asyncio.create_task(engine.tokenize(ask(model, TEXT)))
        await reached(gate)
        await answered(engine, ask(model, SHORT))
        gate.opened.set()
        assert len(await counted) == 62

    asyncio.run(asyncio.wait_for(scene(), WAIT_S))


def test_closing_ends_what_is_prepared(engine, gate, model, monkeypatch):
    monkeypatch.setattr("mlxkv.engine.engine.make_ready", gate)

    async def scene() -> None:
        asked = [asyncio.create_task(answered(engine, ask(model, TEXT))) for _ in range(3)]
        counted = asyncio.create_task(engine.tokenize(ask(model, TEXT)))
        await reached(gate)
        await asyncio.to_thread(engine.close)
        for each in (*asked, counted):
            with pytest.raises(MlxkvError):
                await each

    asyncio.run(asyncio.wait_for(scene(), WAIT_S))


def test_whatever_is_raised_is_the_error_of_that_prompt():
    def panic() -> None:
        raise Panic("the library failed")

    done = threading.Event()
    preparer = Preparer(done.set)
    made = preparer.start(panic, lambda: False)
    assert done.wait(WAIT_S)
    with pytest.raises(MlxkvError, match="the library failed"):
        made.result()
    preparer.close()
    with pytest.raises(MlxkvError, match="stopped"):
        preparer.start(panic, lambda: False)


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ("a" * (LONG - 1000), {}, False),
        ("a" * LONG, {}, True),
        ([1] * LONG, {}, True),
        ([{"role": "user", "content": "a"}] * LONG, {}, True),
        ([{"role": "user", "content": [{"type": "text", "text": "a" * LONG}]}], {}, True),
        ([{"role": "user", "content": "a"}], {}, False),
        ([{"role": "user", "content": "a"}], {"tools": [{"a": dict.fromkeys(range(LONG))}]}, True),
    ],
)
def test_prompts_are_long_by_their_characters_and_values(prompt, options, expected):
    assert is_long(Request.of(prompt, **options)) is expected
