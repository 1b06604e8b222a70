"""The engine: many requests at a time, each answered as it would be alone."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import threading
import time
import weakref
from collections.abc import AsyncIterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.base import device
from mlxkv.checkpoint import weights
from mlxkv.engine import model_pool
from mlxkv.engine.engine import ThreadedEngine
from mlxkv.engine.messages import Ask, Busy
from mlxkv.engine.model_pool import key_of
from mlxkv.engine.scheduler import Scheduler
from mlxkv.errors import MlxkvError, ModelNotFound, OutOfMemory, UsageError
from mlxkv.generation.outputs import Chunk, Stats
from mlxkv.generation.request import Request
from mlxkv.models import Family, loader, reading
from mlxkv.sampling.grammar import Grammar
from mlxkv.store.info import describe
from mlxkv.store.settings import Given
from tests.support.command_line import chat_model
from tests.support.threaded_engine import running

LONG = "".join(chr(97 + (i * i + 3 * i) % 23) for i in range(700))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    return {
        name: chat_model(root / name, family=name, max_position_embeddings=2048)
        for name in ("llama", "gemma3")
    }


@pytest.fixture
def engine() -> Iterator[ThreadedEngine]:
    with running() as made:
        yield made


async def collect(answer: AsyncIterable[Chunk]) -> list[Chunk]:
    return [chunk async for chunk in answer]


def served(engine: ThreadedEngine, model: Path) -> Scheduler:
    """What answers a model's requests."""
    loaded = engine._pool.find(key_of(str(model)))
    assert loaded is not None
    return loaded.scheduler


def ask(model: Path | str, prompt: Any = "hello", *, owner: str = "", **options: Any) -> Ask:
    options = {"max_tokens": 20, "recommended": True, **options}
    return Ask(str(model), Request.of(prompt, **options), owner)


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token for chunk in chunks if chunk.token is not None]


def stats(chunks: list[Chunk]) -> Stats:
    last = chunks[-1].stats
    assert last is not None
    return last


def alone(model: Path, prompt: Any, **options: Any) -> list[int]:
    with mlxkv.load(model, dtype="float32") as llm:
        return tokens(list(llm.stream(prompt, **{"max_tokens": 20, **options})))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_many_requests_get_what_each_gets_alone(family, models, engine):
    model = models[family]
    rng = random.Random(3)
    prompts = [LONG[rng.randint(0, 90) : rng.randint(100, 690)] for _ in range(9)]
    options = [
        {"max_tokens": rng.randint(1, 40)}
        | ({"temperature": 1.0, "seed": i} if i % 3 == 0 else {})
        | ({"stop": "q"} if i % 4 == 1 else {})
        for i in range(9)
    ]

    async def run() -> list[list[Chunk]]:
        answers = [
            collect(engine.submit(ask(model, prompt, **option)))
            for prompt, option in zip(prompts, options, strict=True)
        ]
        return await asyncio.gather(*answers)

    for prompt, option, chunks in zip(prompts, options, asyncio.run(run()), strict=True):
        assert tokens(chunks) == alone(model, prompt, **option)
        assert chunks[-1].finish_reason in ("stop", "length")
        assert stats(chunks).prompt_tokens == len(prompt)
    assert engine.stats().models[str(model)].requests == 9


def test_the_first_chunk_alone_says_how_long_the_prompt_is(models, engine):
    async def run(**options: Any) -> list[int | None]:
        chunks = await collect(engine.submit(ask(models["llama"], LONG[:37], **options)))
        return [chunk.prompt_tokens for chunk in chunks]

    assert asyncio.run(run(max_tokens=3)) == [37, None, None]
    assert asyncio.run(run(max_tokens=1)) == [37]


def test_a_prefix_is_computed_once(models, engine):
    model = models["llama"]

    async def run() -> list[Chunk]:
        await collect(engine.submit(ask(model, LONG)))
        return await collect(engine.submit(ask(model, LONG + "x")))

    assert stats(asyncio.run(run())).computed_tokens <= 5


