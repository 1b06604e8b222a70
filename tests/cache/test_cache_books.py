"""The contract of a KV cache: what it says of itself, what it takes, what it refuses."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cache import KVCache, RotatingKVCache, make_caches
from mlxkv.errors import UsageError
from mlxkv.kv.storage import dense
from mlxkv.kv.types import STEP, CacheSpec, KVFormat, kv_type_table, read_kv_type
from tests.support.cache_drive import (
    GROWING,
    Drive,
    assert_empty,
    assert_untouched,
    every_kind,
    every_window,
    rotating,
    snapshot,
)
from tests.support.windowed_reference import hidden, mask_as_bias

# Offset, len, state, nbytes, reset


def per_token(kind) -> int:
    """Bytes of one token here: float32, one head, two values in key and value."""
    return KVFormat(kind.kv_type, 4).row_bytes(2, 2)


@every_kind
def test_an_empty_cache_holds_nothing(kind):
    assert_empty(kind.make(None))
    assert_empty(kind.make(kind.spec(2, 4, 3)))


@every_kind
def test_len_is_the_offset_or_the_window(kind):
    drive = Drive(kind)
    for L in [1, 1, 5, 250, 1, 100, 1, 300, 1]:
        drive.feed(L)
        expected = drive.offset if kind.window is None else min(drive.offset, kind.window)
        assert len(drive.cache) == expected


@every_kind
def test_state_is_what_is_held(kind):
    drive = Drive(kind, k_dim=3)
    for L in [1, 5, 300, 1, 1]:
        drive.feed(L)
        state = drive.cache.state
        assert len({x.shape[2] for x in state}) == 1
        keys = dense(drive.cache.decoded(state, state[0].shape[2])[0])
        assert keys.shape[2] >= len(drive.cache)
        held = np.sort(np.array(keys)[..., -len(drive.cache) :, 0].ravel())
        newest = np.sort(drive.reference.keys[:, :, -len(drive.cache) :, 0].ravel())
        np.testing.assert_array_equal(held, newest)


@every_kind
def test_reset_gives_the_bytes_back_and_takes_another_batch_size_and_width(kind):
    drive = Drive(kind, B=1, k_dim=2).feed_all([300, 1, 1])
    drive.reset(B=3)
    drive.k_dim = 4
    drive.feed_all([7, 1, 300, 1])
    assert drive.cache.keys.shape[0] == 3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@every_kind
def test_the_dtype_is_kept_and_priced(kind, dtype):
    spec = kind.spec(2, 4, 6)
    cache = kind.make(spec)
    for n, L in [(5, 5), (6, 1), (306, 300), (307, 1), (312, 5), (313, 1)]:
        k = mx.random.normal((1, 2, L, 4)).astype(dtype)
        v = mx.random.normal((1, 2, L, 6)).astype(dtype)
        returned = cache.update(k, v)
        assert {a.dtype for a in returned} == {dtype}
        codes = set() if kind.kv_type == "native" else {mx.uint32}
        assert {a.dtype for a in cache.state} == {dtype} | codes
        held, given = cache.read(n - 1, n), cache.encoded(k[:, :, -1:], v[:, :, -1:])
        assert mx.array_equal(held.arrays[0], given[0])
        if L == 1:
            assert cache.nbytes == spec.nbytes(n, KVFormat(kind.kv_type, dtype.size))


@every_kind
def test_another_dtype_than_the_one_held_is_refused(kind):
    cache = kind.make(None)
    half = mx.ones((1, 1, 9, 2), mx.float16)
    cache.update(half, half)
    before = snapshot(cache)
    single = mx.ones((1, 1, 9, 2), mx.float32)
    with pytest.raises(UsageError, match="float32"):
        cache.update(single, single)
    assert_untouched(cache, before)


def test_a_growing_cache_grows_at_every_256th_token_only():
    drive = Drive(GROWING, k_dim=3, v_dim=5)
    per_token = 4 * (3 + 5)
    for n in range(1, 3 * STEP):
        drive.feed(1)
        assert drive.cache.nbytes == -(-n // STEP) * STEP * per_token
    drive.feed(700)
    assert drive.cache.nbytes == -(-drive.offset // STEP) * STEP * per_token


@every_window
def test_a_rotating_cache_never_takes_more_than_its_window_and_the_last_chunk(kind):
    drive = Drive(kind)
    window = kind.window
    for L in [1, 3, 250, 1, 300, 1, 700, 20, 1, 1, 256, 256, 1, 7, 7, 7, 1]:
        drive.feed(L)
        if L == 1:
            room = min(window, -(-drive.offset // STEP) * STEP)
            assert drive.cache.nbytes == room * per_token(kind)
        else:
            step = min(window, -(-drive.offset // STEP) * STEP)
            assert drive.cache.nbytes <= max(step, window - 1 + L) * per_token(kind)


@every_window
def test_a_rewound_rotating_cache_gives_the_surplus_back_at_the_next_token(kind):
    drive = Drive(kind).feed_all([2000])
    assert drive.rewind(3)
    drive.feed(1)
    assert drive.cache.nbytes <= min(kind.window, STEP) * per_token(kind)


@pytest.mark.parametrize("kind", [GROWING, rotating(8)], ids=lambda kind: kind.name)
def test_a_single_token_is_written_in_place(kind):
    """No copy of the buffer: the peak of a step stays far below one buffer's bytes."""
    kind = GROWING if kind is GROWING else rotating(2048)
    cache = kind.make(None)
    chunk = mx.zeros((1, 4, 2000, 64))
    mx.eval(cache.update(chunk, chunk))
    token = mx.ones((1, 4, 1, 64))
    for _ in range(100):
        mx.eval(cache.update(token, token))
        buffer = cache.nbytes // 2
        mx.eval(token)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(cache.update(token, token))
        grew = cache.nbytes // 2 != buffer
        assert grew or mx.get_peak_memory() - before < buffer // 4


