"""What a KV cache holds, for arithmetic: steps, a layer's spec, formats and their bytes. No MLX."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from mlxkv.errors import UsageError

CODE_BITS: dict[str, tuple[int, int] | None] = {
    "native": None,
    "q8": (8, 8),
    "k8v4": (8, 4),
    "q4": (4, 4),
}
"""KV format -> bits of a key's quantized value and of a value's, from the largest format to the
smallest. `native` keeps the dtype that the model computes in."""
KV_TYPES = tuple(CODE_BITS)
"""KV formats that one layer's cache can be made in."""
LAYOUTS = {
    "native": "native",
    "q8": "q8, side by side",
    "k8v4": "k8v4, apart",
    "q4": "q4, side by side",
}
"""KV format -> name of its layout in a model's fingerprint. A changed layout needs a new name, so
that KV on disk in the earlier one is not loaded."""
AUTO = "auto"
KV_CHOICES = (*KV_TYPES, AUTO)
"""KV types that a user can choose by one name: `auto` is native, and quantized when memory is
short."""
DEFAULT = "default"
"""The key of `mlxkv.json`'s table of KV formats for all layers that it does not name."""

S = TypeVar("S")


STEP = 256
"""Tokens by which a live cache grows: the unit of planning, sharing and storing as well."""
RULE_BLOCK = 64
"""Tokens that a recurrent layer computes at once of a chunk."""
FLOAT_BYTES = 4
"""Bytes of a float32, which the matrices of recurrent layers are kept in."""
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
        return self.token_bytes(kv) * self.n_rows(n_tokens)

    def token_bytes(self, kv: KVFormat) -> int:
        """Bytes of one token."""
        return self.n_kv_heads * kv.row_bytes(self.k_dim, self.v_dim)

    @property
    def opaque(self) -> bool:
        """Whether what the layer keeps is something else than keys and values of tokens."""
        return self.n_kv_heads == 0


