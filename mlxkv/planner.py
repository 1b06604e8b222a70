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

from mlxkv.cache import CacheSpec
from mlxkv.errors import UsageError
from mlxkv.kv_format import KVFormat, storage_of
from mlxkv.loader import lay_out

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
    kv_type: str | None = None,
    memory: str | int | None = None,
    dtype: mx.Dtype | str = "auto",
) -> Plan:
    """Plan a model that is on this machine: a directory or a name that `mlxkv list` shows.

    What is None comes from where `load` has it from.

    Args:
        model: path or name.
        context: tokens a sequence, past the model's own as well: this is arithmetic.
        sequences: sequences at a time.
        kv_type: one of `KV_TYPES`.
        memory: limit ("16GiB", bytes).
        dtype: what is computed in, as for `load`.

    Raises:
        UsageError: an argument out of its range.
        ModelNotFound, CheckpointError: as for `load`.
    """
    if sequences < 1 or (context is not None and context < 1):
        raise UsageError("--context and --sequences must be at least 1")
    from mlxkv.settings import Given, effective
    from mlxkv.store import resolve

    given = Given(kv_type=kv_type, memory=memory)
    path = resolve(str(model), fetch=False)
    settings = effective(path, given)
    storage_of(settings.kv_type.value)
    layout = lay_out(path, dtype)
    return plan_specs(
        layout.model.cache_specs(),
        weights_bytes=layout.nbytes,
        context=context or settings.context.value,
        sequences=sequences,
        kv=KVFormat(settings.kv_type.value, layout.dtype.size),
        limit=settings.memory.value,
    )


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
