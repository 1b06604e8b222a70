"""Vectors through the engine: its thread, its queue, and models that come and go."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import mlxkv
from mlxkv.engine.messages import Ask, Busy, EmbedAsk
from mlxkv.errors import UsageError
from mlxkv.generation import embed
from mlxkv.generation.embed_request import EmbedRequest
from mlxkv.generation.request import Request
from mlxkv.store.settings import Given
from tests.support.command_line import chat_model
from tests.support.threaded_engine import running
from tests.support.tiny_embedder import texts, write_embedder

pytestmark = pytest.mark.any_device
TEXTS = texts()[:6]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_embedder(tmp_path_factory.mktemp("engine") / "embedder")


def ask(model, of, **options) -> EmbedAsk:
    return EmbedAsk(str(model), EmbedRequest(of, **options), path=model)


def test_requests_share_batches_and_get_their_own_vectors(model, monkeypatch):
    expected = np.array(mlxkv.load(model, dtype="float32").embed(TEXTS))
    sizes, compute = [], embed.EmbedQueue._compute

    def counted(self, batch):
        sizes.append(len({job for job, _ in batch}))
        compute(self, batch)

    monkeypatch.setattr(embed.EmbedQueue, "_compute", counted)

    async def run(engine):
        await engine.load(str(model), path=model)
        asks = [ask(model, TEXTS), ask(model, TEXTS[2:3]), ask(model, TEXTS[:2], dimensions=8)]
        return await asyncio.gather(*(engine.embed(each) for each in asks))

    with running() as engine:
        whole, one, short = asyncio.run(run(engine))
        counts = engine.stats().models[str(model)]
    np.testing.assert_allclose(np.array(whole.vectors), expected, atol=1e-5)
    np.testing.assert_allclose(np.array(one.vectors), expected[2:3], atol=1e-5)
    assert len(short.vectors[0]) == 8
    assert whole.n_tokens == sum(len(text.split()) + 2 for text in TEXTS)
    assert (counts.requests, counts.answered, counts.failed) == (3, 3, 0)
    assert counts.prompt_tokens == whole.n_tokens + one.n_tokens + short.n_tokens
    assert sum(sizes) >= 3


def test_a_model_leaves_as_its_last_request_says_and_needs_no_drafts(model, caplog):
    async def run(engine):
        await engine.embed(EmbedAsk(str(model), EmbedRequest(["w7"]), "", 0.0, model))
        for _ in range(200):
            if not engine.names():
                return True
            await asyncio.sleep(0.01)
        return False

    with running(given=Given(draft="another")) as engine:
        assert asyncio.run(run(engine))
    assert not caplog.text


def test_each_kind_of_model_says_what_it_cannot_do(model, tmp_path):
    chat = chat_model(tmp_path / "chat")

    async def written(engine):
        answer = engine.submit(Ask(str(model), Request.of("w7"), path=model))
        return [chunk async for chunk in answer]

    with running() as engine:
        with pytest.raises(UsageError, match="this is an embedding model"):
            asyncio.run(written(engine))
        with pytest.raises(UsageError, match="no meaningful embeddings"):
            asyncio.run(engine.embed(ask(chat, ["a"])))
        with pytest.raises(UsageError, match="prompt must be one of"):
            asyncio.run(engine.embed(ask(model, ["w7"], prompt="no")))


def test_a_full_queue_refuses_and_what_is_cancelled_is_not_computed(model, monkeypatch):
    computed = []
    compute = embed.EmbedQueue._compute

    def slow(self, batch):
        computed.append(len(batch))
        compute(self, batch)

    monkeypatch.setattr(embed.EmbedQueue, "_compute", slow)
    monkeypatch.setattr(embed, "default_chunk", lambda: 64)

    async def run(engine):
        await engine.load(str(model), path=model)
        first = asyncio.ensure_future(engine.embed(ask(model, TEXTS * 20)))
        while not computed:
            await asyncio.sleep(0)
        with pytest.raises(Busy):
            await engine.embed(ask(model, ["w7"]))
        first.cancel()
        while engine.loaded()[0].n_sequences:
            await asyncio.sleep(0)
        return engine.stats().models[str(model)]

    with running(max_queue=1) as engine:
        counts = asyncio.run(run(engine))
    assert sum(computed) < len(TEXTS) * 40 and counts.cancelled == 1
