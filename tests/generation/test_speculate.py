"""Drafts never change an answer: right ones, wrong ones, and those that are right for a while."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from mlxkv.base import device
from mlxkv.generation.decoder import Decoder, Row, RowResult, decode
from mlxkv.generation.drafts.drafter import Proposal
from mlxkv.generation.drafts.drafts import Drafts
from mlxkv.generation.drafts.pace import Costs
from mlxkv.generation.session import Session
from mlxkv.generation.speculate import Speculation
from mlxkv.kv.types import KV_TYPES, STEP
from mlxkv.nn import kernels
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.open import open_pages
from tests.generation.test_decoder import GREEDY, KINDS, Request, every_family, load
from tests.support.tiny import tokens as random_tokens

N = 24
MIXED = (
    "llama-gqa",
    "mistral-sliding",
    "gemma4-e2b",
    "gemma2-text",
    "glm4-moe-lite-plain",
    "gpt-oss-plain",
    "qwen3-5-plain",
)
"""Families whose layers differ in what they do with keys and values."""


@pytest.fixture(scope="module")
def folder(families) -> Path:
    return families


class Eager(Costs):
    """Every pass takes as long: all that is proposed is computed."""

    def seconds(self, n_rows: int, n_tokens: int) -> float | None:
        return 1.0


class Oracle:
    """Proposes what will come, and something else at some places.

    Args:
        answer: what will come.
        wrong: how often a proposed token is another.
        most: tokens of a proposal.
    """

    name = "oracle"
    hears = False

    def __init__(self, answer: Sequence[int], wrong: float, most: int = 99, seed: int = 0):
        self._answer, self._wrong, self._most = answer, wrong, most
        self._chance, self._n = random.Random(seed), 0

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        assert hidden is None
        assert token == self._answer[self._n]
        self._n += 1

    def end(self) -> None:
        pass

    def propose(self, most: int) -> Proposal | None:
        found = [
            (token + 1) % 96 if self._chance.random() < self._wrong else token
            for token in self._answer[self._n : self._n + min(most, self._most)]
        ]
        return Proposal(found, self.name, 5) if found else None


def alone(model: CausalLM, request: Request, **options) -> tuple[Session, list[RowResult]]:
    """A request without drafts: its session and results."""
    return drawn(model, request, None, **options)


def drawn(
    model: CausalLM, request: Request, oracle: Oracle | None, **options
) -> tuple[Session, list[RowResult]]:
    decoder = Decoder(model, Eager())
    row = request.row(model, max_tokens=request.n, **options)
    row.drafts = None if oracle is None else Drafts([oracle])
    decoder.add(row)
    found: list[RowResult] = []
    while decoder.rows:
        found += decoder.step()
    if row.drafts is not None:
        assert row.drafts.counts.proposed > 0
    return row.session, found


@every_family
def test_a_draft_changes_no_answer(case, folder):
    model, params = load(folder, case.name), KINDS[2 + len(case.name) % 3]
    prompt = tuple(random_tokens(20, 96, seed=1))
    for kv_type, wrong in zip(KV_TYPES, (0.3, 0.0, 1.0), strict=False):
        one = Request(prompt, params, N, kv_type)
        session, results = alone(model, one, n_logprobs=2)
        answer = [result.token or 0 for result in results]
        drafted, found = drawn(model, one, Oracle(answer, wrong), n_logprobs=2)
        assert [result.token for result in found] == answer
        for ours, theirs in zip(found, results, strict=True):
            noise = 1e-4 if kv_type == "native" else 2e-2
            assert ours.logprob == pytest.approx(theirs.logprob, abs=noise), kv_type
            assert {t for t, _ in ours.top} == {t for t, _ in theirs.top}, kv_type
        assert drafted.tokens == session.tokens[: len(drafted.tokens)]


@pytest.mark.parametrize("name", MIXED)
def test_rows_of_a_batch_have_drafts_of_their_own(name: str, folder):
    model, chance = load(folder, name), random.Random(3)
    requests = [
        Request(
            tuple(random_tokens(n, 96, seed=n)),
            chance.choice(KINDS),
            chance.randint(8, 20),
        )
        for n in (250, 3, 31, 40, 90)
    ]
    answers = [request.alone(model) for request in requests]
    decoder, rows = Decoder(model, Eager()), []
    for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        row = request.row(model, max_tokens=request.n)
        if i != 2:  # one has none
            row.drafts = Drafts([Oracle(answer, wrong=0.3, most=i, seed=i)] if i else [])
        rows.append(row)
        decoder.add(row)
        if i != 1:  # some join while others decode
            run_some(decoder, 2)
    while decoder.rows:
        run_some(decoder, 1)
    assert [row.tokens for row in rows] == answers
    assert rows[4].drafts is not None and rows[4].drafts.counts.accepted > 0


def run_some(decoder: Decoder, n: int) -> None:
    for _ in range(n):
        list(decoder.step())


@pytest.mark.parametrize("name", ("llama-gqa", "gemma3-text", "qwen3-5-equal-heads"))
def test_an_answer_that_ends_inside_a_draft_keeps_its_own_tokens(name: str, folder):
    model = load(folder, name)
    request = Request(tuple(random_tokens(STEP - 10, 96, seed=2)), GREEDY, N)
    answer = request.alone(model)
    for n_end in range(4, 20):
        decoder, row = Decoder(model, Eager()), request.row(model)
        row.drafts = Drafts([Oracle(answer, 0.0)])
        decoder.add(row)
        while decoder.rows:
            for _ in decoder.step():
                if len(row.tokens) == n_end:  # as a stop text would
                    decoder.remove(row)
        session = row.session
        assert row.tokens == answer[:n_end]
        assert session.tokens == [*request.prompt, *answer[:n_end]][: session.n_held]
        assert len(session.tokens) >= STEP - 10 + n_end - 1
        assert {cache.offset for cache in session.caches} == {len(session.tokens)}


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_with_the_kernels_logits_and_kv_are_the_undrafted_ones_bit_for_bit(kv_type: str, folder):
    if not (device.on_cpu() and kernels.kernels()):
        pytest.skip("there are no kernels")
    model = load(folder, "llama-gqa")
    request = Request(tuple(random_tokens(20, 96, seed=4)), KINDS[3], N, kv_type)
    session, results = alone(model, request, n_logprobs=1)
    answer = [result.token or 0 for result in results]
    drafted, found = drawn(model, request, Oracle(answer, 0.3), n_logprobs=1)
    assert [result.logprob for result in found] == [result.logprob for result in results]
    n = min(session.n_held, drafted.n_held)
    for ours, theirs in zip(drafted.caches, session.caches, strict=True):
        for a, b in zip(ours.read(0, n).arrays, theirs.read(0, n).arrays, strict=True):
            assert mx.array_equal(a, b)


@pytest.mark.parametrize("name", ("llama-gqa", "gemma3-text", "qwen3-5-equal-heads"))
def test_pages_hold_what_was_chosen_and_nothing_else(name: str, folder):
    model = load(folder, name)
    request = Request(tuple(random_tokens(STEP - 9, 96, seed=6)), GREEDY, N)
    answer = request.alone(model)
    pages = open_pages(model, folder / name, "native", 2**28)
    session = Session(model, pages=pages)
    row = Row(session, session.prefill(request.prompt), request.sampler(model), N)
    row.drafts = Drafts([Oracle(answer, 0.3)])
    decoder = Decoder(model, Eager())
    decoder.add(row)
    while decoder.rows:
        run_some(decoder, 1)
    session.finish()
    whole = [*request.prompt, *answer]
    again, fresh = Session(model, pages=pages), Session(model)
    assert again.restore([*whole, 5]).n_tokens >= len(whole) - 1
    ours, theirs = (each.prefill([*whole, 5]) for each in (again, fresh))
    assert float(mx.abs(ours - theirs).max()) < 1e-3 * float(mx.std(theirs))


def test_a_window_that_becomes_full_asks_before_it_is_moved(folder, monkeypatch):
    """It does within a step of 256 tokens, for which room was asked while it was not full."""
    model = load(folder, "mistral-sliding")
    request = Request(tuple(random_tokens(6, 96, seed=4)), GREEDY, 40)
    answer = request.alone(model)
    asked: list[int] = []
    monkeypatch.setattr(Session, "has_room", lambda _, n_bytes, __=0: asked.append(n_bytes) or True)
    session, _ = drawn(model, request, Oracle(answer, 0.0))
    assert max(asked) >= session.nbytes > 0


@pytest.mark.parametrize("n_fail", (1, 3))
def test_a_row_goes_on_after_an_allocation_failed_in_a_draft(n_fail: int, folder, monkeypatch):
    model = load(folder, "llama-gqa")
    request = Request(tuple(random_tokens(20, 96, seed=7)), KINDS[3], N)
    answer = request.alone(model)
    row, run, n = request.row(model, max_tokens=N), Speculation._logits, []
    row.drafts = Drafts([Oracle(answer, 0.3)])

    def failing(self: Speculation, rows) -> mx.array:
        n.append(1)
        logits = run(self, rows)  # the caches have the draft already
        if len(n) == n_fail:
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        return logits

    monkeypatch.setattr(Speculation, "_logits", failing)
    decoder = Decoder(model, Eager())
    decoder.add(row)
    with pytest.raises(RuntimeError, match="malloc"):
        while decoder.rows:
            run_some(decoder, 1)
    session, tokens = row.session, [*request.prompt, *row.tokens]
    assert row.tokens == answer[: len(row.tokens)]
    assert session.tokens == tokens[: session.n_held]
    row.sampler.rewind(len(row.tokens))
    session.restore(tokens)
    rest = Row(session, session.prefill(tokens), row.sampler, N - len(row.tokens))
    assert [*row.tokens, *decode(rest)] == answer
