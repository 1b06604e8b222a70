"""Continuous batching gives every request the tokens that it gets alone, whoever comes and goes."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.errors import CheckpointError, UsageError
from mlxkv.generation.decoder import Decoder, Row, RowResult, decode
from mlxkv.generation.session import Session
from mlxkv.kv.types import KV_TYPES, STEP
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.open import open_pages
from mlxkv.sampling.params import SamplingParams
from mlxkv.sampling.sampler import Sampler
from tests.families.oracle.case import LONG
from tests.families.oracle.cases import CASES, Case
from tests.families.test_parity import Golden
from tests.sampling.test_math import broken_rows
from tests.support.tiny import llama_config, write_checkpoint
from tests.support.tiny import tokens as random_tokens

FAMILIES = [case for case in CASES if case.n_prompt == LONG and not case.prefill_in_one]
every_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
GREEDY = SamplingParams(temperature=0)
KINDS = (
    GREEDY,
    GREEDY,
    SamplingParams(temperature=0, repeat_penalty=1.3, repeat_last_n=20),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=7),
    SamplingParams(temperature=1.0, min_p=0.05, seed=11, repeat_penalty=1.1),
    SamplingParams(temperature=0, logit_bias={3: -5.0}),
    SamplingParams(temperature=0, repeat_penalty=1.5, repeat_last_n=1),
    SamplingParams(temperature=0, presence_penalty=1.5, frequency_penalty=0.5),
    SamplingParams(temperature=0.8, seed=5, frequency_penalty=-1.5, repeat_penalty=1.1),
)


@pytest.fixture(scope="module")
def folder(families) -> Path:
    return families


@functools.cache
def load(folder: Path, name: str) -> CausalLM:
    return mlxkv.load_model(Golden.read(name).write(folder / name, "new"), mx.float32)


@pytest.fixture
def model(folder) -> CausalLM:
    return load(folder, "gemma3-text")


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for: a prompt, how to choose, and after how many tokens to stop."""

    prompt: tuple[int, ...]
    params: SamplingParams = GREEDY
    n: int = 6
    kv_type: str = "native"

    def sampler(self, model: CausalLM) -> Sampler:
        return Sampler(self.params, model.config.vocab_size)

    def alone(self, model: CausalLM) -> list[int]:
        session = Session(model, self.kv_type)
        logits = session.prefill(self.prompt)
        return list(decode(Row(session, logits, self.sampler(model), self.n)))

    def row(self, model: CausalLM, **options) -> Row:
        session = Session(model, self.kv_type)
        return Row(session, session.prefill(self.prompt), self.sampler(model), **options)


def request(n_prompt: int, n: int = 6, params: SamplingParams = GREEDY, seed: int = 0) -> Request:
    return Request(tuple(random_tokens(n_prompt, 96, seed=seed)), params, n)


def run(decoder: Decoder, n_steps: int | None = None) -> list[RowResult]:
    """Steps until nobody is left, or as many."""
    found: list[RowResult] = []
    while decoder.rows and n_steps != 0:
        found += decoder.step()
        n_steps = None if n_steps is None else n_steps - 1
    return found


def give(decoder: Decoder, rows: Sequence[Row]) -> None:
    for row in rows:
        decoder.add(row)


