"""A step with several tokens of some sequences: each token is a row of a batch.

Invariants:
- A sequence's tokens follow each other, at the positions behind what its caches hold. Its caches
  take them in one update, as they take a chunk; a row of shared buffers is left for that.
- Sequences with one token go as in any other step (`batch`), and come first.
- Nothing but attention knows that rows belong together, so a row's products are those of a step of
  one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from mlxkv.cache import KVCache, RecurrentCache, RotatingKVCache
from mlxkv.errors import UsageError
from mlxkv.kv.layout import (
    Cache,
    LayerCache,
    Mask,
    Offset,
    Place,
    Positions,
    StateCache,
    Stepping,
)
from mlxkv.kv.storage import Order, Ragged, Rows, Several


def wide(
    plain: Sequence[LayerCache], n_plain: int, drafted: Sequence[tuple[Sequence[Cache], int]]
) -> list[WideCache | WideStates]:
    """Caches for one `model.last_logits(tokens [T, 1], caches)`.

    Args:
        plain: of the sequences with one token, from `batch`; empty where there are none.
        n_plain: how many those are.
        drafted: of each other sequence its caches, and its tokens, of which there are two or more.
    """
    n_layers = len(drafted[0][0])
    steps = _Rows(n_plain, drafted)
    return [
        _layer(plain[i] if n_plain else None, [caches[i] for caches, _ in drafted], steps)
        for i in range(n_layers)
    ]


def _layer(
    plain: LayerCache | None, drafted: Sequence[Cache], rows: _Rows
) -> WideCache | WideStates:
    states = [cache for cache in drafted if isinstance(cache, RecurrentCache)]
    return WideStates(plain, states, rows) if states else WideCache(plain, drafted, rows)


class _Rows:
    """The rows of a step: positions and masks, made once for all layers."""

    def __init__(self, n_plain: int, drafted: Sequence[tuple[Sequence[Cache], int]]):
        self.n_plain, self.n_tokens = n_plain, [n for _, n in drafted]
        starts = [(caches[0].offset, n) for caches, n in drafted]
        self._drafted = tuple(at + i for at, n in starts for i in range(n))
        self._made: tuple[Offset | None, Offset] | None = None
        self._several: dict[tuple[int, int | None], Several] = {}

    def several(self, i: int, cache: Cache) -> Several:
        """The mask of a drafted sequence's tokens, which its cache takes next."""
        window = cache.max_rows if isinstance(cache, RotatingKVCache) else None
        if (i, window) not in self._several:
            n = self.n_tokens[i]
            self._several[i, window] = Several(n, cache.mask(n))
        return self._several[i, window]

    def behind(self, plain: Offset | None) -> Offset:
        """Of all rows, where the plain ones are at `plain`."""
        if self._made is None or self._made[0] != plain:
            of = () if plain is None else plain.of if isinstance(plain, Positions) else None
            first = (plain,) * self.n_plain if of is None else of
            self._made = plain, Positions((*first, *self._drafted))  # pyright: ignore
        return self._made[1]