def test_an_engine_with_nothing_to_do_gives_the_allocators_cache_back(models, engine):
    model = models["llama"]

    def cached_in_the_end() -> int:
        until = time.monotonic() + 10
        while mx.get_cache_memory() and time.monotonic() < until:
            time.sleep(0.01)
        return mx.get_cache_memory()

    async def answered() -> list[Chunk]:
        return await collect(engine.submit(ask(model, LONG)))

    for work in (lambda: engine.load(str(model)), answered):
        mx.eval(mx.zeros(1 << 16))
        assert mx.get_cache_memory() > 0
        asyncio.run(work())
        assert cached_in_the_end() == 0


def test_pages_never_cross_owners(models, engine):
    model = models["llama"]

    async def run(owner: str) -> int:
        chunks = await collect(engine.submit(ask(model, LONG, max_tokens=2, owner=owner)))
        return stats(chunks).restored_tokens

    async def all_of_them() -> list[int]:
        return [await run(owner) for owner in ("a", "b", "a", "b", "")]

    assert [n > 0 for n in asyncio.run(all_of_them())] == [False, False, True, True, False]


def test_models_and_owners_share_the_arrays_that_pages_may_hold(models, engine, monkeypatch):
    monkeypatch.setattr(device, "max_arrays", lambda: 4000)

    async def run() -> None:
        for name, owner in (("llama", "a"), ("llama", "b"), ("gemma3", "")):
            await collect(engine.submit(ask(models[name], max_tokens=2, owner=owner)))

    asyncio.run(run())
    llama, gemma = (served(engine, models[name]) for name in ("llama", "gemma3"))
    assert [p.room.max_arrays for p in llama.runtime._pages.values() if p] == [166] * 3
    assert [p.room.max_arrays for p in gemma.runtime._pages.values() if p] == [500]


def test_a_cancelled_answer_frees_its_place_and_keeps_its_prefix(models, engine):
    model = models["llama"]

    async def run() -> list[Chunk]:
        answer = engine.submit(ask(model, LONG, max_tokens=1200))
        async for _ in answer:
            break
        answer.cancel()
        for _ in range(200):
            if engine.stats().running == 0:
                break
            await asyncio.sleep(0.02)
        assert engine.stats().running == 0
        return await collect(engine.submit(ask(model, LONG)))

    chunks = asyncio.run(run())
    assert stats(chunks).restored_tokens > 600
    assert engine.stats().models[str(model)].cancelled == 1


BAD = [
    ({"model": "nonesuch"}, ModelNotFound),
    ({"prompt": ""}, UsageError),
    ({"prompt": [10**6]}, UsageError),
    ({"prompt": 5000 * "x"}, UsageError),
    ({"think": True}, UsageError),
    ({"logit_bias": {10**7: 1.0}}, UsageError),
]


def test_bad_requests_fail_alone(models, engine):
    model = models["llama"]
    expected = alone(model, LONG[:50])

    async def run() -> None:
        rng = random.Random(1)
        cases = BAD * 2
        rng.shuffle(cases)
        for made, error in cases:
            bad = collect(engine.submit(ask(**{"model": model, **made})))
            good = collect(engine.submit(ask(model, LONG[:50])))
            got, chunks = await asyncio.gather(bad, good, return_exceptions=True)
            assert isinstance(got, error), (made, got)
            assert isinstance(chunks, list), chunks
            assert tokens(chunks) == expected

    asyncio.run(run())
    assert engine.alive


def test_extreme_but_honest_requests_are_answered(models, engine):
    model = models["llama"]

    async def run() -> None:
        for options in (
            {"top_k": 10**6},
            {"top_p": 1e-9, "temperature": 1.0},
            {"temperature": 1e9},
            {"min_p": 1.0, "temperature": 1.0},
            {"max_tokens": 10**6, "stop": "e"},
        ):
            chunks = await collect(engine.submit(ask(model, "hello there", **options)))
            assert chunks[-1].finish_reason in ("stop", "length")

    asyncio.run(run())


async def timed(answer: AsyncIterable[Chunk], order: list[str], name: str) -> list[Chunk]:
    chunks = []
    async for chunk in answer:
        if not chunks:
            order.append(name)
        chunks.append(chunk)
    return chunks


