"""What each client restored and computed, and which prefix its sessions share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import mlxkv
from mlxkv.engine import clients as module
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.clients import Clients, merge_counts, session_key, shared_prefix
from mlxkv.engine.engine import ThreadedEngine
from mlxkv.engine.messages import Ask, ClientCounts, Lost
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.generation.outputs import Miss, Stats
from mlxkv.generation.request import Request
from mlxkv.kv.types import STEP
from mlxkv.memory import needs
from mlxkv.prefix.layout import Link
from tests.support.command_line import chat_model
from tests.support.fake_engine import stats


def chain(*names: str) -> list[Link]:
    """Pages from position 0 on, by their names."""
    parents = ["0", *names]
    return [Link(parents[i], name, STEP * i) for i, name in enumerate(names)]


def names(links: Sequence[Link]) -> str:
    return "".join(link.name for link in links)


@pytest.mark.parametrize(
    ("sessions", "spared", "expected"),
    [
        ([], "abc", "abc"),
        (["abcde"], "", ""),
        (["abcde", "xyz"], "", ""),
        (["abcd", "abcxy"], "", "abc"),
        (["abcd", "abxy", "abzw"], "", "ab"),  # two pages saved twice, not three once
        (["abcdef", "ab123", "abcdxy"], "", "abcd"),
        (["ab", "a1"], "", ""),  # one page is not worth it
        (["abcd"], "abc", "abc"),  # after a restart
        (["abcd", "abxy"], "abcd", "ab"),  # another session does not have it
        (["wxyz", "wxy1"], "abc", "wxy"),  # the client's prompt is another now
        (["abcd", "abce", "wxyz", "wxy1"], "abc", "abc"),  # it saves no more
        (["abcd", "abcd"], "", "abcd"),
    ],
)
def test_the_prefix_by_which_sessions_save_most_is_spared(sessions, spared, expected):
    assert names(shared_prefix([chain(*each) for each in sessions], chain(*spared))) == expected


@pytest.mark.parametrize(
    ("prompt", "other", "is_same"),
    [
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "hi"}],
         [{"role": "system", "content": "b"}, {"role": "user", "content": "hi"},
          {"role": "assistant", "content": "x"}, {"role": "user", "content": "on"}], True),
        ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}], False),
    ],
)  # fmt: skip
def test_a_session_is_known_by_its_first_question(prompt, other, is_same):
    assert (session_key(prompt) == session_key(other)) is is_same


@pytest.mark.parametrize("prompt", ["hi", [1, 2, 3], [], [{"role": "system", "content": "a"}]])
def test_what_has_no_question_is_no_session(prompt: Any):
    assert session_key(prompt) is None


def lost(text: str, n: int) -> Any:
    before, after = text.split("|")
    return stats(miss=Miss("diverged", 7, f"{before}|old", f"{before}|{after}", n, 0.1))


def test_the_texts_at_which_most_was_lost_come_first():
    made = Clients()
    for text, n in [("date|1", 10), ("hash|a", 900), ("date|2", 30), ("hash|b", 100)]:
        made.count("me", "agent", lost(text, n))
    made.count("me", "agent", stats())
    made.count("me", "", lost("date|1", 10))
    (figures,) = made.figures()
    assert figures.lost == (
        Lost("diverged", 7, "hash|old", "hash|b", 1000, 2),
        Lost("diverged", 7, "date|old", "date|2", 40, 2),
    )
    assert (figures.client, figures.answered, figures.restored_tokens) == ("agent", 5, 30)


def test_what_is_remembered_of_clients_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_CLIENTS", 3)
    made = Clients()
    for name in "abcad":
        made.count("", name, stats())
    for i in range(100):
        made.count("", "d", lost(f"{i}|x", i))
    assert [each.client for each in made.figures()] == ["c", "a", "d"]
    assert len(made.figures()[-1].lost) == module.SHOWN_LOST
    assert made.figures()[-1].lost[0].n_tokens == 99


def test_one_client_of_two_models_is_shown_once():
    text = Lost("diverged", 1, "a", "b", 5, 1)
    one = ClientCounts("me", "x", 1, 10, 6, 4, 2, 512, [text])
    other = ClientCounts("me", "x", 2, 20, 5, 15, 3, 256)
    found = merge_counts([one, other, ClientCounts("you", "x")])
    assert found == [ClientCounts("me", "x", 3, 30, 11, 19, 5, 512, [text]),
                     ClientCounts("you", "x")]  # fmt: skip


# With a model.

ROOM_BYTES = 4 << 20
"""For pages: some 5,000 tokens of the model here."""
HEAD = " ".join(f"Rule {i} of the agent." for i in range(70))


def ask(model: Path, question: str, client: str = "agent", owner: str = "") -> Ask:
    prompt = [{"role": "system", "content": HEAD}, {"role": "user", "content": question}]
    return Ask(str(model), Request.of(prompt, max_tokens=2), owner, client=client)


async def send(engine: ThreadedEngine, *asks: Ask) -> list[Any]:
    found = []
    for each in asks:
        chunks = [chunk async for chunk in engine.submit(each)]
        found.append(chunks[-1].stats)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_sessions_share_is_there_after_a_restart(tmp_path, monkeypatch, family):
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    model = chat_model(tmp_path / "m", family=family, max_position_embeddings=4096)
    n_shared = 0
    for round in range(2):
        engine = ThreadedEngine(dtype="float32")
        engine.start()
        first, second = asyncio.run(
            send(engine, *(ask(model, f"{i}: question {round}") for i in range(2)))
        )
        (figures,) = engine.stats().clients
        engine.close()
        assert (first.restored_ssd_tokens > 1000) is (round == 1)
        assert second.computed_tokens < STEP
        assert figures.answered == 2 and figures.shared_tokens > 1000
        assert figures.restored_tokens == first.restored_tokens + second.restored_tokens
        n_shared = n_shared or figures.shared_tokens
        assert figures.shared_tokens == n_shared and n_shared % STEP == 0
    (file,) = (tmp_path / "kv" / "pages").glob("*/shared.json")
    assert "agent" in file.read_text()


def test_other_sessions_do_not_push_out_what_a_client_shares(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_DISK", "0")
    monkeypatch.setattr(needs, "pages_bytes", lambda *_: ROOM_BYTES)
    model = chat_model(tmp_path / "m", max_position_embeddings=4096)
    engine = ThreadedEngine(dtype="float32")
    engine.start()

    async def run() -> Any:
        await send(engine, ask(model, "one"), ask(model, "two"))
        (loaded,) = engine._pool.models()
        pages = loaded.scheduler.runtime.pages
        assert pages is not None and pages.nbytes < ROOM_BYTES
        for i in range(8):
            text = "".join(chr(97 + (j * j + i * j) % 23) for j in range(2000))
            await send(engine, Ask(str(model), Request.of(text, max_tokens=2)))
        assert pages.nbytes <= pages.room.budget_bytes == ROOM_BYTES
        return await send(engine, ask(model, "three"))

    try:
        (third,) = asyncio.run(run())
    finally:
        engine.close()
    assert third.computed_tokens < STEP


@pytest.mark.parametrize("idle", ["off", "light", "full"])
def test_pages_of_a_conversation_are_read_before_and_while_its_request_waits(
    idle, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    monkeypatch.setattr("mlxkv.engine.ahead.choice.FULL", 2 * STEP)
    model = chat_model(tmp_path / "m", max_position_embeddings=4096)
    llm = mlxkv.load(model, dtype="float32")
    scheduler, told = Scheduler(llm, 1, IdleCompute(idle)), []

    def add(owner: str = "", client: str = "agent") -> None:
        request = ask(model, "one").request
        scheduler.add(Task(request, told.append, lambda: False, owner, client=client))

    def answer() -> Stats:
        while not scheduler.is_idle:
            scheduler.step()
        errors = [item for item in told if isinstance(item, BaseException)]
        assert errors == []
        return next(x.stats for x in reversed(told) if x is not None and x.stats is not None)

    add()
    first = answer()
    pages = llm.pages
    assert pages is not None and pages.disk is not None
    links = scheduler.clients.pages_of_session("", "agent", ask(model, "one").request.prompt)
    pages.keep(links, wait=True)
    pages.disk.flush()
    pages.clear()  # from RAM
    read: list[str] = []
    own = pages.disk.fetcher._read
    monkeypatch.setattr(pages.disk.fetcher, "_read", lambda key: read.append(key) or own(key))
    monkeypatch.setattr(pages.disk.files, "read", None)  # the engine's thread reads no file
    add("another")
    add("third", client="other")
    assert pages.disk.fetcher._thread is None
    for owner, client in (("another", "agent"), ("", "other"), ("", "agent")):
        scheduler.fetching.expect(owner, client)
    pages.disk.fetcher.settle()
    n_pages = first.computed_tokens // STEP
    assert n_pages > 2
    assert len(read) == {"off": 0, "light": 2, "full": n_pages}[idle]
    assert bool(llm.budget.pages_bytes) == bool(read)
    if idle == "light":  # something else needs the memory
        assert llm.budget.pages_bytes == llm.budget.give_pages(1)
        assert llm.budget.pages_bytes == 0
        read.clear()
    add()
    pages.disk.fetcher.settle()
    assert len(read) == len(set(read)) == first.computed_tokens // STEP
    held = llm.budget.pages_bytes
    again = answer()
    counts = scheduler.counts
    assert counts.fetched_bytes == held > 0 and counts.fetch_saved_s > 0
    assert again.restored_ssd_tokens == len(read) * STEP
    assert again.computed_tokens == first.computed_tokens - again.restored_ssd_tokens
    scheduler.stop()
    llm.close()