@every_kind
def test_nbytes_is_what_mlx_has_allocated(kind):
    """Neither a view that keeps a surplus alive, nor a buffer that is not counted."""
    cache = kind.make(None)
    gc.collect()  # what other tests left, which would be given back meanwhile
    before = mx.get_active_memory()
    shape = (1, 1, 5000, 256)  # large next to the few KiB of slack that an allocation has
    mx.eval(cache.update(mx.zeros(shape), mx.zeros(shape)))
    token = mx.zeros((1, 1, 1, 256))
    mx.eval(token)
    own = token.nbytes
    for _ in range(3):
        mx.eval(cache.update(token, token))
        mx.eval(cache.state)
        assert abs(mx.get_active_memory() - before - own - cache.nbytes) < 2**17
    cache.reset()
    assert mx.get_active_memory() - before < 2**17


# Bad input


@every_kind
@pytest.mark.parametrize(
    ("k", "v"),
    [
        ((2, 2, 3, 4), (2, 2, 3, 4)),
        ((1, 3, 3, 4), (1, 3, 3, 4)),
        ((1, 2, 3, 5), (1, 2, 3, 4)),
        ((1, 2, 3, 4), (1, 2, 3, 5)),
        ((1, 2, 3, 4), (1, 2, 2, 4)),
        ((1, 2, 1, 4), (1, 2, 2, 4)),
        ((1, 2, 3, 4), (1, 1, 3, 4)),
        ((1, 2, 3, 4), (2, 2, 3, 4)),
        ((1, 2, 0, 4), (1, 2, 0, 4)),
        ((2, 3, 4), (2, 3, 4)),
        ((1, 2, 3, 4), (2, 3, 4)),
        ((), ()),
    ],
)
def test_tokens_of_another_shape_are_refused_and_change_nothing(kind, k, v):
    for first in (1, 9, 300):
        cache = kind.make(None)
        cache.update(mx.ones((1, 2, first, 4)), mx.ones((1, 2, first, 4)))
        before = snapshot(cache)
        with pytest.raises(UsageError):
            cache.update(mx.zeros(k), mx.zeros(v))
        assert_untouched(cache, before)
        cache.update(mx.ones((1, 2, 2, 4)), mx.ones((1, 2, 2, 4)))


@every_kind
def test_a_spec_is_checked_on_the_first_update(kind):
    cache = kind.make(kind.spec(2, 4, 6))
    for k, v in [((1, 2, 3, 4), (1, 2, 3, 4)), ((1, 1, 3, 4), (1, 1, 3, 6))]:
        with pytest.raises(UsageError):
            cache.update(mx.zeros(k), mx.zeros(v))
        assert_empty(cache)
    cache.update(mx.zeros((5, 2, 3, 4)), mx.zeros((5, 2, 3, 6)))


@pytest.mark.parametrize("max_size", [0, -1])
def test_a_window_must_be_positive(max_size):
    with pytest.raises(UsageError, match=str(max_size)):
        RotatingKVCache(max_size)


# make_caches


class Specs:
    def __init__(self, *specs: CacheSpec | None):
        self.specs = specs

    def cache_specs(self) -> list[CacheSpec | None]:
        return list(self.specs)


def test_make_caches_makes_one_for_each_layer_that_owns_kv():
    model = Specs(CacheSpec(2, 4, 4), None, CacheSpec(2, 4, 4, window=7))
    growing, sliding = make_caches(model)
    assert isinstance(growing, KVCache)
    assert isinstance(sliding, RotatingKVCache)
    assert sliding.max_size == 7
    assert [c.spec for c in (growing, sliding)] == [model.specs[0], model.specs[2]]


