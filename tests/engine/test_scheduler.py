"""One loaded model and its requests, step by step."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import mlxkv
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Prefilling, Task, Waiting
from mlxkv.errors import KVCacheFull
from mlxkv.generation.decoder import Decoder, Row
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request
from mlxkv.generation.session import Session
from tests.support.command_line import chat_model

A, B, C = (
    "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=n))
    for seed, n in ((1, 2000), (2, 1300), (3, 900))
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return chat_model(
        tmp_path_factory.mktemp("serving") / "m", family="llama", max_position_embeddings=4096
    )


class Asked:
    """A request to a served model, and what came of it."""

    def __init__(self, served: Scheduler, prompt: str, **options: Any):
        self.told: list[Chunk | BaseException | None] = []
        self.cancelled = False
        request = Request.of(prompt, **{"max_tokens": 5, **options})
        self.task = Task(request, self.told.append, lambda: self.cancelled)
        served.add(self.task)

    @property
    def tokens(self) -> list[int]:
        return [chunk.token for chunk in self.chunks if chunk.token is not None]

    @property
    def chunks(self) -> list[Chunk]:
        return [item for item in self.told if isinstance(item, Chunk)]

    @property
    def errors(self) -> list[BaseException]:
        return [item for item in self.told if isinstance(item, BaseException)]

    @property
    def over(self) -> bool:
        return bool(self.told) and not (
            isinstance(self.told[-1], Chunk)  # None, or an error, is the last
        )


_made: list[Scheduler] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while _made:
        scheduler = _made.pop()
        scheduler.stop()
        scheduler.runtime.close()


def tight(path: Path, factor: float) -> Scheduler:
    """With so many times the memory that 2,050 tokens need."""
    llm = mlxkv.load(path, dtype="float32")
    least = llm.budget._need("native").least(2050)
    llm.budget.limit_bytes = llm.budget.weights_bytes + int(factor * least)
    _made.append(Scheduler(llm, 16))
    return _made[-1]


def run(served: Scheduler, asked: Sequence[Asked] = ()) -> int:
    """Until all is answered; how many steps that took."""
    n = 0
    while not served.is_idle:
        served.step()
        n += 1
        assert n < 2000
    assert all(one.over for one in asked)
    return n


def alone(path: Path, prompt: str) -> list[int]:
    with mlxkv.load(path, dtype="float32") as llm:
        return list(llm.generate(prompt, max_tokens=5).tokens)


@pytest.mark.parametrize("factor", [1.1, 1.6])
def test_prompts_that_do_not_fit_together_wait_for_each_other(path, factor):
    served = tight(path, factor)
    first = Asked(served, A)
    served.step()
    others = [Asked(served, B), Asked(served, C)]
    run(served, [first, *others])
    for asked, prompt in zip((first, *others), (A, B, C), strict=True):
        assert asked.errors == []
        assert asked.tokens == alone(path, prompt)
    assert served.runtime.budget.kv_bytes == 0


def test_an_answer_gets_a_token_in_each_step_while_others_join(path):
    served = Scheduler(mlxkv.load(path, dtype="float32"), 16)
    _made.append(served)
    first = Asked(served, "first", max_tokens=40, ignore_eos=True)
    while len(first.tokens) < 2:
        served.step()
    before = len(first.tokens)
    others = [Asked(served, f"{i}", max_tokens=20, ignore_eos=True) for i in range(8)]
    n_steps = 0
    while not others[-1].tokens:
        served.step()
        n_steps += 1
    assert n_steps >= len(others)
    assert len(first.tokens) - before == n_steps


def test_a_prompt_that_does_not_fit_alone_is_refused(path):
    served = tight(path, 0.5)
    long, short = Asked(served, A), Asked(served, C[:300])
    run(served, [long, short])
    assert [type(error) for error in long.errors] == [KVCacheFull]
    assert short.errors == [] and short.tokens == alone(path, C[:300])


def test_a_prompt_that_waits_for_room_can_be_cancelled(path):
    served = tight(path, 1.1)
    first = Asked(served, A)
    served.step()
    second = Asked(served, B)
    while not (isinstance(second.task.state, Prefilling) and second.task.state.needs_room):
        served.step()
    second.cancelled = True
    run(served, [first, second])
    assert second.told == [None] and first.tokens == alone(path, A)


def test_a_cut_for_lack_of_room_ends_when_there_is_room_again(path):
    served = tight(path, 1.5)
    neighbour = served.runtime.session()
    neighbour.prefill(served.runtime.tokenizer.encode(B))
    first = Asked(served, A)

    def cap() -> int | None:
        served.step()
        state = first.task.state
        if isinstance(state, Waiting):
            return None
        return served.runtime.budget.chunk_cap(state.generation.session)

    while (cut := cap()) is None or cut > 16:
        assert not first.over
    neighbour.reset()
    cuts = [cap(), cap()]
    assert not first.over and None not in cuts and cuts[-1] in (32, 64)
    run(served, [first])
    assert first.tokens == alone(path, A)
    stats = first.chunks[-1].stats
    assert stats is not None
    told = [rung.amount for rung in stats.rungs if rung.kind == "chunk"]
    assert told == sorted(told, reverse=True) and len(told) == len(set(told))


def test_what_was_computed_before_a_wait_counts_as_computed(path):
    served = tight(path, 1.1)
    first = Asked(served, A)
    served.step()
    second = Asked(served, B)
    run(served, [first, second])
    stats = second.chunks[-1].stats
    assert stats is not None
    assert stats.prompt_tokens == stats.computed_tokens + stats.restored_tokens
    assert stats.restored_tokens == 0


def test_a_restart_can_free_the_prompts_logits(path, monkeypatch):
    served = tight(path, 2.5)
    add, start_over = Decoder.add, Session.start_over
    logits: list[weakref.ref] = []
    freed: list[bool] = []

    def fail_once(self: Decoder, row: Row) -> None:
        if logits:
            return add(self, row)
        logits.append(weakref.ref(row.logits))
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    def looked(self: Session, tokens: list[int], error: BaseException) -> None:
        freed.append(logits[0]() is None)
        start_over(self, tokens, error)

    monkeypatch.setattr(Decoder, "add", fail_once)
    monkeypatch.setattr(Session, "start_over", looked)
    asked = Asked(served, C)
    run(served, [asked])
    assert freed == [True] and asked.errors == []
    assert asked.tokens == alone(path, C)
