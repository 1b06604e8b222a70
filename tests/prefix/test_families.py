"""Restored equals uninterrupted, on every family: from RAM, from disk, and after a restart.

Logits are compared bit for bit. The uninterrupted run computes every token in the same chunk as the
restored one: the known sequence up to the chunk in which the prompt leaves it, then it goes back to
that very token, which every cache can right behind a chunk, and on with the rest of the prompt.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.cache import make_caches
from mlxkv.generation.decoder import Row, decode
from mlxkv.generation.prefill import prefill
from mlxkv.generation.session import Session
from mlxkv.kv.types import STEP, ceil_step
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.match import WORTH
from mlxkv.prefix.open import open_pages
from mlxkv.prefix.pages import Pages
from mlxkv.sampling.params import SamplingParams
from mlxkv.sampling.sampler import Sampler
from tests.families.oracle.cases import CASES, LONG, Case
from tests.families.test_parity import Golden
from tests.support.tiny import tokens as random_tokens

STATES = [case for case in CASES if case.name in ("qwen3-next-plain", "qwen3-5-plain")]
"""With layers that keep a state, which does not go back to any token."""
FAMILIES = [
    case
    for case in CASES
    if case.n_prompt == LONG and not case.prefill_in_one and case not in STATES
]
N = 1100
DIVERGENCES = (3, 300, 513, 1090)
ROOM = 2**30
every_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


@functools.cache
def checkpoint(folder: Path, case: Case) -> Path:
    golden = Golden.read(case.name)
    return golden.write(folder / case.name, "new")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("families")
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def kv(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "4GiB")
    return tmp_path / "kv"


@pytest.fixture
def model(case, folder) -> CausalLM:
    return load(checkpoint(folder, case))


@functools.cache
def load(path: Path) -> CausalLM:
    return mlxkv.load_model(path, dtype=mx.float32)


def pages_of(model: CausalLM, case: Case, folder: Path) -> Pages:
    pages = open_pages(model, checkpoint(folder, case), "native", ROOM)
    assert pages is not None
    return pages


def run(model: CausalLM, pages: Pages, tokens: list[int], n_decoded: int = 0) -> list[int]:
    """Computes a sequence and gives its pages away; its tokens, the decoded ones included."""
    session = Session(model, pages=pages)
    session.restore(tokens)
    logits = session.prefill(tokens, chunk=STEP)
    # One more is yielded than is fed.
    for _ in decode(Row(session, logits, greedy(model), n_decoded + 1)):
        pass
    session.finish()
    return session.tokens


def greedy(model: CausalLM) -> Sampler:
    return Sampler(SamplingParams(temperature=0), model.config.vocab_size)


def uninterrupted(
    model: CausalLM, known: list[int], tokens: list[int], n_shared: int
) -> list[np.ndarray]:
    """Logits after a prompt, computed without any pages, and after four more tokens."""
    caches = make_caches(model)
    if n_shared:
        n_before = min(ceil_step(n_shared), len(known))
        mx.eval(prefill(model, known[:n_before], caches, chunk=STEP))
        assert all(cache.rewind(n_shared) for cache in caches)
    return following(model, prefill(model, tokens[n_shared:], caches, chunk=STEP), caches)


def following(model: CausalLM, logits: mx.array, caches) -> list[np.ndarray]:
    found = [np.array(logits)]
    for token in (5, 9, 2, 7):
        found.append(np.array(model.last_logits(mx.array([[token]]), caches)))
    return found


def restored(model: CausalLM, pages: Pages, tokens: list[int]) -> tuple[int, int, list[np.ndarray]]:
    """How much was restored, how much of it from disk, and the logits behind it."""
    session = Session(model, pages=pages)
    known = session.restore(tokens)
    logits = session.prefill(tokens, chunk=STEP)
    return known.n_tokens, known.ssd_tokens, following(model, logits, session.caches)


def assert_same(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"logits {step} tokens behind the prompt")


def forked(tokens: list[int], at: int, n_vocab: int) -> list[int]:
    """The same up to `at`, and 40 other tokens behind it."""
    rest = random_tokens(40, n_vocab, seed=at)
    rest[0] = (tokens[at] + 1) % n_vocab
    return tokens[:at] + rest


@every_family
def test_any_divergence_gives_back_what_is_shared(case, model, folder):
    pages = pages_of(model, case, folder)
    n_vocab = model.config.vocab_size
    tokens = run(model, pages, random_tokens(N, n_vocab))
    expected: dict[int, list[np.ndarray]] = {}
    pages.close()
    for source in ("ram", "ssd", "restart"):
        if source != "ram":
            pages = pages_of(model, case, folder)
        else:
            run(model, pages, tokens)
        # From disk a few will do: what differs from RAM is where the bytes come from.
        for at in DIVERGENCES if source == "ram" else DIVERGENCES[1::2]:
            prompt = forked(tokens, at, n_vocab)
            n, n_ssd, logits = restored(model, pages, prompt)
            assert n == (at if at % STEP >= WORTH else at // STEP * STEP), (source, at)
            if source == "ram":
                assert n_ssd == 0
            if at not in expected:
                expected[at] = uninterrupted(model, tokens, prompt, n)
            assert_same(logits, expected[at])
            if source == "ssd":
                assert n_ssd == n
                pages.clear()
        pages.clear()
    pages.close()


@pytest.mark.parametrize("case", STATES, ids=lambda case: case.name)
def test_states_restored_equal_uninterrupted_bit_for_bit(model, case, folder):
    """From RAM and from disk, behind the end of an answer, of a turn, and on no point of either."""
    end, prompt = 3, random_tokens(600)
    prompt = [token + 1 if token == end else token for token in prompt]
    prompt[9] = prompt[579] = end
    pages = pages_of(model, case, folder)
    session = Session(model, pages=pages)
    session.turn_ends = (end,)
    session.restore(prompt)
    mx.eval(session.prefill(prompt, chunk=STEP))
    session.finish()
    for again in range(2):
        for n_shared, kept in ((600, 600), (590, 580), (570, 10), (9, 0)):
            other = [*prompt[:n_shared], *random_tokens(60, seed=n_shared)]
            caches = make_caches(model)
            starts = sorted({0, *(n for n in (10, 266, 522, 580) if n < kept), kept})
            for start, stop in itertools.pairwise(starts):
                mx.eval(model.last_logits(mx.array([other[start:stop]]), caches))
            rest = prefill(model, other[kept:], caches, chunk=len(other))
            expected = following(model, rest, caches)
            session = Session(model, pages=pages)
            known = session.restore(other)
            assert (known.n_tokens, bool(known.ssd_tokens)) == (kept, bool(again and kept))
            session._cutter = None  # keeps nothing, and computes the rest in one chunk
            found = following(model, session.prefill(other, chunk=len(other)), session.caches)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        pages.close()
        pages = pages_of(model, case, folder)
