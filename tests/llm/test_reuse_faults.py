"""Prefix reuse when things go wrong: interrupts, tight memory, forged names, numbers that are none.

Whatever happens, what is handed out is the KV of exactly the tokens it is handed out for.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.cache import RotatingKVCache
from mlxkv.errors import CheckpointError, UsageError
from mlxkv.generation.session import Session
from mlxkv.kv.types import STEP
from mlxkv.llm.llm import LLM
from mlxkv.prefix.on_disk.format import PageKey
from mlxkv.prefix.pages import Pages
from tests.prefix.test_pages import ROW, Sequence_, new_pages, told
from tests.support.command_line import chat_model
from tests.support.tiny import tokens as random_tokens

pytestmark = pytest.mark.usefixtures("kv")


@pytest.fixture(scope="module")
def folder(reused) -> Path:
    stretching = {"type": "dynamic", "factor": 4.0}
    chat_model(reused / "dynamic", max_position_embeddings=400, rope_scaling=stretching)
    return reused


@pytest.fixture
def llm(either) -> LLM:
    return either


def ids(n: int, seed: int = 0) -> list[int]:
    return random_tokens(n, vocab_size=200, seed=seed)


def answer(llm: LLM, session: Session, tokens: list[int]) -> np.ndarray:
    """Logits behind a prompt, through whatever the session restores."""
    session.restore(tokens)
    return np.array(session.prefill(tokens))


def cold(llm: LLM, tokens: list[int]) -> np.ndarray:
    return np.array(Session(llm.model).prefill(tokens))


# Interrupts.


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_load_leaves_nothing_behind(llm, at, error, monkeypatch):
    a, b = ids(600, seed=1), ids(900, seed=2)
    for tokens in (a, b):
        assert llm.generate(tokens, max_tokens=1).stats.restored_tokens == 0
    session = llm.session()
    session.restore(a)
    session.prefill(a)
    calls = []

    def interrupting(real):
        def load(self, parts, room=0):
            calls.append(1)
            if len(calls) == at + 1:
                raise error
            real(self, parts, room)

        return load

    for kind in {type(cache) for cache in session.caches}:
        monkeypatch.setattr(kind, "load", interrupting(kind.load))
    with pytest.raises(error):
        session.restore([*b, 5])
    monkeypatch.undo()
    session.finish()
    assert session.tokens == []
    for tokens in (a, b):
        np.testing.assert_allclose(
            answer(llm, llm.session(), [*tokens, 7]), cold(llm, [*tokens, 7]), atol=1e-4
        )


@pytest.mark.parametrize("window", [3, 8, 300])
def test_an_interrupted_update_leaves_a_rotating_cache_as_it_was(window, monkeypatch):
    """As it was before, or as it is after: wherever the interrupt comes, at every call."""
    rows = mx.arange(2000.0).reshape(1, 1, 1000, 2)
    for L in (1, 2, 5, 400):
        for n_call in range(60):
            cache = RotatingKVCache(window)
            for start in range(0, 500, 50):
                cache.update(rows[:, :, start : start + 50], rows[:, :, start : start + 50])
            cache.update(rows[:, :, 500:501], rows[:, :, 500:501])
            first = cache.first
            new = rows[:, :, 501 : 501 + L]
            was_interrupted = interrupted(lambda c=cache, x=new: c.update(x, x), n_call)
            assert cache.offset in ((501, 501 + L) if was_interrupted else (501 + L,))
            assert cache.first == first or cache.offset > 501
            held = cache.read(cache.first, cache.offset)
            np.testing.assert_array_equal(held.k, rows[:, :, cache.first : cache.offset])
            np.testing.assert_array_equal(held.v, rows[:, :, cache.first : cache.offset])
            if not was_interrupted:
                assert n_call > 5
                break
        else:
            pytest.fail("no update came to its end")


def interrupted(action, n_call: int) -> bool:
    """Run it with an interrupt at its n-th call of a function; whether one came."""
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        if event in ("call", "c_call") and argument is not sys.setprofile:
            calls += 1
            if calls == n_call + 2:  # the first is the action's own
                raise Interrupt

    gc.disable()  # what its callbacks call is no call of the action, and what they raise is lost
    sys.setprofile(profile)
    try:
        action()
    except Interrupt:
        return True
    finally:
        sys.setprofile(None)
        gc.enable()
    return False


class Interrupt(BaseException):
    """What Ctrl-C raises, under a name that does not end the tests."""


def test_a_prefill_that_is_interrupted_between_layers_gives_no_wrong_pages(llm, monkeypatch):
    tokens = ids(1000)
    session = llm.session()
    session.restore(tokens)
    cache = session.caches[-1]
    real, calls = type(cache).update, []

    def update(self, k, v):
        if self is cache:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
        return real(self, k, v)

    monkeypatch.setattr(type(cache), "update", update)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(tokens)
    monkeypatch.undo()
    session.finish()
    np.testing.assert_allclose(answer(llm, llm.session(), tokens), cold(llm, tokens), atol=1e-4)
    np.testing.assert_allclose(answer(llm, session, tokens), cold(llm, tokens), atol=1e-4)


# Rotary embeddings that stretch.


@pytest.mark.parametrize("pages", [True, False])
def test_keys_of_a_longer_sequence_are_not_gone_back_to(folder, pages):
    llm = mlxkv.load(folder / "dynamic")
    session = llm.session() if pages else Session(llm.model)
    tokens = ids(700)
    session.restore(tokens)
    session.prefill(tokens)
    other = [*tokens[:380], 3, 4, 5]
    logits = answer(llm, session, other)
    np.testing.assert_allclose(logits, cold(llm, other), atol=1e-3)


def test_saved_kv_past_the_stretch_is_refused_before_it_is_computed(folder):
    llm = mlxkv.load(folder / "dynamic")
    calls = []
    with pytest.raises(UsageError, match="up to 400 tokens"):
        llm.save_kv("x", "a" * 401, on_progress=lambda *n: calls.append(n))
    assert not calls


# Tight memory.


@pytest.mark.parametrize("n_pages", [2, 5, 8])
def test_of_a_prompt_that_does_not_fit_its_beginning_is_kept(n_pages):
    shape = (None,)
    pages, tokens = new_pages(shape, n_pages * STEP * ROW), random_tokens(16 * STEP)
    for _ in range(3):
        told(pages, shape, tokens)
        assert pages.nbytes <= pages.room.budget_bytes
        assert Sequence_(pages, shape).restore([*tokens, 1]).n_tokens == n_pages * STEP


def test_single_steps_lose_no_window_rows(folder):
    """Decoding feeds two tokens between two looks at the caches."""
    llm = mlxkv.load(folder / "gemma3")
    for n in range(STEP - 34, STEP - 28):
        tokens = ids(n, seed=n)
        tail = ids(1, seed=n)
        result = llm.generate(tokens, max_tokens=100)
        whole = [*tokens, *result.tokens]
        assert llm.generate([*whole, *tail], max_tokens=1).stats.restored_tokens >= len(whole) - 1


def test_a_short_live_prefix_does_not_hide_a_long_one_in_pages(llm):
    tokens = ids(900)
    llm.generate(tokens, max_tokens=1)
    session = llm.session()
    session.restore(tokens[:20])
    session.prefill(tokens[:20])
    assert session.restore([*tokens, 5]).n_tokens == 900


# Files.


def test_files_that_went_and_came_again_are_found_again(llm, kv):
    tokens = ids(900)
    llm.generate(tokens, max_tokens=1)
    llm.close()
    first, second = mlxkv.load(llm.path), mlxkv.load(llm.path)
    assert first.generate([*tokens, 1], max_tokens=1).stats.restored_ssd_tokens == 900
    assert first.pages is not None
    first.pages.clear()
    for file in kv.glob("pages/*/*.safetensors"):
        file.unlink()
    assert first.generate([*tokens, 2], max_tokens=1).stats.restored_tokens == 0
    second.generate([*tokens, 3], max_tokens=1)
    second.close()
    first.pages.clear()
    # Of the other process' files, whole pages: a tip is known to the one that wrote it.
    assert first.generate([*tokens, 4], max_tokens=1).stats.restored_ssd_tokens == 768


def test_a_file_that_names_itself_its_parent_is_no_endless_chain(llm, kv):
    tokens = ids(900)
    llm.generate(tokens, max_tokens=1)
    llm.close()
    page = next(kv.glob("pages/*/*.safetensors"))
    name = "c" * 32
    for part in ("full", "window"):
        (page.parent / PageKey(name, name, 256, part).file_name).write_bytes(b"x")
    for file in kv.glob("pages/*/*.256.*.safetensors"):
        key = PageKey.parse(file.name)
        assert key is not None
        if key.parent != name:
            (page.parent / PageKey(key.name, name, 256, "full").file_name).write_bytes(b"x")
    again = mlxkv.load(llm.path)
    assert again.generate([*tokens[:600], *ids(30, seed=9)], max_tokens=1).stats.restored_tokens > 0


def test_short_prompts_that_share_a_prefix_touch_no_disk(llm, kv):
    for n in range(3):
        llm.generate([*ids(100), n], max_tokens=2)
    llm.close()
    assert not kv.exists()


def test_a_bad_size_of_the_disk_is_said_at_once(folder, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_DISK", "abc")
    with pytest.raises(UsageError, match="MLXKV_KV_DISK"):
        mlxkv.load(folder / "llama")


def test_a_process_that_ends_without_closing_ends_quietly(folder, kv):
    code = (
        "import sys, mlxkv; llm = mlxkv.load(sys.argv[1]); "
        "print(len(llm.generate('x' * 200, max_tokens=120).tokens))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder / "gemma3")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "120\n", "")


# What is no KV.


def test_logits_that_are_no_numbers_leave_no_pages(llm, monkeypatch):
    tokens = ids(700)
    real = llm.model.last_logits
    monkeypatch.setattr(llm.model, "last_logits", lambda t, c: real(t, c) * float("nan"))
    with pytest.raises(CheckpointError, match="not numbers"):
        llm.generate(tokens, max_tokens=2)
    monkeypatch.undo()
    assert llm.generate(tokens, max_tokens=2).stats.restored_tokens == 0


def test_an_answer_is_no_worse_for_a_prefix_that_cannot_be_kept(llm, monkeypatch):
    def add(self, *args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Pages, "add", add)
    assert len(llm.generate(ids(100), max_tokens=5).tokens) == 5
