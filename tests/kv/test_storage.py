"""Packed KV: what it keeps, what it costs, and attention on it beside attention on its values."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.cache import RotatingKVCache, make_cache, make_caches
from mlxkv.errors import UsageError
from mlxkv.generation.prefill import prefill
from mlxkv.generation.session import Session
from mlxkv.kv.layout import windowed_mask
from mlxkv.kv.storage import QuantizedRows, dense, leading, storage_of
from mlxkv.kv.types import CODE_BITS, KV_TYPES, CacheSpec, KVFormat
from mlxkv.nn.attention import BLOCK, attend
from mlxkv.prefix.open import open_pages
from tests.prefix.test_families import FAMILIES, checkpoint
from tests.support.cache_drive import stored
from tests.support.tiny import tokens as random_tokens

PACKED = ("q8", "k8v4", "q4")
packed_types = pytest.mark.parametrize("kv_type", PACKED)


def rows(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def pack(k: mx.array, v: mx.array, kv_type: str) -> tuple[QuantizedRows, QuantizedRows]:
    keys, values = stored(k, v, kv_type)
    assert isinstance(keys, QuantizedRows) and isinstance(values, QuantizedRows)
    return keys, values


# The format.


@packed_types
@pytest.mark.parametrize("dim", [8, 16, 32, 64, 80, 96, 128, 256, 576])
def test_rows_come_back_within_a_step(kv_type, dim):
    both = rows(2, 3, 5, dim), rows(2, 3, 5, dim, seed=1)
    for x, packed, bits in zip(both, pack(*both, kv_type), CODE_BITS[kv_type], strict=True):
        assert packed.shape == (2, 3, 5, dim)
        assert packed.dtype == mx.float32
        span, steps = float((x.max() - x.min()).item()), 2**bits - 1
        assert np.abs(np.array(packed.dequantized() - x)).max() <= 1.02 * span / steps + 1e-5


@packed_types
@pytest.mark.parametrize("dim", [0, 16, 64, 80, 128, 576])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_a_row_takes_the_bytes_that_are_planned(kv_type, dim, dtype):
    x = mx.zeros((1, 1, 7, dim), dtype)
    n_bytes = sum(array.nbytes for array in storage_of(kv_type).encode_both(x, x))
    assert n_bytes == 7 * KVFormat(kv_type, dtype.size).row_bytes(dim, dim)


@pytest.mark.parametrize(("kv_type", "share"), [("q8", 0.53), ("k8v4", 0.406), ("q4", 0.28)])
@pytest.mark.parametrize("window", [None, 512])
def test_a_packed_cache_takes_its_share_of_a_16_bit_one(kv_type, share, window):
    spec = CacheSpec(4, 128, 128, window)
    sizes = {}
    for name in ("native", kv_type):
        cache = make_cache(spec, name)
        for L in (700, 1, 1):
            k = rows(1, 4, L, 128).astype(mx.bfloat16)
            cache.update(k, k)
            mx.eval(cache.state)
        sizes[name] = cache.nbytes
        assert cache.nbytes == spec.nbytes(702, KVFormat(name, 2))
    assert abs(sizes[kv_type] / sizes["native"] - share) < 0.005


def test_an_unknown_format_is_refused():
    for make in (lambda: make_cache(CacheSpec(1, 2, 2), "q5"), lambda: storage_of("int8")):
        with pytest.raises(UsageError, match=f"one of {', '.join(KV_TYPES)}"):
            make()


def test_slices_of_another_format_are_refused():
    native, packed = (make_cache(CacheSpec(1, 64, 64), kv_type) for kv_type in ("native", "q8"))
    for cache in (native, packed):
        cache.update(rows(1, 1, 9, 64), rows(1, 1, 9, 64))
    for cache, other in ((native, packed), (packed, native)):
        with pytest.raises(UsageError, match="not of KV format"):
            cache.load([other.read(0, 9)])
    with pytest.raises(UsageError, match="do not fit"):
        make_cache(CacheSpec(1, 64, 64), "q4").load([packed.read(0, 9)])


# Attention.


@packed_types
@pytest.mark.parametrize("L", [1, 3, 70])
@pytest.mark.parametrize("S", [70, BLOCK, BLOCK + 1, 1300])
@pytest.mark.parametrize("n_heads", [2, 6])
def test_attention_on_packed_rows_is_attention_on_their_values(kv_type, L, S, n_heads):
    q = rows(1, n_heads, L, 64, seed=1)
    k, v = pack(*(rows(1, 2, S, 64, seed=seed) for seed in (2, 3)), kv_type)
    for mask in (None, "causal", windowed_mask(L, S - L, 50)):
        got = attend(q, k, v, 0.125, mask)
        expected = attend(q, dense(k), dense(v), 0.125, mask)
        np.testing.assert_allclose(np.array(got), np.array(expected), atol=2e-5)


@packed_types
@pytest.mark.parametrize("L", [1, 80])
def test_sinks_caps_and_leading_values(kv_type, L):
    S, q = 900, rows(2, 4, L, 96, seed=1)
    k, v = pack(*(rows(2, 2, S, 96, seed=seed) for seed in (2, 3)), kv_type)
    sinks, mask = rows(4, seed=4), "causal" if L > 1 else None
    cases = [
        (attend(q, k, v, 0.1, mask, sinks=sinks), attend(q, dense(k), dense(v), 0.1, mask, sinks)),
        (
            attend(q, k, v, 0.5, mask, softcap=3.0),
            attend(q, dense(k), dense(v), 0.5, mask, softcap=3.0),
        ),
        (
            attend(q, k, leading(k, 40), 0.1, mask),
            attend(q, dense(k), dense(k)[..., :40], 0.1, mask),
        ),
    ]
    for got, expected in cases:
        assert got.shape == expected.shape
        np.testing.assert_allclose(np.array(got), np.array(expected), atol=2e-5)


@packed_types
def test_attention_keeps_no_more_than_a_few_blocks_unpacked(kv_type):
    """The whole cache unpacked would be 64 MiB; scores and blocks are a fraction of that."""
    S = 32_768
    k, v = pack(*(rows(1, 4, S, 64, seed=seed) for seed in (2, 3)), kv_type)
    mx.eval(k.codes, k.scales, k.biases, v.codes, v.scales, v.biases)
    q = rows(1, 8, 1, 64, seed=1)
    mx.eval(q)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend(q, k, v, 0.125))
    assert mx.get_peak_memory() - before < 6 * 2**20


# Batches.


SCHEDULE = (30, 1, 8, 1, 1, 1, 500, 1, 2, 65, 1, 1)
"""Chunks and single tokens before, at and behind the wrap of 40; more keys than a block."""


def exact_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    window: int | None,
    sinks: np.ndarray | None,
    softcap: float | None,
) -> np.ndarray:
    """The last queries' attention over a whole history, in float64."""
    L, S, n_heads = q.shape[2], k.shape[2], q.shape[1]
    k, v = (np.repeat(x, n_heads // x.shape[1], axis=1).astype(np.float64) for x in (k, v))
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2) * scale
    if softcap is not None:
        scores = np.tanh(scores / softcap) * softcap
    behind = np.arange(S - L, S)[:, None] - np.arange(S)  # keys between a key and the query
    scores[..., (behind < 0) | (behind >= (window or S))] = -np.inf
    if sinks is not None:
        column = np.broadcast_to(sinks.reshape(-1, 1, 1), (*scores.shape[:-1], 1))
        scores = np.concatenate([scores, column], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True))[..., :S] @ v