@every_family
@pytest.mark.parametrize("seed", [0, 1])
def test_whoever_joins_and_leaves_each_request_gets_its_tokens(case: Case, seed: int, folder):
    model, chance = load(folder, case.name), random.Random(seed)
    waiting = [
        Request(
            tuple(random_tokens(chance.choice((1, 3, 20, 31, 40, 90)), 96, seed=i)),
            chance.choice(KINDS),
            chance.randint(1, 12),
            chance.choice(KV_TYPES),
        )
        for i in range(7)
    ]
    expected = {request: request.alone(model) for request in waiting}
    decoder, asked = Decoder(model), dict[Row, Request]()
    while waiting or decoder.rows:
        while waiting and (not decoder.rows or chance.random() < 0.5):
            request = waiting.pop()
            # Some stop by a limit that the decoder knows, others as a stop word would have them.
            limit = request.n if chance.random() < 0.5 else None
            row = request.row(model, max_tokens=limit)
            asked[row] = request
            decoder.add(row)
        for drawn in decoder.step():
            assert drawn.error is None
            if len(drawn.row.tokens) == asked[drawn.row].n:
                decoder.remove(drawn.row)
    for row, request in asked.items():
        assert row.tokens == expected[request], request
        held, whole = row.session.tokens, [*request.prompt, *row.tokens]
        assert held in (whole, whole[:-1])
        assert {cache.offset for cache in row.session.caches} == {len(held)}


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_a_lone_row_gets_its_tokens(model, params):
    asked = request(40, 20, params)
    row, decoder = asked.row(model, max_tokens=20), Decoder(model)
    decoder.add(row)
    assert [drawn.token for drawn in run(decoder)] == asked.alone(model)


def test_a_session_goes_on_behind_what_the_decoder_left(model):
    decoder, rows = Decoder(model), [request(n).row(model) for n in (20, 50)]
    give(decoder, rows)
    run(decoder, 5)
    for row in rows:
        decoder.remove(row)
        more = [*row.session.tokens, 5, 9]
        assert row.session.restore(more).n_tokens == len(more) - 2
        logits = row.session.prefill(more)
        fresh = Session(model).prefill(more)
        assert float(mx.abs(logits - fresh).max()) < 1e-4 * float(mx.std(fresh))


def test_the_caches_hold_what_was_given_out_while_the_next_token_is_computed(model):
    decoder, row = Decoder(model), request(20).row(model)
    decoder.add(row)
    decoder.step()
    assert (len(row.tokens), row.session.caches[0].offset) == (1, 20)
    for n in range(2, 6):
        decoder.step()
        assert (len(row.tokens), row.session.caches[0].offset) == (n, 20 + n)


def test_the_last_token_is_not_fed(model):
    decoder, row = Decoder(model), request(20).row(model, max_tokens=3)
    decoder.add(row)
    run(decoder)
    assert (len(row.tokens), row.session.caches[0].offset) == (3, 22)


def test_the_first_token_does_not_wait_for_a_step(model):
    decoder, first, second = Decoder(model), request(20).row(model), request(9).row(model)
    decoder.add(first)
    run(decoder, 3)
    decoder.add(second)
    assert [drawn.row for drawn in decoder.step()] == [second]
    assert [drawn.row for drawn in decoder.step()] == [first]  # already in flight
    assert {drawn.row for drawn in decoder.step()} == {first, second}