@dataclass(frozen=True, slots=True)
class RecurrentSpec(CacheSpec):
    """The memory of a layer that keeps a state, which has one size for any number of tokens.

    Args:
        n_channels: of the convolution before the rule.
        n_tail: its last inputs that are kept: one fewer than its taps.
        n_heads: matrices of the state.
        key_dim: rows of each.
        value_dim: columns of each.
    """

    n_kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    n_channels: int = 0
    n_tail: int = 0
    n_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0

    def nbytes(self, n_tokens: int, kv: KVFormat) -> int:
        """Bytes of one sequence's state: the tail as the model computes, the matrices in float32.

        No KV format changes it, and no number of tokens.
        """
        tail = self.n_channels * self.n_tail * kv.itemsize
        return tail + FLOAT_BYTES * self.n_heads * self.key_dim * self.value_dim

    def values(self, n_new: int) -> int:
        """Values that the layer's rule holds at most beside its projections, of `n_new` tokens.

        The convolution's, some rows of each head, matrices of a block of tokens (`nn.delta_rule`),
        and states.
        """
        head = 12 * (self.key_dim + self.value_dim) + 14 * RULE_BLOCK
        n = -(-n_new // RULE_BLOCK) * RULE_BLOCK if n_new > 1 else 1
        states = 4 * self.n_heads * self.key_dim * self.value_dim
        return n * (8 * self.n_channels + self.n_heads * head) + states


def take_drafts(specs: Iterable[CacheSpec | None]) -> bool:
    """Whether all layers can take back the tokens of a draft."""
    own = (spec for spec in specs if spec is not None)
    return all(isinstance(spec, RecurrentSpec) or not spec.opaque for spec in own)


GROUP_SIZES = (64, 32)
"""Values that share a scale and a bias: the largest that divides the head's size."""


def groups(dim: int) -> tuple[int, int]:
    """Group size, and the dimension padded to a multiple of it."""
    group = next((size for size in GROUP_SIZES if dim % size == 0), GROUP_SIZES[-1])
    return group, -(-dim // group) * group


@dataclass(frozen=True, slots=True)
class LayerTypes:
    """A KV type that is given by layer: a format for all layers, and others for some.

    As a text, which is what all but this class handle: `q8`, or `k8v4,0=native,5=q8`.

    Args:
        default: one of `KV_TYPES`.
        layers: (the model's number of a layer, its format), in their order.
    """

    default: str
    layers: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        return ",".join([self.default, *(f"{layer}={name}" for layer, name in self.layers)])

    @property
    def names(self) -> tuple[str, ...]:
        """The formats in use, from the largest to the smallest."""
        used = {self.default, *(name for _, name in self.layers)}
        return tuple(name for name in KV_TYPES if name in used)


@functools.lru_cache(maxsize=64)  # requests choose KV types
def layer_types(kv_type: str) -> LayerTypes:
    """Read a KV type: one of `KV_TYPES`, or those of layers.

    Raises:
        UsageError: it is neither.
    """
    default, *others = (part.strip() for part in kv_type.split(","))
    found: dict[int, str] = {}
    for other in others:
        layer, _, name = other.partition("=")
        if not layer.isdecimal() or len(layer) > 6 or name not in KV_TYPES or int(layer) in found:
            raise _unknown(kv_type)
        found[int(layer)] = name
    if default not in KV_TYPES:
        raise _unknown(kv_type)
    own = sorted((layer, name) for layer, name in found.items() if name != default)
    return LayerTypes(default, tuple(own))


def _unknown(kv_type: object, allowed: Iterable[str] = KV_TYPES) -> UsageError:
    return UsageError(f"must be {allowed_kv_types(allowed)}; got {kv_type!r}", field="kv_type")


def allowed_kv_types(names: Iterable[str] = KV_CHOICES) -> str:
    """What a KV type may be, for messages."""
    return f"one of {', '.join(names)}, or formats of layers like k8v4,0=native,5=q8"


def read_kv_type(choice: object) -> str:
    """A user's KV type as it is written in one way.

    Args:
        choice: one of `KV_CHOICES`, `k8v4,0=native`, or that as a table,
            `{"default": "k8v4", "0": "native"}`.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(choice, Mapping):
        others = [f"{layer}={name}" for layer, name in choice.items() if layer != DEFAULT]
        text = ",".join([str(choice.get(DEFAULT, KV_TYPES[0])), *others])
    elif isinstance(choice, str):
        text = choice
    else:
        raise _unknown(choice, KV_CHOICES)
    if text == AUTO:
        return AUTO
    try:
        return str(layer_types(text))
    except UsageError:
        raise _unknown(choice, KV_CHOICES) from None


def kv_type_table(kv_type: str) -> str | dict[str, str]:
    """A KV type as `mlxkv.json` has it, which `read_kv_type` reads: by layer it is a table."""
    types = layer_types(kv_type)
    if not types.layers:
        return types.default
    return {DEFAULT: types.default, **{str(layer): name for layer, name in types.layers}}


def first_kv_type(choice: str) -> str:
    """The KV type that a sequence begins in.

    Raises:
        UsageError: `choice` is not one that a user can choose.
    """
    kv_type = read_kv_type(choice)
    return KV_TYPES[0] if kv_type == AUTO else kv_type


def smaller_types(kv_type: str) -> tuple[str, ...]:
    """The formats that are smaller than the largest in use, from the largest to the smallest."""
    return KV_TYPES[KV_TYPES.index(layer_types(kv_type).names[0]) + 1 :]


def is_quantized(kv_type: str) -> bool:
    """Whether any layer's KV is."""
    return any(CODE_BITS[name] is not None for name in layer_types(kv_type).names)


def layout_of(kv_type: str) -> str:
    """The name of a KV type's layout in a model's fingerprint; of an unknown type itself."""
    try:
        types = layer_types(kv_type)
    except UsageError:
        return kv_type
    others = (f"{layer}={LAYOUTS[name]}" for layer, name in types.layers)
    return "; ".join([LAYOUTS[types.default], *others])


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are stored, for arithmetic.

    Args:
        name: a KV type: one of `KV_TYPES`, or by layer, see `LayerTypes`.
        itemsize: bytes per value, 2 for float16 and bfloat16, 4 for float32.
    """

    name: str = "native"
    itemsize: int = 2

    @property
    def default(self) -> KVFormat:
        """Of layers that are not named."""
        return replace(self, name=layer_types(self.name).default)

    def layers(self, specs: Iterable[S | None]) -> Iterator[tuple[S, KVFormat]]:
        """The layers that own KV, each with its own format.

        Args:
            specs: one of each layer, None of those that own no KV.

        Raises:
            UsageError: a layer is named that is not there, or owns no KV.
        """
        types, specs = layer_types(self.name), list(specs)
        others = dict(types.layers)
        own = {i for i, spec in enumerate(specs) if spec is not None}
        if missing := sorted(others.keys() - own):
            raise UsageError(
                f"the KV type {self.name} names layer {missing[0]}, and the model's layers with KV "
                f"of their own are {min(own, default=0)} to {max(own, default=0)}"
            )
        one = {name: KVFormat(name, self.itemsize) for name in types.names}
        for i, spec in enumerate(specs):
            if spec is not None:
                yield spec, one[others.get(i, types.default)]

    def row_bytes(self, k_dim: int, v_dim: int) -> int:
        """Bytes of one head's key and value of one token; of a format for all layers."""
        if (bits := CODE_BITS[self.name]) is None:
            return (k_dim + v_dim) * self.itemsize
        return sum(self._coded(dim, n) for dim, n in zip((k_dim, v_dim), bits, strict=True))

    def _coded(self, dim: int, bits: int) -> int:
        group, padded = groups(dim)
        return padded * bits // 8 + 2 * (padded // group) * self.itemsize