ROWS = [
    (kv_type, window, extra, 2 + (i + j + k) % 2)
    for i, kv_type in enumerate(KV_TYPES)
    for j, window in enumerate((None, 40))
    for k, extra in enumerate(("plain", "sinks", "softcap"))
]
"""Two and three rows in turn: each number meets each format, window and extra."""


@pytest.mark.parametrize(("kv_type", "window", "extra", "B"), ROWS)
def test_each_row_of_a_batch_is_attended_as_if_alone(kv_type, window, extra, B):
    spec = CacheSpec(2, 80, 64, window)
    whole, alone = make_cache(spec, kv_type), [make_cache(spec, kv_type) for _ in range(B)]
    sinks = rows(4, seed=99) if extra == "sinks" else None
    softcap = 3.0 if extra == "softcap" else None
    history = [np.zeros((B, 2, 0, dim)) for dim in (80, 64)]
    for step, L in enumerate(SCHEDULE):
        q, *kv = (rows(B, H, L, dim, seed=4 * step + H) for H, dim in ((4, 80), (2, 80), (2, 64)))
        kv[1] = kv[1] + 1  # another mean than the keys'
        mask = whole.mask(L)
        got = np.array(attend(q, *whole.update(*kv), 0.2, mask, sinks, softcap))

        kept = [np.array(dense(x)) for x in stored(*kv, kv_type)]
        history = [np.concatenate(pair, axis=2) for pair in zip(history, kept, strict=True)]
        logits = None if sinks is None else np.array(sinks)
        expected = exact_attention(np.array(q), *history, 0.2, window, logits, softcap)
        # float32 sums of 600 products; a key too many in the window shows at 1.
        np.testing.assert_allclose(got, expected, atol=2e-5)
        for b, cache in enumerate(alone):
            row = [x[b : b + 1] for x in (q, *kv)]
            one = attend(row[0], *cache.update(*row[1:]), 0.2, mask, sinks, softcap)
            np.testing.assert_allclose(got[b], np.array(one)[0], atol=2e-6)
    assert whole.nbytes == B * alone[0].nbytes