def test_a_short_prompt_does_not_wait_for_a_long_one(models, engine, short_chunks):
    async def run() -> None:
        order: list[str] = []
        names = {"long": LONG * 2, "other": LONG[600::-1], "short": "hello"}
        made = {name: engine.submit(ask(models["llama"], text)) for name, text in names.items()}
        told = await asyncio.gather(*(timed(made[name], order, name) for name in names))
        assert order == ["short", "other", "long"]
        for name, chunks in zip(names, told, strict=True):
            assert tokens(chunks) == alone(models["llama"], names[name])

    asyncio.run(run())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_prompts_share_is_computed_once_though_they_come_at_once(family, models, engine):
    async def run() -> None:
        prompts = [LONG + LONG[:500] + tail for tail in ("a" * 9, "b" * 30, "c" * 300)]
        made = [engine.submit(ask(models[family], prompt)) for prompt in prompts]
        told = await asyncio.gather(*map(collect, made))
        for prompt, chunks in zip(prompts, told, strict=True):
            assert tokens(chunks) == alone(models[family], prompt)
        first, second, third = (stats(chunks) for chunks in told)
        assert first.restored_ram_tokens == 0
        for other in (second, third):
            assert other.computed_tokens <= other.prompt_tokens - first.prompt_tokens + 9 + 256

    asyncio.run(run())


def test_broken_weights_end_a_request_and_not_the_engine(models, engine):
    model = models["llama"]

    async def run() -> None:
        await engine.load(str(model))
        norm = served(engine, model).runtime.model.model.norm
        before = norm.weight

        def broken() -> None:
            norm.weight = before * mx.nan
            mx.eval(norm.weight)

        def whole() -> None:
            norm.weight = before

        await engine._calls.run(broken)
        with pytest.raises(MlxkvError, match="not numbers"):
            await collect(engine.submit(ask(model, "hello")))
        await engine._calls.run(whole)
        chunks = await collect(engine.submit(ask(model, "hello")))
        assert tokens(chunks) == alone(model, "hello")

    asyncio.run(run())


def test_the_queue_has_a_bound(models):
    engine = ThreadedEngine(dtype="float32", max_queue=2)  # not started: nothing leaves the queue
    engine._thread.is_alive = lambda: True  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(2):
        engine.submit(ask(models["llama"]))
    with pytest.raises(Busy) as caught:
        engine.submit(ask(models["llama"]))
    assert caught.value.status == 503 and caught.value.retry_after_s > 0
    assert engine.stats().rejected == 1


def test_models_leave_when_nobody_asks(models):
    engine = ThreadedEngine(dtype="float32", keep_alive_s=0.2)
    engine.start()

    async def run() -> None:
        await collect(engine.submit(ask(models["llama"])))
        assert [loaded.name for loaded in engine.loaded()] == [str(models["llama"])]
        await engine.load(str(models["gemma3"]), keep_alive_s=-1)
        while len(engine.loaded()) > 1:
            await asyncio.sleep(0.01)
        (left,) = engine.loaded()
        assert left.name == str(models["gemma3"]) and left.until is None
        assert await engine.unload(left.name)
        assert not await engine.unload(left.name)
        assert engine.loaded() == []

    try:
        asyncio.run(run())
    finally:
        engine.close()


def test_a_name_is_resolved_once_a_request(models, engine, monkeypatch):
    names: list[Any] = []
    resolve = model_pool.resolve

    def resolving(name: Any, **options: Any) -> Path:
        names.append(name)
        return resolve(name, **options)

    monkeypatch.setattr(model_pool, "resolve", resolving)
    model = models["llama"]
    for _ in range(2):  # one that loads the model, and one that finds it in memory
        asyncio.run(collect(engine.submit(ask(model, max_tokens=1))))
    assert names == [str(model)] * 2
    located = dataclasses.replace(ask("a name of it", max_tokens=1), path=model)
    asyncio.run(collect(engine.submit(located)))
    assert names == [str(model)] * 2 and len(engine.loaded()) == 1