class WideCache(Stepping):
    """One layer's caches for a step of several tokens of some sequences."""

    __slots__ = ("_drafted", "_plain", "_rows")

    def __init__(
        self,
        plain: LayerCache | None,
        drafted: Sequence[Cache],
        rows: _Rows,
    ):
        self._plain, self._drafted, self._rows = plain, drafted, rows

    @property
    def offset(self) -> Offset:
        """Position of each row's token."""
        return self._rows.behind(None if self._plain is None else self._plain.offset)

    def mask(self, L: int) -> Mask:
        """None: what a token sees comes with the keys that `update` returns."""
        assert L == 1, L
        return None

    def next_place(self) -> Place | None:
        """Where the tokens of a sequence alone go; None with others beside it."""
        if self._plain is not None or len(self._drafted) != 1:
            return None
        (cache,) = self._drafted
        is_sliceable = isinstance(cache, KVCache | RotatingKVCache)
        return cache.next_place(self._rows.n_tokens[0]) if is_sliceable else None

    def stepped(self, keys: mx.array, values: mx.array) -> None:
        (cache,) = self._drafted
        assert isinstance(cache, KVCache | RotatingKVCache)
        cache.stepped(keys, values, self._rows.n_tokens[0])

    def update(self, k: mx.array, v: mx.array) -> tuple[Ragged, Ragged]:
        """Append k `[T, H, 1, k_dim]` and v `[T, H, 1, v_dim]`: the tokens of all sequences."""
        keys: list[Rows] = []
        values: list[Rows] = []
        masks: list[mx.array | Several | None] = []
        n_plain = at = self._rows.n_plain
        order = None
        if self._plain is not None:
            found = self._plain.update(k[:at], v[:at])
            order = _taken(*found, keys, values, masks)
        for i, cache in enumerate(self._drafted):
            masks.append(several := self._rows.several(i, cache))
            rows = (x[at : at + several.n].transpose(2, 1, 0, 3) for x in (k, v))  # [1, H, n, D]
            own_k, own_v = cache.update(*rows)
            keys.append(own_k)
            values.append(own_v)
            at += several.n
        if order is not None:
            order = _longer(order, at - n_plain)
        return Ragged(tuple(keys), tuple(masks), order), Ragged(tuple(values), tuple(masks), order)


class WideStates:
    """One layer's states for such a step, where the layer keeps one."""

    def __init__(self, plain: LayerCache | None, drafted: Sequence[RecurrentCache], rows: _Rows):
        self._plain, self._drafted, self._rows = plain, drafted, rows

    @property
    def offset(self) -> Offset:
        """Position of the first drafted sequence's next token: states know no positions."""
        return self._drafted[0].offset

    def mask(self, L: int) -> Mask:
        """None: a state has seen what came before."""
        return None

    def update(self, k: mx.array, v: mx.array) -> tuple[Rows, Rows]:
        """Raises UsageError: a state takes no keys and values."""
        raise UsageError("this layer keeps a state and takes no keys and values: use `each`")

    def each(self, run: Callable[..., mx.array], *rows: mx.array) -> mx.array:
        """What run(cache, rows `[B, L, ...]`) gives of each sequence, or of those with one token.

        Args:
            run: gives `[B, L, ...]`.
            rows: of the step, `[T, 1, ...]` each.

        Returns:
            The results, `[T, 1, ...]`.
        """
        found, at = list[mx.array](), self._rows.n_plain
        if self._plain is not None:
            states = cast(StateCache, cast(Any, self._plain))
            found.append(run(states, *(x[:at] for x in rows)))
        for cache, n in zip(self._drafted, self._rows.n_tokens, strict=True):
            own = (x[at : at + n].swapaxes(0, 1) for x in rows)
            found.append(run(cache, *own).swapaxes(0, 1))
            at += n
        return mx.concatenate(found) if len(found) > 1 else found[0]


def _taken(
    k: Rows | Ragged,
    v: Rows | Ragged,
    keys: list[Rows],
    values: list[Rows],
    masks: list[mx.array | Several | None],
) -> Order | None:
    """Take over the parts of the plain sequences, and their order."""
    if not isinstance(k, Ragged):
        assert not isinstance(v, Ragged)
        keys.append(k)
        values.append(v)
        masks.append(None)
        return None
    assert isinstance(v, Ragged)
    keys += k.parts
    values += v.parts
    masks += k.masks
    return k.order


def _longer(order: Order, n: int) -> Order:
    """An order with n more rows behind it, in their places."""
    n_rows, n_sequences = order.rows.shape[0], order.back.shape[0]
    more = mx.arange(n_sequences, n_sequences + n, dtype=mx.uint32)
    back = mx.arange(n_rows, n_rows + n, dtype=mx.uint32)
    return Order(mx.concatenate([order.rows, more]), mx.concatenate([order.back, back]))
