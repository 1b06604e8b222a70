"""What a KV cache holds, for arithmetic: steps, a layer's spec, formats and their bytes. No MLX."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkv.errors import UsageError

KV_TYPES = ("native", "q8", "q4")
"""KV formats that a cache can be made in: `native` keeps the dtype that the model computes in."""
CODE_BITS = {"native": None, "q8": 8, "q4": 4}
"""KV format -> bits of a quantized value."""
LAYOUTS = {"native": "native", "q8": "q8, side by side", "q4": "q4, side by side"}
"""KV format -> name of its layout in a model's fingerprint. A changed layout needs a new name, so
that KV on disk in the earlier one is not loaded."""
AUTO = "auto"
KV_CHOICES = (*KV_TYPES, AUTO)
"""KV types that a user can choose: `auto` is native, and quantized when memory is short."""


STEP = 256
"""Tokens by which a live cache grows: the unit of planning, sharing and storing as well."""
AT_ONCE = 4 << 20
"""Bytes of layers that are copied at a time: the thread waits once for them, not for each, which on
a loaded CPU takes milliseconds."""


def ceil_step(n_tokens: int) -> int:
    """The smallest multiple of `STEP` that holds `n_tokens`."""
    return -(-n_tokens // STEP) * STEP


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The only description of one layer's memory.

    Args:
        n_kv_heads: heads of keys and values; query heads do not matter.
        k_dim: values per key.
        v_dim: values per value vector.
        window: tokens that a sliding-window layer sees, its own included; None for all.
    """

    n_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None

    def n_rows(self, n_tokens: int) -> int:
        """Tokens that a live cache has room for once it has seen `n_tokens`."""
        rows = ceil_step(n_tokens)
        return rows if self.window is None else min(rows, self.window)

    def nbytes(self, n_tokens: int, kv: KVFormat) -> int:
        """Bytes that a live cache of one sequence allocates for `n_tokens`.

        n_kv_heads * (k_dim + v_dim) * bytes per value * min(n_tokens up to the next 256, window).
        """
        row = kv.row_bytes(self.k_dim) + kv.row_bytes(self.v_dim)
        return self.n_kv_heads * row * self.n_rows(n_tokens)

    @property
    def opaque(self) -> bool:
        """Whether what the layer keeps is something else than keys and values of tokens."""
        return self.n_kv_heads == 0


GROUP_SIZES = (64, 32)
"""Values that share a scale and a bias: the largest that divides the head's size."""


def groups(dim: int) -> tuple[int, int]:
    """Group size, and the dimension padded to a multiple of it."""
    group = next((size for size in GROUP_SIZES if dim % size == 0), GROUP_SIZES[-1])
    return group, -(-dim // group) * group


def first_kv_type(choice: str) -> str:
    """The format that a sequence begins in.

    Raises:
        UsageError: it is not one of `KV_CHOICES`.
    """
    if choice not in KV_CHOICES:
        raise UsageError(f"must be one of {', '.join(KV_CHOICES)}; got {choice!r}", field="kv_type")
    return KV_TYPES[0] if choice == AUTO else choice


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are stored, for arithmetic.

    Args:
        name: one of `KV_TYPES`.
        itemsize: bytes per value, 2 for float16 and bfloat16, 4 for float32.
    """

    name: str = "native"
    itemsize: int = 2

    def row_bytes(self, dim: int) -> int:
        """Bytes of one head's vector of `dim` values."""
        if (bits := CODE_BITS[self.name]) is None:
            return dim * self.itemsize
        group, padded = groups(dim)
        return padded * bits // 8 + 2 * (padded // group) * self.itemsize