def test_the_least_recently_used_model_makes_room(models):
    sizes = {name: mlxkv.plan(path, dtype="float32").weights_bytes for name, path in models.items()}
    engine = ThreadedEngine(dtype="float32", memory=max(sizes.values()) + 3_000_000)
    engine.start()

    async def run() -> None:
        for name in ("llama", "gemma3", "llama"):
            engine._pool.limit_bytes = sizes[name] + 2_000_000
            chunks = await collect(engine.submit(ask(models[name], "hi", max_tokens=3)))
            assert chunks[-1].finish_reason == "length"
            assert str(models[name]) in [loaded.name for loaded in engine.loaded()]

    try:
        asyncio.run(run())
    finally:
        engine.close()


def test_logprobs_and_grammars(models, engine):
    model = models["llama"]

    async def run() -> tuple[list[Chunk], list[Chunk]]:
        told = ask(model, max_tokens=5, logprobs=3)
        bound = ask(model, max_tokens=60, format=Grammar("regex", "(yes|no) [0-9]{3}"))
        return await asyncio.gather(collect(engine.submit(told)), collect(engine.submit(bound)))

    told, bound = asyncio.run(run())
    for chunk in told:
        assert chunk.logprobs is not None
        assert chunk.logprobs.token == chunk.token == chunk.logprobs.top[0].token
        assert chunk.logprobs.logprob == pytest.approx(chunk.logprobs.top[0].logprob)
        assert len(chunk.logprobs.top) == 3
    text = "".join(chunk.text for chunk in bound)
    assert text[:-4] in ("yes", "no") and text[-3:].isdigit()
    assert bound[-1].finish_reason == "stop"


def test_a_full_context_shifts_in_the_engine_as_well(models):
    engine = ThreadedEngine(dtype="float32", given=Given(context=128, overflow="shift"))
    engine.start()
    model, prompt = models["llama"], LONG[:100]
    with mlxkv.load(model, dtype="float32", context=128, overflow="shift") as llm:
        expected = tokens(list(llm.stream(prompt, max_tokens=150)))
    try:
        chunks = asyncio.run(collect(engine.submit(ask(model, prompt, max_tokens=150))))
    finally:
        engine.close()
    assert tokens(chunks) == expected
    assert stats(chunks).shifted_tokens > 0


def test_a_stream_goes_on_while_a_long_prompt_is_read(models, engine):
    model = models["llama"]

    async def run() -> int:
        await collect(engine.submit(ask(model, "warm", max_tokens=3)))
        answer = engine.submit(ask(model, "hello", max_tokens=1500))
        stream = aiter(answer)
        await anext(stream)
        long = asyncio.ensure_future(collect(engine.submit(ask(model, 2 * LONG, max_tokens=1))))
        n = 0
        while not long.done():
            await anext(stream)
            n += 1
        answer.cancel()
        return n

    assert asyncio.run(run()) >= 5


def test_stats_count_how_requests_ended_and_tokens_as_they_come(models, engine):
    model = models["llama"]

    async def run() -> int:
        chunks = await collect(engine.submit(ask(model, LONG)))
        with pytest.raises(UsageError):
            await collect(engine.submit(ask(model, "")))
        long = engine.submit(ask(model, LONG + "y", max_tokens=None))
        n = 0
        async for _ in long:
            n += 1
            if n == 30:
                break
        assert engine.stats().models[str(model)].generated_tokens >= 20 + 30
        long.cancel()
        while engine.stats().running:
            await asyncio.sleep(0.01)
        return stats(chunks).prompt_tokens

    n_prompt = asyncio.run(run())
    counts = engine.stats().models[str(model)]
    assert (counts.requests, counts.answered, counts.failed, counts.cancelled) == (3, 1, 1, 1)
    assert counts.prompt_tokens == counts.computed_tokens == n_prompt


def test_stats_can_be_read_from_another_thread_at_any_time(models, engine):
    done, wrong = threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            try:
                engine.stats()
                engine.loaded()
            except Exception as error:
                wrong.append(error)
                return

    async def run() -> None:
        for _ in range(4):
            asks = [ask(models["llama"], LONG[i : i + 50], max_tokens=3) for i in range(30)]
            await asyncio.gather(*(collect(engine.submit(one)) for one in asks))

    watcher = threading.Thread(target=watch)
    watcher.start()
    asyncio.run(run())
    done.set()
    watcher.join()
    assert wrong == []


