"""A cache and a reference driven together: what every test of a cache is made of.

Attention over what a cache returns is computed in float64 from exact float32 keys and values, so
the only difference to the reference is the order of summation: the tolerance is 1e-9, where a
single key that is missing, extra or misplaced shows at 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cache import KVCache, RotatingKVCache
from mlxkv.errors import UsageError
from mlxkv.kv.layout import Mask
from mlxkv.kv.storage import Rows, dense, dense_both, storage_of
from mlxkv.kv.types import CacheSpec
from tests.support.windowed_reference import FullHistory, mask_as_bias, softmax_attention

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Kind:
    """One kind of cache. To put a new kind under the contract, add it to KINDS."""

    name: str
    make: Callable[[CacheSpec | None], KVCache | RotatingKVCache]
    window: int | None = None
    kv_type: str = "native"

    def spec(self, n_kv_heads: int, k_dim: int, v_dim: int) -> CacheSpec:
        """The spec for which `make_cache` makes this kind."""
        return CacheSpec(n_kv_heads, k_dim, v_dim, self.window)

    def kept(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the format keeps of keys and values: each row is quantized by itself."""
        if self.kv_type == "native":
            return k, v
        keys, values = stored(mx.array(k), mx.array(v), self.kv_type)
        return np.array(dense(keys)), np.array(dense(values))


def stored(k: mx.array, v: mx.array, kv_type: str) -> tuple[Rows, Rows]:
    """Keys and values `[B, H, L, D]` as attention reads them from a cache of a KV format."""
    storage, n = storage_of(kv_type), k.shape[2]
    return storage.decode_both(storage.encode_both(k, v), n, k.shape[3], v.shape[3])


def rotating(window: int, kv_type: str = "native") -> Kind:
    name = f"rotating-{window}" + (f"-{kv_type}" if kv_type != "native" else "")
    return Kind(name, lambda spec: RotatingKVCache(window, spec, kv_type), window, kv_type)


GROWING = Kind("growing", KVCache)
PACKED = Kind("growing-k8v4", lambda spec: KVCache(spec, "k8v4"), None, "k8v4")
PACKED_ROTATING = [rotating(8, "q4"), rotating(256, "q8"), rotating(300, "k8v4")]
ROTATING = [rotating(w) for w in (1, 2, 3, 8, 255, 256, 257, 300, 600)] + PACKED_ROTATING
KINDS = [GROWING, PACKED, *ROTATING]

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_window = pytest.mark.parametrize("kind", ROTATING, ids=lambda kind: kind.name)


class Drive:
    """A cache and the reference fed the same tokens; each feed compares every position."""

    def __init__(self, kind: Kind, *, B=1, H=1, k_dim=2, v_dim=2, seed=0, spec=None):
        self.kind = kind
        self.cache = kind.make(spec)
        self.reference = FullHistory(kind.window)
        self.rng = np.random.default_rng(seed)
        self.B, self.H, self.k_dim, self.v_dim = B, H, k_dim, v_dim
        self.held_from = 0  # the oldest position that the contract promises to hold

    @property
    def offset(self) -> int:
        return self.reference.offset

    def rows(self, L: int, dim: int) -> np.ndarray:
        return self.rng.standard_normal((self.B, self.H, L, dim)).astype(np.float32)

    def feed(self, L: int, compare: bool = True) -> None:
        """Give both L tokens; without `compare`, attention to them is left to another test."""
        k, v, q = self.rows(L, self.k_dim), self.rows(L, self.v_dim), self.rows(L, self.k_dim)
        if self.kind.window is not None:
            held_after = self.offset + L - (self.kind.window - 1) - L
            self.held_from = max(self.held_from, held_after)
        mask = self.cache.mask(L)
        self.reference.append(*self.kind.kept(k, v))
        returned = self.cache.update(mx.array(k), mx.array(v))
        if compare:
            self.compare(q, returned, mask)
        self.check_books()

    def compare(self, q: np.ndarray, returned: tuple[Rows, Rows], mask: Mask) -> None:
        """Hold attention over what an update returned beside the reference's."""
        L = q.shape[2]
        got_k, got_v = map(dense, returned)
        bias = mask_as_bias(mask, L, got_k.shape[2])
        got = softmax_attention(q, np.array(got_k), np.array(got_v), bias)
        expected = self.reference.attend(q)
        assert got.shape == expected.shape
        worst = np.abs(got - expected).max(axis=(0, 1, 3))
        wrong = np.flatnonzero(~(worst < TOLERANCE))
        assert wrong.size == 0, (
            f"{self.kind.name}: after {self.offset - L} tokens, {L} more: {wrong.size} queries "
            f"wrong, the first at position {self.offset - L + wrong[0]} by {worst[wrong[0]]:.2g}"
        )

    def check_books(self) -> None:
        window = self.kind.window
        assert self.cache.offset == self.offset
        assert self.cache.nbytes == sum(buffer.nbytes for buffer in self.cache.buffers)
        bound = self.offset if window is None else min(self.offset, window)
        assert len(self.cache) <= bound
        if window is None:
            assert len(self.cache) == self.offset

    def feed_all(self, chunks) -> Drive:
        for L in chunks:
            self.feed(L)
        return self

    def readable(self, start: int, stop: int) -> bool:
        try:
            self.cache.read(start, stop)
        except UsageError:
            return False
        return True

    def check_read(self, start: int, stop: int) -> None:
        piece = self.cache.read(start, stop)
        assert (piece.start, piece.stop) == (start, stop)
        # Exact: a cache stores what it was given, or what its format makes of that.
        dims = stop - start, self.k_dim, self.v_dim
        k, v = dense_both(*self.cache._storage.decode_both(piece.arrays, *dims))
        np.testing.assert_array_equal(np.array(k), self.reference.keys[:, :, start:stop])
        np.testing.assert_array_equal(np.array(v), self.reference.values[:, :, start:stop])

    def rewind(self, offset: int) -> bool:
        """Rewind both; check the answer against what the next query needs and what is held."""
        window = self.kind.window
        first_needed = 0 if window is None else max(0, offset - window + 1)
        needed = (first_needed, offset)
        empty = first_needed >= offset or offset == self.offset
        possible = empty or self.readable(*needed)
        if first_needed >= self.held_from:
            assert possible, f"{needed} must be held: the promise is {self.held_from} onwards"
        before = snapshot(self.cache)
        answer = self.cache.rewind(offset)
        assert answer is possible, f"rewind({offset}) from {self.offset} said {answer}"
        if answer:
            self.reference.rewind(offset)
            self.held_from = min(self.held_from, offset)
            assert self.cache.offset == offset
        else:
            assert_untouched(self.cache, before)
        return answer

    def reset(self, B: int) -> None:
        self.cache.reset()
        self.reference.clear()
        self.B, self.held_from = B, 0
        assert_empty(self.cache)


def snapshot(cache) -> tuple:
    arrays = [np.array(a) for a in cache.state]
    return cache.offset, len(cache), cache.nbytes, arrays


def assert_untouched(cache, before: tuple) -> None:
    offset, n, nbytes, arrays = before
    assert (cache.offset, len(cache), cache.nbytes) == (offset, n, nbytes)
    assert len(cache.state) == len(arrays)
    for now, then in zip(cache.state, arrays, strict=True):
        np.testing.assert_array_equal(np.array(now), then)


def assert_empty(cache) -> None:
    assert (cache.offset, len(cache), cache.nbytes) == (0, 0, 0)
    assert cache.state == []
