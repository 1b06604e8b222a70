"""Keys get places in turn, and no answer is lost for another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlxkv
from mlxkv.engine import model_pool
from mlxkv.engine.engine import ThreadedEngine
from mlxkv.engine.messages import Ask, Busy
from mlxkv.engine.queue.shares import FairQueue, share
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.errors import ModelNotFound
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request
from tests.support.command_line import chat_model
from tests.support.threaded_engine import running

LONG = "the quick brown fox jumps over the lazy dog " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return chat_model(
        tmp_path_factory.mktemp("shares") / "m", family="llama", max_position_embeddings=4096
    )


@pytest.fixture
def engine() -> Iterator[ThreadedEngine]:
    with running(max_queue=3) as made:
        yield made


async def collect(answer: AsyncIterable[Chunk]) -> list[int]:
    return [chunk.token async for chunk in answer if chunk.token is not None]


def ask(model: Path, prompt: str = LONG, owner: str = "", **options: Any) -> Ask:
    return Ask(str(model), Request.of(prompt, **{"max_tokens": 8, **options}), owner)


def test_owners_get_places_in_turn():
    queue = FairQueue()
    for owner in "aaabc":
        queue.append(Task(Request.of("x"), lambda _: None, lambda: False, owner))
    order, running = [], []
    while (owner := queue.next_owner(running)) is not None:
        order.append(owner)
        running.append(queue.pop(owner))
    assert "".join(order) == "abcaa" and len(queue) == 0


def test_a_share_is_the_places_by_the_owners_and_at_least_one():
    assert [share(16, owners) for owners in ("a", "ab", "abc", "a" * 9, "abcdefghijklmnopqr")] == [
        16, 8, 5, 16, 1]  # fmt: skip


class Asked:
    """A request to a scheduler, and what came of it."""

    def __init__(self, scheduler: Scheduler, owner: str, prompt: str, **options: Any):
        self.told: list[Any] = []
        request = Request.of(prompt, **{"max_tokens": 60, **options})
        self.task = Task(request, self.told.append, lambda: False, owner)
        scheduler.add(self.task)

    @property
    def tokens(self) -> list[int]:
        chunks = [each for each in self.told if isinstance(each, Chunk)]
        return [chunk.token for chunk in chunks if chunk.token is not None]


def test_a_key_above_its_share_gives_a_place_up_and_loses_no_token(model):
    options: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}, {"repeat_penalty": 1.3}]
    with mlxkv.load(model, dtype="float32") as llm:
        alone = [llm.generate(LONG + str(i), max_tokens=60, **x) for i, x in enumerate(options)]
        scheduler = Scheduler(llm, 3)
        first = [Asked(scheduler, "a", LONG + str(i), **x) for i, x in enumerate(options)]
        while not all(len(each.tokens) > 20 for each in first):
            scheduler.step()
        other = Asked(scheduler, "b", "hello", max_tokens=5)
        while other.told[-1:] != [None]:
            scheduler.step()
        assert len(other.tokens) == 5 and not any(each.told[-1] is None for each in first)
        while not scheduler.is_idle:
            scheduler.step()
        assert [each.tokens for each in first] == [each.tokens for each in alone]
        assert scheduler.counts.requests == 4 and scheduler.counts.answered == 4
        assert scheduler.tally.shown("b").generated_tokens == 5


def test_a_full_queue_refuses_its_own_key_only(model, engine):
    async def run() -> None:
        running = engine.submit(ask(model, owner="a", max_tokens=3000, ignore_eos=True))
        reader = aiter(running)
        await anext(reader)
        scheduler = engine._pool.models()[0].scheduler
        scheduler.max_running = 1  # so that all others wait
        waiting = [engine.submit(ask(model, owner="a")) for _ in range(3)]
        with pytest.raises(Busy) as caught:
            engine.submit(ask(model, owner="a"))
        assert caught.value.status == 429 and caught.value.retry_after_s > 0
        other = engine.submit(ask(model, owner="b"))
        assert engine.stats("a").rejected == 1 and engine.stats("b").rejected == 0
        running.cancel()
        answers = await asyncio.gather(*map(collect, [*waiting, other]))
        assert [len(each) for each in answers] == [8, 8, 8, 8]

    asyncio.run(run())


@pytest.mark.parametrize("how", ["unload", "keep_alive"])
def test_a_model_leaves_when_its_last_answer_has_ended(how, model, engine):
    async def run() -> None:
        long = engine.submit(ask(model, owner="a", max_tokens=300, ignore_eos=True))
        reader = aiter(long)
        n = (await anext(reader)).token is not None
        runtime = engine._pool.models()[0].scheduler.runtime
        if how == "unload":
            assert await engine.unload(str(model))
        later = engine.submit(Ask(str(model), Request.of("x", max_tokens=4), "b", 0.0))
        n += len([chunk async for chunk in reader if chunk.token is not None])
        assert n == 300 and len(await collect(later)) == 4
        while engine.loaded():
            await asyncio.sleep(0.001)
        assert len(await collect(engine.submit(ask(model, owner="b")))) == 8
        assert engine._pool.models()[0].scheduler.runtime is not runtime

    asyncio.run(run())


def test_a_request_for_a_model_that_is_replaced_waits_and_gets_the_new_one(tmp_path, engine):
    path = chat_model(tmp_path / "m", family="llama")

    async def run() -> None:
        first = await collect(engine.submit(ask(path)))
        running = asyncio.ensure_future(
            collect(engine.submit(ask(path, max_tokens=200, ignore_eos=True)))
        )
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        async with engine.without(str(path)):
            assert engine.loaded() == [] and len(await running) == 200
            waiting = asyncio.ensure_future(collect(engine.submit(ask(path))))
            await asyncio.sleep(0.05)
            assert not waiting.done() and engine.loaded() == []
        assert await waiting == first
        async with engine.without(str(path)):
            late = asyncio.ensure_future(collect(engine.submit(ask(path))))
            await asyncio.sleep(0.02)
            path.rename(tmp_path / "gone")
        with pytest.raises(ModelNotFound):
            await late
        assert engine.alive and not engine._loads

    asyncio.run(run())


def test_an_owner_sees_its_own_figures_alone(model, engine):
    async def run() -> None:
        reader = aiter(engine.submit(ask(model, owner="a", max_tokens=400, ignore_eos=True)))
        await anext(reader)
        mine, others, total = engine.stats("a"), engine.stats("b"), engine.stats()
        assert (mine.running, others.running, total.running) == (1, 0, 1)
        assert mine.memory["kv_used"] > 0 == others.memory["kv_used"] == others.memory["pages"]
        assert not {"active", "cached", "peak"} & others.memory.keys()
        (loaded,) = engine.loaded("b")
        assert (loaded.n_sequences, loaded.kv_used_bytes, loaded.pages_ssd_bytes) == (0, 0, 0)
        async for _ in reader:
            pass
        prompts = [engine.stats(each).models[str(model)].prompt_tokens for each in ("a", "b", None)]
        assert prompts == [len(LONG), 0, len(LONG)]
        assert engine.stats("a").memory["pages"] > 0 == engine.stats("b").memory["pages"]

    asyncio.run(run())


def test_a_model_that_is_always_busy_gives_way_to_another(tmp_path, monkeypatch):
    monkeypatch.setattr(model_pool, "PATIENCE_S", 0.05)
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    model, other = (chat_model(tmp_path / name, **shape) for name in "ab")
    sizes = [mlxkv.plan(path, dtype="float32").weights_bytes for path in (model, other)]
    engine, done = ThreadedEngine(dtype="float32", memory=sum(sizes) - 1), asyncio.Event()
    engine.start()

    async def busy() -> list[int]:
        counts = []
        while not done.is_set():
            asked = ask(model, "hello", owner="a", max_tokens=20, ignore_eos=True)
            counts.append(len(await collect(engine.submit(asked))))
        return counts

    async def run() -> None:
        first = [asyncio.ensure_future(busy()) for _ in range(2)]
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        asked = ask(other, "hello", owner="b", max_tokens=3, ignore_eos=True)
        assert len(await collect(engine.submit(asked))) == 3
        done.set()
        assert {n for each in await asyncio.gather(*first) for n in each} == {20}

    try:
        asyncio.run(asyncio.wait_for(run(), 60))
    finally:
        engine.close()
