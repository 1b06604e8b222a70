"""A next turn goes on in the caches of the last, which take nothing from any other request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mlxkv
from mlxkv.engine.ahead import kept
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.model_pool import ModelPool
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.generation.outputs import Chunk, Stats
from mlxkv.generation.request import Request
from mlxkv.kv.types import STEP
from mlxkv.prefix.pages import Pages
from mlxkv.store.settings import Given
from tests.support.command_line import chat_model

PROMPT = "".join(chr(97 + i * i % 26) for i in range(STEP + 60))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("kept")

    def made(family: str) -> Path:
        if not (path := root / family).exists():
            chat_model(path, family=family, ascii=True, max_position_embeddings=4096)
        return path

    return made


_open: list[Scheduler] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while _open:
        scheduler = _open.pop()
        scheduler.stop()
        assert scheduler.runtime.budget.kv_bytes == 0
        scheduler.runtime.close()


def serve(path: Path, kv_type: str = "native", idle: str = "full") -> Scheduler:
    runtime = mlxkv.load(path, dtype="float32", kv_type=kv_type)
    _open.append(Scheduler(runtime, 4, IdleCompute(idle)))
    return _open[-1]


def begin(served: Scheduler, prompt: str, owner: str = "", n: int = 9) -> list[Chunk]:
    told: list[Chunk] = []

    def tell(item: object) -> None:
        assert not isinstance(item, BaseException)
        if isinstance(item, Chunk):
            told.append(item)

    request = Request.of(prompt, max_tokens=n, ignore_eos=True)
    served.add(Task(request, tell, lambda: False, owner))
    return told


def run(served: Scheduler) -> None:
    while not served.is_idle:
        served.step()


def ask(served: Scheduler, prompt: str, owner: str = "", n: int = 9) -> tuple[list[int], Stats]:
    told = begin(served, prompt, owner, n)
    run(served)
    stats = told[-1].stats
    assert stats is not None
    return [chunk.token for chunk in told if chunk.token is not None], stats


@pytest.fixture
def loads(monkeypatch) -> list[int]:
    """Tokens that were loaded from pages, each time."""
    found, own = list[int](), Pages.load

    def load(pages: Pages, match, caches, room=0):
        found.append(match.n_tokens)
        return own(pages, match, caches, room)

    monkeypatch.setattr(Pages, "load", load)
    return found


@pytest.mark.parametrize(
    ("family", "kv_type"),
    [("llama", "native"), ("llama", "q8"), ("llama", "q4"), ("gemma3", "native")],
)
def test_turns_in_kept_caches_are_those_from_pages(models, loads, family, kv_type):
    told = []
    for idle in ("full", "off"):
        served, text, turns = serve(models(family), kv_type, idle), PROMPT, []
        for new in ("And then?", "x" * STEP, "Why?", PROMPT[:20]):
            tokens, stats = ask(served, text)
            turns.append((tokens, stats.computed_tokens, stats.restored_tokens))
            text += served.runtime.tokenizer.decode(tokens) + new
        told.append((turns, len(loads)))
        loads.clear()
    (with_kept, n_with), (without, n_without) = told
    assert with_kept == without
    assert (n_with, n_without) == (0, 3)


def test_a_prompt_that_leaves_the_last_takes_the_caches_back(models, loads):
    served, other = serve(models("llama")), serve(models("llama"), idle="off")
    for prompt in (PROMPT + "One thing.", PROMPT + "Another.", PROMPT[:-30] + "!"):
        assert ask(served, prompt)[0] == ask(other, prompt)[0]
    assert len(loads) == 2  # of the other


def test_caches_are_kept_for_their_owner_alone(models):
    served = serve(models("llama"))
    ask(served, PROMPT, "one")
    assert served.next_turns.kept.nbytes == served.runtime.budget.kv_bytes > 0
    assert ask(served, PROMPT + "?", "two")[1].restored_tokens == 0
    assert ask(served, PROMPT + "?", "one")[1].restored_tokens > STEP  # from its pages


def test_another_prompt_has_them_let_go_before_it_takes_memory(models):
    served = serve(models("llama"))
    ask(served, PROMPT)
    begin(served, "Something else. " * 20)
    served.step()
    assert served.next_turns.kept.nbytes == 0
    run(served)


def test_nothing_is_kept_beside_another_request(models):
    served = serve(models("llama"))
    begin(served, PROMPT, n=2)
    begin(served, PROMPT[::-1], n=30)
    while served.n_sequences != 1 or served.waiting:
        served.step()
    assert served.next_turns.kept.nbytes == 0
    run(served)


def test_nothing_is_kept_where_memory_was_short(models):
    served = serve(models("llama"))
    budget = served.runtime.budget
    budget.limit_bytes = budget.weights_bytes + budget._need("native").least(STEP + 80)
    told = begin(served, PROMPT, n=300)
    run(served)
    assert told[-1].finish_reason == "memory" and served.next_turns.kept.nbytes == 0


def test_what_is_gone_on_from_is_written_as_pages_that_are_loaded_are(
    models, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    monkeypatch.setenv("MLXKV_KV", str(tmp_path))
    written = []
    for idle in ("full", "off"):
        served = serve(models("llama"), idle=idle)
        for prompt in (PROMPT, PROMPT + "?" * STEP):
            ask(served, prompt)
            pages = served.runtime.pages
            disk = None if pages is None else pages.disk
            assert disk is not None
            disk.flush()
            written.append(disk.files.own_bytes())
        monkeypatch.setenv("MLXKV_KV", str(tmp_path / "other"))
    assert written[0] == written[2] == 0 < written[1] == written[3]


def test_a_prompt_that_leaves_them_early_has_buffers_and_files_of_its_own(
    models, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    monkeypatch.setenv("MLXKV_KV", str(tmp_path))
    served = serve(models("llama"))
    pages = served.runtime.pages
    disk = None if pages is None else pages.disk
    assert disk is not None

    def written() -> int:
        disk.flush()
        return disk.files.own_bytes()

    ask(served, PROMPT + "a" * 6 * STEP)
    before = served.next_turns.kept.nbytes
    # The first page is gone on from; of the others it was in the caches' first time.
    ask(served, PROMPT + "b" * 4 * STEP)
    page = written()
    assert served.next_turns.kept.nbytes < before
    ask(served, PROMPT + "b" * 4 * STEP + "c" * STEP)
    assert 0 < page < written() // 2


def test_caches_go_when_a_model_is_loaded_another_has_requests_or_time_is_over(models, monkeypatch):
    pool = ModelPool(2**33, "float32", Given(), 300.0, 4, IdleCompute("full"))
    path = models("llama")
    for _ in (steps := pool.loading("m", str(path))):
        pass
    del steps
    scheduler = pool.models()[0].scheduler
    _open.append(scheduler)
    turns = scheduler.next_turns.kept

    def is_kept() -> bool:
        ask(scheduler, PROMPT)
        return turns.nbytes > 0

    assert is_kept()
    pool.pause_next_turns(is_loading=True)
    assert turns.nbytes == 0 and is_kept()
    pool.pause_next_turns(is_loading=False)  # for another model's request: this one has none
    assert turns.nbytes == 0 and is_kept()
    scheduler.add(Task(Request.of(PROMPT, max_tokens=2), lambda item: None, lambda: False))
    pool.pause_next_turns(is_loading=False)
    assert turns.nbytes > 0
    run(scheduler)
    assert turns.left_s == pytest.approx(kept.KEPT_S, abs=10)
    assert pool.until_next_expiry_s() == pytest.approx(turns.left_s, abs=10)
    pool.expire()
    assert turns.nbytes > 0
    monkeypatch.setattr(kept, "KEPT_S", 0.0)
    assert is_kept() and pool.until_next_expiry_s() == 0
    pool.expire()
    assert turns.nbytes == 0 and len(pool.models()) == 1