def test_an_unknown_kv_type_is_one_line_naming_what_is_allowed():
    with pytest.raises(UsageError, match=r"native.*q5"):
        make_caches(Specs(CacheSpec(1, 2, 2)), kv_type="q5")


@pytest.mark.parametrize("window", [None, 1, 8, 256, 300, 600])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 299, 300, 301, 1000])
def test_a_spec_prices_what_a_live_cache_allocates(window, n):
    spec = CacheSpec(3, 4, 2, window)
    cache = KVCache(spec) if window is None else RotatingKVCache(window, spec)
    for _ in range(n):
        cache.update(mx.zeros((1, 3, 1, 4)), mx.zeros((1, 3, 1, 2)))
    assert spec.nbytes(n, KVFormat("native", 4)) == cache.nbytes


# mlx-lm's names


@every_kind
def test_update_and_fetch_is_update(kind):
    cache, twin = kind.make(None), kind.make(None)
    for L in (5, 1, 300, 1):
        x = mx.random.normal((1, 1, L, 2))
        for a, b in zip(cache.update_and_fetch(x, x), twin.update(x, x), strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(dense(b)))


@every_kind
@pytest.mark.parametrize("as_array", [False, True])
def test_make_mask_hides_what_mask_hides(kind, as_array):
    drive = Drive(kind)
    for L in (5, 1, 3, 300, 1, 1, 4):
        mask = drive.cache.make_mask(L, return_array=as_array)
        n_keys = kind_keys(drive, L)
        np.testing.assert_array_equal(
            np.broadcast_to(mask_as_bias(mask, L, n_keys), (L, n_keys)),
            np.broadcast_to(mask_as_bias(drive.cache.mask(L), L, n_keys), (L, n_keys)),
        )
        drive.feed(L)


def kind_keys(drive: Drive, L: int) -> int:
    """Keys that an update of L tokens returns."""
    window = drive.kind.window
    if window is None:
        return drive.offset + L
    return min(drive.offset + 1, window) if L == 1 else min(drive.offset, window - 1) + L


@pytest.mark.parametrize("L", [1, 2, 9])
@pytest.mark.parametrize("offset", [0, 3, 7, 8, 30])
def test_make_mask_on_a_growing_cache_can_slide(offset, L):
    """Gemma 3 in mlx-lm asks for a window on whatever cache its sliding layers were given."""
    cache = KVCache()
    if offset:
        cache.update(mx.zeros((1, 1, offset, 2)), mx.zeros((1, 1, offset, 2)))
    mask = cache.make_mask(L, window_size=8)
    query = np.arange(offset, offset + L)[:, None]
    key = np.arange(offset + L)[None]
    expected = hidden((key <= query) & (key > query - 8))
    got = np.broadcast_to(mask_as_bias(mask, L, offset + L), expected.shape)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("L", [255, 256, 512])
@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(512)])
def test_a_cache_keeps_nothing_alive_but_its_buffers(make, L):
    H, D, rest = 2, 64, 8
    cache = make()
    mx.synchronize()
    before = mx.get_active_memory()
    computed = mx.random.normal((1, L, (2 + rest) * H, D)).transpose(0, 2, 1, 3)
    cache.update(computed[:, :H], computed[:, H : 2 * H])
    mx.eval(cache.state)
    del computed
    mx.synchronize()
    assert mx.get_active_memory() - before <= cache.nbytes + 1024


def test_each_layer_has_its_own_format():
    specs = [CacheSpec(1, 64, 64), None, CacheSpec(1, 64, 64, 40), CacheSpec(1, 64, 64)]
    caches = make_caches(Specs(*specs), "k8v4, 3=native,2=q8,0=k8v4")
    assert [cache.kv_type for cache in caches] == ["k8v4", "q8", "native"]
    for kv_type, layer in (("q8,4=q4", 4), ("q8,1=q4", 1)):
        with pytest.raises(UsageError, match=f"names layer {layer}, and .* are 0 to 3"):
            make_caches(Specs(*specs), kv_type)


@pytest.mark.parametrize(
    "choice", ["q5", "k8v4,x=q8", "k8v4,0=q8,0=q4", "k8v4,0=auto", "q8,", {"defalt": "q8"}, 8]
)
def test_a_kv_type_that_cannot_be_read_is_one_line(choice):
    with pytest.raises(UsageError, match=r"^kv_type must be one of native, .*k8v4,0=native,5=q8; "):
        read_kv_type(choice)


def test_a_table_and_a_text_are_one_kv_type():
    table = {"default": "k8v4", "5": "q8", "0": "native", "7": "k8v4"}
    assert read_kv_type(table) == read_kv_type(" k8v4,0=native,5=q8") == "k8v4,0=native,5=q8"
    assert read_kv_type(kv_type_table("k8v4,0=native,5=q8")) == "k8v4,0=native,5=q8"
    assert kv_type_table("q8,1=q8") == "q8"
