"""Drafts by a model's own next-token layer: the same answers, and what the layer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.generation.decoder import Decoder, Row
from mlxkv.generation.drafts.drafts import Drafts
from mlxkv.generation.drafts.mtp import MOST_WAITING, Mtp
from mlxkv.generation.drafts.pace import Costs, Time
from mlxkv.generation.session import Session
from mlxkv.kv.types import KV_TYPES, STEP
from mlxkv.memory.needs import Needs
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.open import open_pages
from tests.families.test_glm import MOE, hub_weights, our_weights
from tests.generation.test_decoder import GREEDY, KINDS, Request
from tests.generation.test_speculate import Eager
from tests.support import tiny
from tests.support.half_right import half_right

CONFIG = {**MOE, "num_nextn_predict_layers": 1}
N = 40


def made(folder: Path, right: float, adds: float) -> CausalLM:
    weights = half_right(CONFIG, hub_weights(CONFIG, our_weights(CONFIG)), right, adds=adds)
    return mlxkv.load_model(tiny.write_checkpoint(folder, CONFIG, weights), dtype=mx.float32)


@pytest.fixture(scope="module")
def always(tmp_path_factory) -> CausalLM:
    """Its layer is always right."""
    return made(tmp_path_factory.mktemp("always"), 1.0, 0.0)


@pytest.fixture(scope="module")
def mostly(tmp_path_factory) -> CausalLM:
    """Its answers depend on all of its keys and values, its layer on the last token alone."""
    return made(tmp_path_factory.mktemp("mostly"), 0.8, 0.3)


def drafted(
    model: CausalLM, request: Request, session: Session | None = None, chunk: int = 100
) -> tuple[Row, Mtp]:
    """A row behind its prompt, and what drafts for it."""
    session = session or Session(model, request.kv_type)
    predictor = model.predictor()
    assert predictor is not None
    session.listener = mtp = Mtp(predictor, Time(), request.kv_type)
    session.restore(request.prompt)
    logits = session.prefill(request.prompt, chunk=chunk)
    row = Row(session, logits, request.sampler(model), request.n)
    row.drafts = Drafts([mtp])
    return row, mtp


def run(model: CausalLM, rows: Sequence[Row], costs: Costs | None = None) -> None:
    """Decode rows, the second joining when the first has begun."""
    decoder = Decoder(model, costs or Eager())
    for row in rows:
        decoder.add(row)
        list(decoder.step())
        list(decoder.step())
    while decoder.rows:
        list(decoder.step())


@pytest.mark.parametrize("params", (GREEDY, *KINDS[2:5]), ids=("greedy", "repeat", "seed", "min_p"))
def test_drafts_of_the_layer_change_no_answer(mostly: CausalLM, params):
    prompt = tuple(tiny.tokens(STEP - 10, seed=3))
    for kv_type in (*KV_TYPES, "q8,0=native"):
        request = Request(prompt, params, N, kv_type)
        row, mtp = drafted(mostly, request)
        run(mostly, [row])
        assert row.tokens == request.alone(mostly), kv_type
        assert row.drafts is not None and row.drafts.counts.accepted > 0
        held = row.session.n_held
        assert row.session.tokens == [*prompt, *row.tokens][:held]
        # What the layer holds is within what was granted.
        needs = Needs(mostly, kv_type, STEP)
        assert mtp.caches[0].offset <= held
        assert row.session.nbytes <= needs.kv_bytes(held)


@pytest.mark.parametrize("chunk", (1, 7, 100))
def test_a_layer_that_is_always_right_is_believed(always: CausalLM, chunk: int):
    request = Request(tuple(tiny.tokens(21, seed=1)), GREEDY, N)
    row, mtp = drafted(always, request, chunk=chunk)
    run(always, [row])
    assert row.tokens == request.alone(always)
    assert row.drafts is not None
    counts = row.drafts.counts
    assert counts.accepted == counts.proposed > N / 2
    assert mtp.caches[0].offset >= 20 + N - 8  # a row for each pair, but of the last draft


def test_rows_of_a_batch_hear_their_own_hidden_states(mostly: CausalLM):
    requests = [
        Request(tuple(tiny.tokens(n, seed=n)), KINDS[3 if n == 31 else 0], N) for n in (9, 31, 60)
    ]
    rows = [drafted(mostly, request)[0] for request in requests]
    rows[2].drafts = None
    run(mostly, rows)
    assert [row.tokens for row in rows] == [request.alone(mostly) for request in requests]
    for row in rows[:2]:
        assert row.drafts is not None and row.drafts.counts.accepted > 0


def test_behind_a_restored_prefix_the_layer_begins_there(always: CausalLM, tmp_path: Path):
    made(tmp_path, 1.0, 0.0)  # the files that pages are named after
    pages = open_pages(always, tmp_path, "native", 2**28)
    request = Request(tuple(tiny.tokens(STEP + 20, seed=2)), GREEDY, N)
    first = Session(always, pages=pages)
    first.prefill(request.prompt)
    first.finish()
    row, mtp = drafted(always, request, Session(always, pages=pages))
    assert row.session._n_restored >= STEP
    run(always, [row])
    assert row.tokens == request.alone(always)
    assert row.drafts is not None and row.drafts.counts.accepted > N / 2
    assert 0 < mtp.caches[0].offset < N + STEP


class Never(Costs):
    """Nothing is drafted: no pass has been measured."""

    def seconds(self, n_rows: int, n_tokens: int) -> float | None:
        return None


def test_pairs_wait_in_bounds_where_nothing_is_drafted(mostly: CausalLM):
    request = Request(tuple(tiny.tokens(9)), GREEDY, MOST_WAITING + 20)
    row, mtp = drafted(mostly, request)
    run(mostly, [row], Never())
    assert row.drafts is not None and row.drafts.counts.passes == 0
    assert row.tokens == request.alone(mostly)
    assert len(mtp._tokens) < MOST_WAITING
    assert mtp.caches[0].offset >= MOST_WAITING


def test_the_layers_cache_is_the_sequences(mostly: CausalLM):
    request = Request(tuple(tiny.tokens(50)), GREEDY, 1)
    row, mtp = drafted(mostly, request)
    session = row.session
    own = sum(cache.nbytes for cache in session.caches)
    assert session.nbytes == session.use().allocated_bytes == own + mtp.caches[0].nbytes
    session.quantize("q8")
    assert mtp.caches[0].nbytes == session.caches[0].nbytes < own / len(session.caches)
    session.reset()
    assert session.nbytes == 0


def test_the_first_draft_says_nothing_about_how_long_they_take():
    time = Time()
    for seconds in (9.0, 1.0, 1.0):
        time.record(seconds)
    assert time.seconds == 1.0
