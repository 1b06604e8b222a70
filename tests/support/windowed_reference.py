"""What a cache must add up to: attention over everything that was ever given, in NumPy float64.

`FullHistory` forgets nothing and knows no buffers, rings or steps, so it shares no code and no idea
with the caches that it judges. The query at position p sees the keys in (p - window, p].
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def softmax_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | float
) -> np.ndarray:
    """Attention in float64.

    Args:
        q: [B, H, L, D].
        k: [B, H, S, D].
        v: [B, H, S, Dv].
        bias: what is added to the scores, broadcast to [B, H, L, S]; -inf hides a key.

    Returns:
        [B, H, L, Dv]; NaN for a query that sees no key.
    """
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) * q.shape[-1] ** -0.5
    scores = scores + bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v.astype(np.float64)


def hidden(seen: np.ndarray) -> np.ndarray:
    """Turn a mask of what is seen into what is added to the scores."""
    return np.where(seen, 0.0, -np.inf)


def mask_as_bias(mask: mx.array | str | None, n_queries: int, n_keys: int) -> np.ndarray | float:
    """Read a mask as `mx.fast.scaled_dot_product_attention` does.

    None shows every key; "causal" lets query i see the first n_keys - n_queries + i + 1; a boolean
    array is True where a key is seen; any other array is added.
    """
    if mask is None:
        return 0.0
    if isinstance(mask, str):
        assert mask == "causal", mask
        return hidden(np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool))
    assert mask.shape[-2:] == (n_queries, n_keys), (mask.shape, n_queries, n_keys)
    if mask.dtype == mx.bool_:
        return hidden(np.array(mask))
    return np.array(mask.astype(mx.float32), dtype=np.float64)


class FullHistory:
    """Every key and value given so far, and windowed causal attention over them.

    Args:
        window: keys that a query sees, its own included; None for all.
    """

    def __init__(self, window: int | None):
        self.window = window
        self.clear()

    def clear(self) -> None:
        self._k: list[np.ndarray] = []
        self._v: list[np.ndarray] = []

    @property
    def offset(self) -> int:
        return sum(k.shape[2] for k in self._k)

    @property
    def keys(self) -> np.ndarray:
        """[B, H, offset, D]."""
        return np.concatenate(self._k, axis=2)

    @property
    def values(self) -> np.ndarray:
        """[B, H, offset, Dv]."""
        return np.concatenate(self._v, axis=2)

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        self._k.append(k)
        self._v.append(v)

    def rewind(self, offset: int) -> None:
        if offset == 0:
            self.clear()
        else:
            k, v = self.keys[:, :, :offset], self.values[:, :, :offset]
            self._k, self._v = [k], [v]

    def attend(self, q: np.ndarray) -> np.ndarray:
        """Attention of the last `q.shape[2]` positions: [B, H, L, D] -> [B, H, L, Dv]."""
        stop = self.offset
        start = stop - q.shape[2]
        # Keys before the first query's window are masked anyway; leaving them out saves time.
        first = 0 if self.window is None else max(0, start - self.window + 1)
        query = np.arange(start, stop)[:, None]
        key = np.arange(first, stop)[None, :]
        seen = key <= query
        if self.window is not None:
            seen &= key > query - self.window
        return softmax_attention(
            q, self.keys[:, :, first:], self.values[:, :, first:], hidden(seen)
        )
