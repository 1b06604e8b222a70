"""Attention on packed KV in 16 bits, and as a GPU is asked for it, evaluated on the CPU backend."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.base import device
from mlxkv.cache import KVCache, make_cache
from mlxkv.kv.layout import windowed_mask
from mlxkv.kv.storage import QuantizedRows, dense, leading
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.attention import attend
from tests.kv.test_storage import pack, packed_types, rows


def exact_of(
    q: mx.array,
    k: QuantizedRows,
    v: QuantizedRows,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """Attention on the values of packed rows, in float32."""
    q, keys, values = (x.astype(mx.float32) for x in (q, dense(k), dense(v)))
    if isinstance(mask, mx.array):
        mask = mx.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
    groups = q.shape[1] // k.shape[1]
    scores = q @ mx.repeat(keys, groups, axis=1).swapaxes(-1, -2) * scale
    if softcap is not None:
        scores = mx.tanh(scores / softcap) * softcap
    if isinstance(mask, str):
        mask = windowed_mask(q.shape[2], k.shape[2] - q.shape[2], k.shape[2])
    if mask is not None:
        scores = mx.where(mask, scores, -np.inf)
    if sinks is not None:
        column = mx.broadcast_to(sinks.reshape(-1, 1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, column], axis=-1)
    weights = mx.softmax(scores, axis=-1)[..., : k.shape[2]]
    return np.array(weights @ mx.repeat(values, groups, axis=1))


@packed_types
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("L", [1, 9])
def test_scores_are_float32_on_the_cpu_whatever_is_computed_in(kv_type, dtype, L, monkeypatch):
    """Scores past float16's range, as models without a scale have them, and no rounding of them."""
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    q, k, v = (10 * rows(1, 4, n, 64, seed=n).astype(dtype) for n in (L, 300, 301))
    k, v = pack(40 * k, v[:, :, :300], kv_type)
    mask = None if L == 1 else "causal"
    got = attend(q, k, v, 1.0, mask)
    assert got.dtype == dtype
    # What is left is the rounding of the result, and of one product on codes in the dtype itself.
    np.testing.assert_allclose(
        np.array(got.astype(mx.float32)), exact_of(q, k, v, 1.0, mask), rtol=0.02, atol=0.3
    )


@packed_types
@pytest.mark.parametrize("extra", ["plain", "sinks", "softcap", "mask"])
def test_float16_scores_without_a_scale_may_leave_its_range_on_a_gpu(kv_type, extra, monkeypatch):
    """Scores of up to 200,000, each 500 or more from the highest: one key has all the weight."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    q = mx.full((1, 4, 1, 64), 50, mx.float16)
    heights = (mx.arange(300) * 7 % 300 - 100) / 300 * 100  # from -33 to 66, no two the same
    keys = mx.broadcast_to(heights[:, None], (1, 2, 300, 64)).astype(mx.float16)
    k, v = pack(keys, rows(1, 2, 300, 64, seed=3).astype(mx.float16), kv_type)
    sinks = mx.zeros(4) if extra == "sinks" else None
    mask = (heights < 20)[None, None, None] if extra == "mask" else None
    softcap = 5.0 if extra == "softcap" else None
    got = attend(q, k, v, 1.0, mask, sinks, softcap)
    np.testing.assert_allclose(
        np.array(got.astype(mx.float32)),
        exact_of(q, k, v, 1.0, mask, sinks, softcap),
        rtol=0.002,
        atol=0.002,
    )


@packed_types
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("scale", [0.125, 1.0])
def test_a_gpu_loses_no_more_than_the_dtype_does(kv_type, dtype, scale, monkeypatch):
    """Scores are rounded to the dtype, 2^-8 and 2^-11 of them; the softmax sums in float32."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    q = (rows(2, 4, 1, 64, seed=1) / (8 * scale)).astype(dtype)
    k, v = pack(*(rows(2, 2, 700, 64, seed=seed).astype(dtype) for seed in (2, 3)), kv_type)
    sinks = 4 + rows(4, seed=4).astype(dtype)  # beside 700 scores of deviation 1
    got = attend(q, k, v, scale, sinks=sinks)
    assert got.dtype == dtype
    off = np.abs(np.array(got.astype(mx.float32)) - exact_of(q, k, v, scale, None, sinks))
    assert off.max() < (0.02 if dtype == mx.bfloat16 else 0.004)


