"""What a model needs before anything of it is loaded: from config.json and file headers alone.

    KV bytes = sum over layers of
        n_kv_heads * (k_dim + v_dim) * bytes per value * min(tokens up to the next 256, window)

KV heads, not attention heads; a sliding layer stops at its window; a layer that shares another's
KV stores nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlxkv import device
from mlxkv.cache import CacheSpec
from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.kv_format import KVFormat, storage_of
from mlxkv.loader import Layout, lay_out
from mlxkv.names import HubRef, locate

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


def parse_bytes(text: str | int | None) -> int | None:
    """Bytes from "16GiB", "500MB", a number, or None and "auto" (None).

    Raises:
        UsageError: neither.
    """
    if text is None or text == "auto":
        return None
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"--memory must be like 16GiB, 500MB or auto; got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes that a model and its live caches allocate. Activations come on top.

    Args:
        weights_bytes: all weights, in the dtype they are computed in.
        kv_bytes: the caches of all sequences at `context` tokens.
        kv_bytes_per_token: what one more token takes in one sequence while no window is full.
        context: tokens a sequence.
        sequences: how many of them.
        kv_type: format of the KV.
        limit_bytes: what the machine, or the caller, allows.
        max_context: the longest context that fits for `sequences`, 0 if not even the weights do.
        specs: one per layer.
    """

    weights_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    context: int
    sequences: int
    kv_type: str
    limit_bytes: int
    max_context: int
    specs: tuple[CacheSpec | None, ...]

    @property
    def total_bytes(self) -> int:
        """Weights and KV."""
        return self.weights_bytes + self.kv_bytes

    @property
    def fits(self) -> bool:
        """Whether weights and KV stay under the limit."""
        return self.total_bytes <= self.limit_bytes


def pages_bytes(limit_bytes: int, weights_bytes: int) -> int:
    """What prefix pages may take in RAM: a quarter of what the limit leaves beside the weights.

    The rest is for live caches and activations, which pages must never crowd out.
    """
    return max(0, limit_bytes - weights_bytes) // 4


def kv_bytes(specs: Sequence[CacheSpec | None], n_tokens: int, kv: KVFormat) -> int:
    """Bytes that the live caches of one sequence allocate at `n_tokens`."""
    return sum(spec.nbytes(n_tokens, kv) for spec in specs if spec is not None)


def plan(
    model: str | Path,
    context: int | None = None,
    sequences: int = 1,
    kv_type: str = "native",
    memory: str | int | None = None,
    dtype: mx.Dtype | str = "auto",
) -> Plan:
    """Plan a model: a directory, a name that `mlxkv list` shows, or a Hugging Face repository.

    Of a repository that is not here only config.json and the headers of its weights are fetched,
    and nothing is kept.

    Args:
        model: path or name.
        context: tokens a sequence; None for the model's own.
        sequences: sequences at a time.
        kv_type: one of `KV_TYPES`.
        memory: limit ("16GiB", bytes); None for what the machine allows.
        dtype: what is computed in, as for `load`.

    Raises:
        UsageError: an argument out of its range.
        ModelNotFound, CheckpointError, DownloadError: as for `load`.
    """
    storage_of(kv_type)
    if sequences < 1 or (context is not None and context < 1):
        raise UsageError("--context and --sequences must be at least 1")
    layout = _layout(model, dtype)
    return plan_specs(
        layout.model.cache_specs(),
        weights_bytes=layout.nbytes,
        context=context or layout.model.config.context,
        sequences=sequences,
        kv=KVFormat(kv_type, layout.dtype.size),
        limit=parse_bytes(memory) or device.memory_limit(),
    )


def _layout(model: str | Path, dtype: mx.Dtype | str) -> Layout:
    """What a model loads as: from its directory, or from headers, without weights to read."""
    from mlxkv.hub_headers import headers_of
    from mlxkv.store import resolve

    try:
        path = resolve(str(model), fetch=False)
    except ModelNotFound:
        ref = None if isinstance(model, Path) else locate(model)
        if not isinstance(ref, HubRef) or ref.wanted is not None:
            raise
    else:
        return lay_out(path, dtype)
    with headers_of(ref.repo_id) as folder:
        return lay_out(folder, dtype, headers_only=True)


def plan_specs(
    specs: Sequence[CacheSpec | None],
    *,
    weights_bytes: int,
    context: int,
    sequences: int,
    kv: KVFormat,
    limit: int,
) -> Plan:
    """The arithmetic of `plan`, on numbers alone."""
    per_token = sum(
        spec.n_kv_heads * (kv.row_bytes(spec.k_dim) + kv.row_bytes(spec.v_dim))
        for spec in specs
        if spec is not None
    )
    room = limit - weights_bytes
    low, high = 0, 2**30
    while low < high:
        middle = (low + high + 1) // 2
        fits = kv_bytes(specs, middle, kv) * sequences <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return Plan(
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes(specs, context, kv) * sequences,
        kv_bytes_per_token=per_token,
        context=context,
        sequences=sequences,
        kv_type=kv.name,
        limit_bytes=limit,
        max_context=low,
        specs=tuple(specs),
    )