@pytest.fixture
def load_steps(monkeypatch) -> list[Any]:
    """Calls what was appended, at each step of a load, of which there are many."""
    hooks: list[Any] = []
    steps = model_pool.ModelPool.loading

    def watched(*arguments: Any) -> Any:
        loading = steps(*arguments)
        while True:
            try:
                waits = next(loading)
            except StopIteration as stop:
                return stop.value
            for hook in hooks:
                hook()
            yield waits

    monkeypatch.setattr(reading, "MOST_BYTES", 1)
    monkeypatch.setattr(model_pool.ModelPool, "loading", watched)
    return hooks


def test_a_model_is_laid_out_once_to_be_loaded(models, engine, monkeypatch):
    opened, built = [], []
    open_weights, build = weights.open_weights, Family.build

    def opening(path: Any) -> weights.Weights:
        opened.append(Path(path))
        return open_weights(path)

    def building(family: Family, config: Any) -> Any:
        built.append(family.name)
        return build(family, config)

    monkeypatch.setattr(loader, "open_weights", opening)
    monkeypatch.setattr(weights, "open_weights", opening)
    monkeypatch.setattr(Family, "build", building)
    asyncio.run(engine.load(str(models["llama"])))
    assert (opened, built) == ([models["llama"]], ["llama"])
    (loaded,) = engine.loaded()
    card = describe(loaded.name, models["llama"])
    assert (loaded.parameters, loaded.quantization) == (card.parameters, card.quantization)


def test_an_answer_goes_on_while_another_model_is_loaded(models, engine, load_steps):
    async def run() -> None:
        await engine.load(str(models["llama"]))
        counts = served(engine, models["llama"]).counts
        seen: list[int] = []
        load_steps.append(lambda: seen.append(counts.generated_tokens))
        long = engine.submit(ask(models["llama"], LONG, max_tokens=200))
        reader = aiter(long)  # cancelled when it goes
        await anext(reader)
        short = await collect(engine.submit(ask(models["gemma3"])))
        assert tokens(short) == alone(models["gemma3"], "hello")
        assert len(seen) > 20
        between = [b - a for a, b in itertools.pairwise(seen)]
        assert min(between) >= 1  # a token at each step, more where a draft is right
        long.cancel()

    asyncio.run(run())


def test_a_model_that_is_to_leave_while_it_is_loaded_answers_first(models, engine, load_steps):
    async def run() -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        load_steps.append(lambda: (loop.call_soon_threadsafe(told.set), time.sleep(0.02)))
        waiting = [asyncio.ensure_future(engine.load(str(models["llama"]))) for _ in range(2)]
        answer = engine.submit(ask(models["llama"]))
        await told.wait()
        while engine.stats().queued < 3:
            await asyncio.sleep(0.001)
        assert await engine.unload(str(models["llama"]))
        assert await asyncio.gather(*waiting) == [models["llama"]] * 2
        assert tokens(await collect(answer)) == alone(models["llama"], "hello")
        load_steps.clear()
        while engine.loaded():
            await asyncio.sleep(0.001)
        assert engine._pool.used_bytes == 0

    asyncio.run(run())


def test_a_model_that_can_never_fit_unloads_nobody(models):
    sizes = {name: mlxkv.plan(path, dtype="float32").weights_bytes for name, path in models.items()}
    small, large = sorted(sizes, key=sizes.__getitem__)
    engine = ThreadedEngine(dtype="float32", memory=sizes[large] - 1)
    engine.start()

    async def run() -> None:
        await engine.load(str(models[small]))
        with pytest.raises(OutOfMemory, match="limit of all models"):
            await engine.load(str(models[large]))
        assert [loaded.name for loaded in engine.loaded()] == [str(models[small])]

    try:
        asyncio.run(run())
    finally:
        engine.close()


def test_a_model_waits_for_a_busy_one_to_make_room(models):
    sizes = {name: mlxkv.plan(path, dtype="float32").weights_bytes for name, path in models.items()}
    engine = ThreadedEngine(dtype="float32", memory=sum(sizes.values()) - 1)
    engine.start()

    async def run() -> None:
        first = engine.submit(ask(models["llama"], max_tokens=50))
        reader = aiter(first)
        await anext(reader)
        second = asyncio.ensure_future(collect(engine.submit(ask(models["gemma3"]))))
        rest = [chunk async for chunk in reader]
        assert rest[-1].finish_reason == "length"
        assert tokens(await second) == alone(models["gemma3"], "hello")
        assert [loaded.name for loaded in engine.loaded()] == [str(models["gemma3"])]

    try:
        asyncio.run(run())
    finally:
        engine.close()