@packed_types
@pytest.mark.parametrize("L", [2, 70])
@pytest.mark.parametrize("dims", [(96, 96), (80, 64), (576, 0)])
def test_a_chunk_on_a_gpu_is_attended_as_on_the_cpu(kv_type, L, dims, monkeypatch):
    k_dim, v_dim = dims
    q, sinks = rows(2, 4, L, k_dim, seed=1), rows(4, seed=5)
    outs = []
    for on_cpu in (True, False):
        monkeypatch.setattr(device, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        cache = make_cache(CacheSpec(2, k_dim, v_dim), kv_type)
        cache.update(rows(2, 2, 300, k_dim, seed=2), rows(2, 2, 300, v_dim, seed=3))
        mask = cache.mask(L)
        k, v = cache.update(rows(2, 2, L, k_dim, seed=6), rows(2, 2, L, v_dim, seed=7))
        v = v if v_dim else leading(k, 512)
        outs.append(np.array(attend(q, k, v, 0.1, mask, sinks)))
    np.testing.assert_allclose(outs[1], outs[0], atol=2e-5)


@packed_types
@pytest.mark.parametrize(("dims", "n"), [((64, 64), 1), ((80, 64), 2), ((576, 0), 1)])
def test_a_chunk_on_a_gpu_unpacks_each_stored_array_once_and_whole(kv_type, dims, n, monkeypatch):
    """Of a part Metal's kernel would make a copy first."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    unpacked, dequantize = [], mx.dequantize

    def count(codes, *rest, **options):
        unpacked.append(codes.shape)
        return dequantize(codes, *rest, **options)

    cache = KVCache(CacheSpec(2, *dims), kv_type)
    k, v = cache.update(*(rows(1, 2, 300, dim) for dim in dims))
    monkeypatch.setattr(mx, "dequantize", count)
    attend(rows(1, 4, 5, dims[0]), k, v if dims[1] else leading(k, 512), 0.1, "causal")
    n = 2 if kv_type == "k8v4" and dims[1] else n  # keys and values of two widths lie apart
    assert unpacked == [buffer.shape for buffer in cache.buffers[::3]][:n]


@packed_types
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_decode_step_on_a_gpu_casts_nothing(kv_type, dtype, monkeypatch):
    """Nothing of the KV's length is float32: neither scores nor weights, scales or biases."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    cache = KVCache(CacheSpec(2, 64, 64), kv_type)
    cache.update(*(rows(1, 2, 300, 64).astype(dtype) for _ in range(2)))
    mx.eval(cache.buffers)
    seen = set()

    def take(entry):
        if entry["type"] == "primitive":
            seen.update((entry["name"], x[2]) for x in (*entry["inputs"], *entry["outputs"]))

    def step(q, k, v):
        return [attend(q, *cache.update(k, v), 0.125)]

    mx.export_function(take, step, *(rows(1, H, 1, 64).astype(dtype) for H in (4, 2, 2)))
    names, dtypes = zip(*seen, strict=True)
    assert {"Quantize", "QuantizedMatmul", "Softmax"} < set(names)
    assert "AsType" not in names
    assert set(dtypes) <= {dtype, mx.uint32, mx.bool_}


@packed_types
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("extra", ["plain", "sinks", "softcap"])
def test_one_query_a_row_sees_what_its_mask_shows(kv_type, on_cpu, extra, monkeypatch):
    """Rows of a shared buffer, each with a length of its own: as each alone over its own tokens."""
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    lengths = (300, 1, 170)
    mask = mx.arange(300)[None, None, None] < mx.array(lengths)[:, None, None, None]
    q, sinks = rows(3, 4, 1, 96, seed=1), rows(4, seed=5) if extra == "sinks" else None
    softcap = 3.0 if extra == "softcap" else None
    k, v = (rows(3, 2, 300, 96, seed=seed) for seed in (2, 3))
    got = np.array(
        attend(
            q, *make_cache(CacheSpec(2, 96, 96), kv_type).update(k, v), 0.2, mask, sinks, softcap
        )
    )
    for b, n in enumerate(lengths):
        own = make_cache(CacheSpec(2, 96, 96), kv_type).update(
            k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        )
        alone = attend(q[b : b + 1], *own, 0.2, None, sinks, softcap)
        np.testing.assert_allclose(got[b], np.array(alone)[0], atol=2e-6)
    everyone = attend(q, *pack(k, v, kv_type), 0.2, mask[:1, 0, 0], sinks, softcap)
    np.testing.assert_allclose(np.array(everyone)[0], got[0], atol=2e-6)
