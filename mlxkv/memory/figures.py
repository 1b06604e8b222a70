"""A model's memory at a moment, for its statistics."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxkv.cache import KVCache, RotatingKVCache
from mlxkv.kv.layout import Cache
from mlxkv.memory.budget import Budget
from mlxkv.memory.types import KVUse, MemoryStats


def kv_use(caches: Sequence[Cache]) -> KVUse:
    """What of a sequence's caches is used."""
    allocated = [_capacity(cache) for cache in caches]
    return KVUse(
        caches[0].offset if caches else 0,
        sum(used for used, _ in allocated),
        max((capacity for _, capacity in allocated), default=0),
        sum(cache.nbytes for cache in caches),
    )


def _capacity(cache: Cache) -> tuple[int, int]:
    """Bytes of what a cache holds, and tokens that it has room for."""
    if isinstance(cache, KVCache | RotatingKVCache):
        return cache.used_bytes, cache.capacity
    return cache.nbytes, 0


def memory_stats(budget: Budget, draft_bytes: int = 0) -> MemoryStats:
    """A model's memory, and MLX's; `draft_bytes` are those of models that draft for it."""
    mx.synchronize()
    pages, pages_bytes = budget.pages, budget.pages_bytes
    active, peak = mx.get_active_memory(), mx.get_peak_memory()
    most = budget.weights_bytes + budget.most.allocated_bytes + pages_bytes + draft_bytes
    return MemoryStats(
        limit_bytes=budget.limit_bytes,
        weights_bytes=budget.weights_bytes,
        kv=budget.use(),
        kv_start=budget.start,
        kv_most=budget.most,
        pages_ram_bytes=pages_bytes,
        pages_ssd_bytes=0 if pages is None else pages.ssd_bytes,
        workspace_bytes=max(0, peak - most),
        active_bytes=active,
        cached_bytes=mx.get_cache_memory(),
        peak_bytes=peak,
        unexplained_bytes=active - budget.used_bytes - draft_bytes,
        draft_bytes=draft_bytes,
    )