def test_rows_of_another_model_or_twice_are_refused(model, folder):
    decoder, row = Decoder(model), request(9).row(model)
    decoder.add(row)
    other = load(folder, "llama-gqa")
    for wrong, message in (
        (row, "already"),
        (request(9).row(other), "own model"),
        (request(9).row(model, max_tokens=0), "at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            decoder.add(wrong)


def test_without_rows_there_is_nothing_to_do(model):
    decoder, row = Decoder(model), request(9).row(model)
    assert decoder.step() == []
    decoder.add(row)
    decoder.remove(row)
    decoder.remove(row)
    assert decoder.step() == []


# What goes wrong in a row


def break_caches(session: Session) -> None:
    for cache in session.caches:
        part = cache.read(cache.first, cache.offset)
        cache.load([type(part)(tuple(x * mx.nan for x in part.arrays), part.start, part.stop)])


def test_a_row_whose_logits_are_no_numbers_fails_alone(model):
    asked = [request(n, 8, seed=n) for n in (20, 9, 40)]
    decoder, rows = Decoder(model), [one.row(model, max_tokens=8) for one in asked]
    give(decoder, rows)
    run(decoder, 3)
    break_caches(rows[1].session)
    failed = [drawn for drawn in run(decoder) if drawn.error is not None]
    assert [drawn.row for drawn in failed] == [rows[1]]
    assert isinstance(failed[0].error, CheckpointError)
    assert [rows[0].tokens, rows[2].tokens] == [asked[0].alone(model), asked[2].alone(model)]


PATHS = (
    GREEDY,
    SamplingParams(temperature=0, repeat_penalty=1.3),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=0.8, top_k=5, seed=1),
    SamplingParams(temperature=0.8, top_p=0.9, min_p=0.1, seed=1),
    SamplingParams(temperature=1, logit_bias={3: 2.0, 5: -1.0}, seed=1),
)
ALLOWED = np.arange(96) > 40


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("n_logprobs", [None, 2])
@pytest.mark.parametrize("mask", [None, ALLOWED], ids=["free", "masked"])
@pytest.mark.parametrize("params", PATHS, ids=str)
def test_broken_logits_of_every_kind_end_their_row_on_every_path(
    model, monkeypatch, params, mask, n_logprobs
):
    logits = mx.array(broken_rows(96))
    n, options = len(logits), {"n_logprobs": n_logprobs}
    if mask is not None:
        options["allowed"] = lambda _: mask  # hides some of what is broken
    asked = request(9, params=params)
    decoder, rows = Decoder(model), [asked.row(model, **options) for _ in range(n)]
    for row, first in zip(rows[:n], logits, strict=True):
        row.logits = first[None]
    give(decoder, rows)
    alone = {drawn.row: drawn.error for drawn in decoder.step()}
    for first in logits[2:] if mask is None else ():
        with pytest.raises(CheckpointError, match="not numbers"):
            list(decode(Row(Session(model), first[None], asked.sampler(model), 1)))
    assert [isinstance(alone[row], CheckpointError) for row in rows] == [False] * 2 + [True] * 8

    decoder, rows = Decoder(model), [asked.row(model, **options) for _ in range(n)]
    give(decoder, rows)
    decoder.step()
    monkeypatch.setattr(type(model), "last_logits", lambda *_: logits)
    together = {drawn.row: drawn.error for drawn in decoder.step()}
    assert [isinstance(together[row], CheckpointError) for row in rows] == [False] * 2 + [True] * 8
    assert decoder.rows == rows[:2]


def test_an_exception_out_of_a_step_empties_the_decoder_and_keeps_the_sessions(model, monkeypatch):
    asked = request(20, 8)
    decoder, row = Decoder(model), asked.row(model)
    give(decoder, [row, request(9).row(model)])
    run(decoder, 3)

    def interrupted(*_):
        raise KeyboardInterrupt

    last = model.model.layers[-1]
    monkeypatch.setattr(type(last), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.step()
    monkeypatch.undo()
    assert decoder.rows == []
    assert row.tokens == asked.alone(model)[: len(row.tokens)]
    held = row.session.tokens
    assert held == [*asked.prompt, *row.tokens][: len(held)]


# Masks


def test_a_masked_row_chooses_among_what_is_allowed_and_leaves_the_others_alone(model):
    asked, seen = [request(n, 8, seed=n) for n in (20, 9, 40)], list[list[int]]()
    n_vocab = model.config.vocab_size

    def allowed(tokens: Sequence[int]) -> np.ndarray | None:
        seen.append(list(tokens))
        if len(tokens) == 4:
            return None
        return np.arange(n_vocab) % 5 == len(tokens) % 5

    decoder = Decoder(model)
    rows = [asked[0].row(model, max_tokens=8), asked[1].row(model, max_tokens=8, allowed=allowed)]
    give(decoder, [*rows, asked[2].row(model, max_tokens=8)])
    run(decoder)
    got = rows[1].tokens
    assert [token % 5 for i, token in enumerate(got) if i != 4] == [0, 1, 2, 3, 0, 1, 2]
    assert seen == [got[:i] for i in range(8)]
    assert rows[0].tokens == asked[0].alone(model)


def test_a_mask_that_allows_everything_changes_nothing(model):
    for params in KINDS:
        asked = request(20, 8, params)
        decoder, row = Decoder(model), asked.row(model, max_tokens=8, allowed=lambda _: None)
        give(decoder, [row, request(9).row(model, max_tokens=3)])
        run(decoder)
        assert row.tokens == asked.alone(model)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_mask_that_fails_or_allows_nothing_ends_its_row(model, at):
    def raises(tokens: Sequence[int]) -> np.ndarray | None:
        if len(tokens) == at:
            raise RuntimeError("no such rule")
        return None

    def nothing(tokens: Sequence[int]) -> np.ndarray | None:
        return np.full(model.config.vocab_size, len(tokens) != at)

    asked = request(40, 8)
    rows = [request(9).row(model, allowed=allowed) for allowed in (raises, nothing)]
    beside, decoder = asked.row(model, max_tokens=8), Decoder(model)
    give(decoder, [*rows, beside])
    errors = {drawn.row: drawn.error for drawn in run(decoder) if drawn.error is not None}
    assert str(errors[rows[0]]) == "no such rule"
    assert isinstance(errors[rows[1]], UsageError)
    assert [len(row.tokens) for row in rows] == [at, at]
    assert beside.tokens == asked.alone(model)


# Log-probabilities


@pytest.mark.parametrize("allowed", [None, lambda _: None], ids=["free", "masked"])
def test_log_probabilities_are_the_models_own(model, allowed):
    asked = request(20, 4, SamplingParams(temperature=0.9, seed=3, repeat_penalty=1.5))
    row = asked.row(model, max_tokens=4, allowed=allowed, n_logprobs=3)
    decoder = Decoder(model)
    give(decoder, [row, request(9).row(model, max_tokens=6)])
    found = [drawn for drawn in run(decoder) if drawn.row is row]
    tokens = list(asked.prompt)
    for drawn in found:
        logits = np.array(model(mx.array([tokens]))[0, -1], dtype=np.float64)
        expected = logits - logits.max()
        expected -= np.log(np.exp(expected).sum())
        assert drawn.logprob == pytest.approx(expected[drawn.token], abs=1e-3)
        assert [token for token, _ in drawn.top] == np.argsort(-expected)[:3].tolist()
        np.testing.assert_allclose([p for _, p in drawn.top], np.sort(expected)[:-4:-1], atol=1e-3)
        tokens.append(drawn.token)


def test_no_likeliest_tokens_are_told_unless_asked_for(model):
    decoder = Decoder(model)
    give(decoder, [request(9).row(model, max_tokens=2, n_logprobs=n) for n in (None, 0, 200)])
    for drawn in run(decoder):
        n = drawn.row.n_logprobs
        assert (drawn.logprob is None) == (n is None)
        assert len(drawn.top) == (model.config.vocab_size if n else 0)


# Around it


def test_a_model_that_does_not_batch_runs_row_by_row(model, monkeypatch):
    asked = [request(n, 6, seed=n) for n in (20, 9, 40)]
    expected = [one.alone(model) for one in asked]
    monkeypatch.setattr(type(model), "batches", False)
    decoder, rows = Decoder(model), [one.row(model, max_tokens=6) for one in asked]
    give(decoder, rows)
    run(decoder)
    assert [row.tokens for row in rows] == expected


def test_pages_are_cut_while_rows_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    checkpoint = write_checkpoint(tmp_path / "model", llama_config())
    model = mlxkv.load_model(checkpoint, dtype=mx.float32)
    pages = open_pages(model, checkpoint, "native", 2**26)
    decoder, rows = Decoder(model), []
    for seed in range(2):
        session, prompt = Session(model, pages=pages), random_tokens(250, seed=seed)
        session.restore(prompt)
        sampler = Sampler(GREEDY, model.config.vocab_size)
        rows.append(Row(session, session.prefill(prompt), sampler, max_tokens=20))
    give(decoder, rows)
    run(decoder)
    for row in rows:
        whole = row.session.tokens
        assert pages.match([*whole, 1], len(whole)).n_tokens >= STEP
        assert row.session.finish()[-1].stop == len(whole)
    pages.close()