def test_nobody_waits_for_a_model_that_nobody_wants_any_more(models, load_steps):
    engine = ThreadedEngine(dtype="float32", max_queue=4)
    engine.start()

    async def run() -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        load_steps.append(lambda: (loop.call_soon_threadsafe(told.set), time.sleep(0.02)))
        answers = [engine.submit(ask(models["llama"])) for _ in range(3)]
        waiting = asyncio.ensure_future(engine.load(str(models["llama"])))
        await told.wait()
        while engine.stats().queued < 4:
            await asyncio.sleep(0.001)
        with pytest.raises(Busy):
            engine.submit(ask(models["gemma3"]))
        for answer in answers:
            answer.cancel()
        waiting.cancel()
        while engine.stats().queued:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        assert engine.loaded() == [] and engine._pool.used_bytes == 0

    try:
        asyncio.run(run())
    finally:
        engine.close()


def test_a_model_that_waits_for_room_holds_no_other_up(models, tmp_path):
    large = chat_model(tmp_path / "large", family="llama", intermediate_size=8192)
    sizes = [mlxkv.plan(path, dtype="float32").weights_bytes for path in (large, models["llama"])]
    engine = ThreadedEngine(dtype="float32", memory=sum(sizes) - 1)
    engine.start()

    async def run() -> None:
        first = engine.submit(ask(models["llama"], max_tokens=2000))
        reader = aiter(first)
        await anext(reader)
        second = asyncio.ensure_future(engine.load(str(large)))
        third = await collect(engine.submit(ask(models["gemma3"], max_tokens=3)))
        assert len(tokens(third)) == 3 and not second.done()
        first.cancel()
        assert await second == large

    try:
        asyncio.run(run())
    finally:
        engine.close()


def test_a_model_is_gone_when_its_memory_is_given_back(models, monkeypatch):
    engine = ThreadedEngine(dtype="float32")
    engine.start()
    alive: list[bool] = []
    give_back = model_pool.ModelPool.give_back

    async def run() -> None:
        for keep_alive_s in (0.2, -1):
            await engine.load(str(models["llama"]), keep_alive_s)
            known = weakref.ref(served(engine, models["llama"]).runtime.model)

            def watched(self: Any, known: Any = known) -> None:
                give_back(self)
                alive.append(known() is not None)

            monkeypatch.setattr(model_pool.ModelPool, "give_back", watched)
            if keep_alive_s < 0:
                await engine.unload(str(models["llama"]))
            while engine.loaded():
                await asyncio.sleep(0.01)

    try:
        asyncio.run(run())
    finally:
        engine.close()
    assert alive == [False, False]


def test_a_model_that_is_kept_for_no_time_is_loaded_once_for_a_request(models, load_steps):
    engine = ThreadedEngine(dtype="float32", keep_alive_s=0)
    engine.start()
    steps: list[str] = []
    load_steps.append(lambda: steps.append("step"))

    async def run() -> None:
        await engine.load(str(models["llama"]))
        n = len(steps)
        await asyncio.sleep(0.05)
        await collect(engine.submit(ask(models["llama"])))
        assert n == len(steps) > 0
        while engine.loaded():  # and now it goes
            await asyncio.sleep(0.01)

    try:
        asyncio.run(run())
    finally:
        engine.close()


def test_a_closed_engine_says_so(models):
    engine = ThreadedEngine(dtype="float32")
    engine.start()
    engine.close()
    assert not engine.alive
    with pytest.raises(MlxkvError, match="stopped"):
        engine.submit(ask(models["llama"]))
    time.sleep(0)


def test_the_thread_of_a_closed_engine_stays():
    # If it ended while the interpreter does, MLX's destructors would abort the process.
    engine = ThreadedEngine(dtype="float32")
    engine.start()
    engine.close()
    engine._thread.join(0.2)
    assert engine._thread.is_alive() and engine._thread.daemon