@packed_types
@pytest.mark.parametrize("window", [None, 40, 600])
def test_a_batch_is_read_loaded_and_taken_back(kv_type, window):
    spec = CacheSpec(2, 80, 64, window)
    cache, loaded = make_cache(spec, kv_type), make_cache(spec, kv_type)
    for L in (500, 130, 1, 90):
        cache.update(rows(3, 2, L, 80, seed=L), rows(3, 2, L, 64, seed=L + 1))
    assert cache.rewind(640)
    middle = (cache.first + 640) // 2
    loaded.load([cache.read(cache.first, middle), cache.read(middle, 640)])
    for L in (1, 20, 1):
        k, v = rows(3, 2, L, 80, seed=L), rows(3, 2, L, 64, seed=L + 1)
        q, mask = rows(3, 6, L, 80, seed=L + 2), cache.mask(L)
        outs = [attend(q, *each.update(k, v), 0.2, mask) for each in (cache, loaded)]
        # The same rows; a single token's may lie in another order in the ring.
        np.testing.assert_allclose(np.array(outs[0]), np.array(outs[1]), atol=2e-6)


# Models.


TWO_OF_THREE = [
    pytest.param(PACKED[(i + j) % 3], case, id=f"{PACKED[(i + j) % 3]}-{case.name}")
    for i, case in enumerate(FAMILIES)
    for j in range(2)
]
"""Each family in two of the formats, and in turn in others."""
families_packed = pytest.mark.parametrize(("kv_type", "case"), TWO_OF_THREE)


@families_packed
def test_every_family_runs_on_packed_kv(kv_type, case, tmp_path, monkeypatch):
    """Whole, in chunks past the wrap and one by one, and from pages: nearly the same logits.

    Nearly: a token's own chunk decides in which order sums are made. What packing itself costs is
    measured on real models (benchmarks/README.md); here it is bounded loosely.
    """
    model = mlxkv.load_model(checkpoint(tmp_path, case), dtype=mx.float32)
    tokens = random_tokens(600, model.config.vocab_size)
    native = np.array(prefill(model, tokens, make_caches(model), chunk=256))
    logits = np.array(prefill(model, tokens, make_caches(model, kv_type), chunk=256))
    spread = native.std()
    assert np.abs(logits - native).max() / spread < (1 if kv_type == "q8" else 8)

    caches = make_caches(model, kv_type)
    prefill(model, tokens[:580], caches, chunk=100)
    for token in tokens[580:]:
        single = model.last_logits(mx.array([[token]]), caches)
    assert np.abs(np.array(single) - logits).max() / spread < (0.1 if kv_type == "q8" else 3)

    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    found = []
    for again in range(3):
        pages = open_pages(model, checkpoint(tmp_path, case), kv_type, 2**30, tmp_path / "kv")
        assert pages is not None
        session = Session(model, kv_type, pages)
        known = session.restore([*tokens[:512], 3])
        assert known.n_tokens == (512 if again else 0)
        assert known.ssd_tokens == known.n_tokens
        found.append(np.array(session.prefill([*tokens[:512], 3], chunk=256)))
        np.testing.assert_array_equal(found[-1], found[0])
        session.finish()
        pages.close()


@families_packed
def test_two_sequences_at_once_on_packed_kv_equal_each_alone(kv_type, case, tmp_path):
    """Up to a code that another order of sums turns over: 0.01 deviations in 8 bits, 0.15 to 0.2 in
    4; mixed up they are 1."""
    model = mlxkv.load_model(checkpoint(tmp_path, case), dtype=mx.float32)
    both = [random_tokens(330, model.config.vocab_size, seed=seed) for seed in (0, 1)]

    def run(sequences: list[list[int]]) -> np.ndarray:
        caches, tokens = make_caches(model, kv_type), mx.array(sequences)
        parts = (tokens[:, :100], tokens[:, 100:328], tokens[:, 328:329], tokens[:, 329:])
        return np.array(mx.concatenate([model(part, caches) for part in parts], axis=1))

    logits = run(both)
    for b in range(2):
        alone = run(both[b : b + 1])[0]
        assert np.abs(logits[b] - alone).max() < (0.1 if kv_type == "q8" else 0.3) * alone.std()
        assert np.median(np.abs(logits[b] - alone)) < 0.01 * alone.std()


@packed_types
def test_a_packed_rotating_cache_goes_back(kv_type):
    cache = RotatingKVCache(40, CacheSpec(1, 64, 64, 40), kv_type)
    x = rows(1, 1, 100, 64)
    for piece in (x[:, :, :60], x[:, :, 60:]):
        cache.update(piece, piece)
    assert cache.rewind(90)
    assert not cache.rewind(50)
    held = cache.read(cache.first, 90)
    storage = storage_of(kv_type)
    kept = x[:, :, cache.first : 90]
    found = storage.decode_both(held.arrays, 90 - cache.first, 64, 64)
    for rows_held, expected in zip(found, stored(kept, kept, kv_type), strict=True):
        np.testing.assert_array_equal(dense(rows_held), dense(expected))
