"""Several sequences in one step: the weights are batched, the caches are not.

Invariants:
- A `BatchCache` owns nothing. It passes one token of each sequence on to that sequence's own cache,
  so sequences of any length, window and KV format go together, and may come and go between steps.
- Rows of one sequence never meet those of another in a sum: what is broken in one stays there.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxkv.cache import Cache, LayerCache, Mask, Offset, Positions
from mlxkv.errors import UsageError
from mlxkv.kv_format import Ragged, Rows


def batch(caches_of_sequences: Sequence[Sequence[Cache]]) -> Sequence[LayerCache]:
    """Caches for `model.last_logits(tokens [B, 1], caches)`, B sequences at once.

    Args:
        caches_of_sequences: those of each, as `make_caches` of one model gives them, in any KV
            format and at any offset. They stay the sequences' own and are what is written to.

    Raises:
        UsageError: no sequences, or caches of different models.
    """
    if len({len(caches) for caches in caches_of_sequences}) != 1:
        raise UsageError("a batch needs sequences of one model, at least one")
    if len(caches_of_sequences) == 1:
        return caches_of_sequences[0]
    return [BatchCache(layer) for layer in zip(*caches_of_sequences, strict=True)]


class BatchCache:
    """One layer's caches of several sequences, for one token of each at a time.

    Args:
        caches: one per sequence.
    """

    def __init__(self, caches: Sequence[Cache]):
        self.caches = tuple(caches)

    @property
    def offset(self) -> Offset:
        """Position of the next token: one number where all sequences have the same."""
        offsets = tuple([cache.offset for cache in self.caches])
        return offsets[0] if len(set(offsets)) == 1 else Positions(offsets)

    def mask(self, L: int) -> Mask:
        """None: a single token sees whatever its sequence's cache returns."""
        if L != 1:
            raise UsageError(f"a batch takes one token of each sequence at a time; got {L}")
        return None

    def update(self, k: mx.array, v: mx.array) -> tuple[Ragged, Ragged]:
        """Append a token to each sequence.

        Args:
            k: `[B, H, 1, k_dim]`.
            v: `[B, H, 1, v_dim]`.

        Returns:
            Keys and values that each sequence's query sees.
        """
        keys, values = zip(*self.each(k, v), strict=True)
        return Ragged(keys), Ragged(values)

    def each(self, k: mx.array, v: mx.array) -> list[tuple[Rows, Rows]]:
        """`update`, as what each sequence's cache returns."""
        B = len(self.caches)
        if k.shape[0] != B or k.shape[2] != 1:
            raise UsageError(f"a batch of {B} sequences takes keys [{B}, H, 1, D]; got {k.shape}")
        rows = zip(self.caches, mx.split(k, B), mx.split(v, B), strict=True)
        return [cache.update(k, v) for cache, k, v in rows]
