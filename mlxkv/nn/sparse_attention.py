"""Latent attention in which a query sees the `index_topk` keys that an indexer chooses (DSA).

Of a query and a key, the indexer's score is

    sum over its heads of  w_h relu(q_h k / sqrt(D)) / sqrt(heads)

with queries from the attention's own low-rank queries, and one key a token, which the cache holds
as the latent's values: nothing else has to know of them. A layer without an indexer sees what the
last one with an indexer chose. While all keys are no more than `index_topk`, all are seen. Source:
DeepSeek-V3.2's report (arXiv 2512.02556); reference: transformers `modeling_glm_moe_dsa.py`.

Of keys with equal scores the earlier ones are chosen, so that it does not depend on how a prompt is
cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields
from mlxkv.kv.layout import LayerCache, Mask, Offset
from mlxkv.kv.storage import KV, Ragged, Rows, Several, dense
from mlxkv.nn.latent_attention import LatentAttention, LatentConfig, expanding_is_cheaper
from mlxkv.nn.linear import Linear
from mlxkv.nn.rope import RoPE

KEY_NORM_EPS = 1e-6
"""Of the norm of the indexer's keys."""
FULL, SHARED = "full", "shared"

Chosen = mx.array | tuple[mx.array | Several | None, ...] | None
"""What queries see: a mask, one for each part of `Ragged` keys, or None for what the layer's mask
says."""


@dataclass(frozen=True, slots=True)
class IndexerConfig:
    """The numbers of an indexer, whose names begin with `index_`.

    Args:
        topk: keys that a query sees.
        n_heads: of its queries.
        head_dim: values of a query's head, and of a key.
        interleaved: whether rotations pair neighbours.
    """

    topk: int
    n_heads: int
    head_dim: int
    interleaved: bool

    @classmethod
    def read(cls, fields: Fields) -> IndexerConfig:
        """Raises ConfigError where a key is missing or wrong."""
        head_dim, rope_dim = fields.int("index_head_dim"), fields.int("qk_rope_head_dim")
        if head_dim < rope_dim:
            raise fields.error("index_head_dim", f"must be qk_rope_head_dim, {rope_dim}, or more")
        return cls(
            fields.int("index_topk"),
            fields.int("index_n_heads"),
            head_dim,
            fields.bool("indexer_rope_interleave", True),
        )


def indexer_types(fields: Fields) -> tuple[bool, ...]:
    """Which layers have an indexer: `indexer_types`, else a pattern of F and S, else each
    `index_topk_freq` layers behind the first few.

    Raises:
        ConfigError: they are wrong, or the first layer has none.
    """
    n, pattern = fields.n_layers(), fields.any("index_topk_pattern")
    types = fields.strings("indexer_types", n, (FULL, SHARED))
    if types is None and isinstance(pattern, str):
        if len(pattern) != n or set(pattern) - {"F", "S"}:
            raise fields.error("index_topk_pattern", f"must be {n} letters, F or S")
        types = tuple(FULL if letter == "F" else SHARED for letter in pattern)
    elif types is None:
        types = fields.strings("index_topk_pattern", n, (FULL, SHARED))
    every = max(1, fields.count("index_topk_freq", 1))
    first = fields.count("index_skip_topk_offset", 2)
    if types is None:
        own = (max(i - first + 1, 0) % every == 0 for i in range(n))
        types = tuple(FULL if full else SHARED for full in own)
    if types[0] != FULL:
        raise fields.error("indexer_types", "the first layer must have an indexer of its own")
    return tuple(kind == FULL for kind in types)


class Indexer(nn.Module):
    """Chooses the keys that queries see; the names are the checkpoint's."""

    def __init__(self, config: LatentConfig, indexer: IndexerConfig):
        super().__init__()
        c, i = config, indexer
        assert c.q_lora_rank is not None
        self._config = i
        self.wq_b = Linear(c.q_lora_rank, i.n_heads * i.head_dim, bias=False)
        self.wk = Linear(c.hidden_size, i.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(i.head_dim, eps=KEY_NORM_EPS)
        self.weights_proj = Linear(c.hidden_size, i.n_heads, bias=False)
        self._rope = RoPE(c.rope, i.interleaved, i.head_dim)

    def keys_of(self, x: mx.array, offset: Offset) -> mx.array:
        """One a token, `[B, 1, L, D]`."""
        return self._rope(self["k_norm"](self["wk"](x))[:, None], offset)

    def __call__(self, x: mx.array, low: mx.array, keys: KV, mask: Mask, offset: Offset) -> Chosen:
        """What the tokens x `[B, L, E]` see of keys `[B, 1, S, D]`.

        Args:
            x: their hidden states.
            low: low-rank queries, `[B * L, rank]`.
            keys: those of x at the end.
            mask: what they could see, as for `attend`.
            offset: their position.
        """
        i, (B, L, _) = self._config, x.shape
        if keys.shape[2] <= i.topk:
            return None
        q = self["wq_b"](low).reshape(B, L, i.n_heads, i.head_dim).transpose(0, 2, 1, 3)
        q = self._rope(q, offset).astype(mx.float32)
        weights = self["weights_proj"](x).astype(mx.float32).swapaxes(1, 2)  # [B, H, L]
        weights = weights * (i.head_dim * i.n_heads) ** -0.5
        if isinstance(keys, Ragged):
            return self._of_parts(q, weights, keys)
        chosen = _chosen(_scores(q, weights, keys), _visible(mask, L, keys.shape[2]), i.topk)
        return chosen[0, 0] if B == 1 and L > 1 else chosen

    def _of_parts(self, q: mx.array, weights: mx.array, keys: Ragged) -> Chosen:
        """`attend`'s masks of one query in each row, part by part."""
        if keys.order is not None:
            q, weights = (mx.take(x, keys.order.rows, axis=0) for x in (q, weights))
        found, at = list[mx.array | Several | None](), 0
        for part, mask in zip(keys.parts, keys.masks, strict=True):
            S = part.shape[2]
            n = mask.n if isinstance(mask, Several) else part.shape[0]
            visible = mask.rows(S) if isinstance(mask, Several) else mask
            if S > self._config.topk:
                scores = _scores(q[at : at + n], weights[at : at + n], part)
                chosen = _chosen(scores, visible, self._config.topk)
                mask = Several(n, chosen[:, 0, 0]) if isinstance(mask, Several) else chosen
            found.append(mask)
            at += n
        return tuple(found)


def _scores(q: mx.array, weights: mx.array, keys: Rows) -> mx.array:
    """`[B, 1, L, S]` of queries `[B, H, L, D]`, weights `[B, H, L]`, keys `[B or 1, 1, S, D]`."""
    k = dense(keys).astype(mx.float32).swapaxes(-1, -2)
    if q.shape[2] == 1:
        return weights.swapaxes(1, 2)[:, None] @ mx.maximum(q[:, :, 0][:, None] @ k, 0)
    total = None
    for h in range(q.shape[1]):  # one head at a time: all would be [H, L, S] values
        own = mx.maximum(q[:, h : h + 1] @ k, 0) * weights[:, h : h + 1, :, None]
        total = own if total is None else total + own
    assert total is not None
    return total


def _visible(mask: Mask, L: int, S: int) -> mx.array | None:
    """Of what `attend` takes, bool that broadcasts to `[B, 1, L, S]`."""
    if isinstance(mask, mx.array) or mask is None:
        return mask
    assert mask == "causal", "media see each other in no model of this kind"
    return mx.arange(S)[None] <= mx.arange(S - L, S)[:, None]


def _chosen(scores: mx.array, visible: mx.array | None, topk: int) -> mx.array:
    """The `topk` largest of visible scores `[B, 1, L, S]`, of equal ones the earlier; bool."""
    if visible is not None:
        scores = mx.where(visible, scores, -mx.inf)
    at = scores.shape[-1] - topk
    least = mx.partition(scores, at, axis=-1)[..., at : at + 1]
    above = scores > least
    missing = topk - above.sum(axis=-1, keepdims=True)
    equal = scores == least
    found = above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= missing))
    return found if visible is None else found & visible


class SparseAttention(LatentAttention):
    """Multi-head latent attention over chosen keys.

    Args:
        config: of the model.
        indexer: of its own; None to see what an earlier layer chose.
    """

    def __init__(self, config: LatentConfig, indexer: IndexerConfig | None):
        super().__init__(config)
        if indexer is not None:
            self.indexer = Indexer(config, indexer)

    def chosen_of(
        self, x: mx.array, mask: Mask, cache: LayerCache | None, chosen: Chosen
    ) -> tuple[mx.array, Chosen]:
        """The attention of x `[B, L, E]`, and what its queries saw.

        Args:
            x: normed.
            mask: what they could see.
            cache: its keys are latents, its values the indexer's keys, if it has one.
            chosen: what the layer before saw.
        """
        c, (B, L, _) = self._config, x.shape
        offset = 0 if cache is None else cache.offset
        sizes = self.n_queries, c.kv_lora_rank, c.qk_rope_head_dim
        q, latent, k_rope = self.project_apart("qkv_a_proj", x, sizes)
        low = self["q_a_layernorm"](q.flatten(0, -2))
        q = self["q_b_proj"](low).reshape(B, L, c.num_attention_heads, -1)
        q, q_rope = mx.split(q.transpose(0, 2, 1, 3), [c.qk_nope_head_dim], axis=-1)
        q_rope = self._rope(q_rope, offset)
        latent, k_rope = self["kv_a_layernorm"](latent), self._rope(k_rope[:, None], offset)
        kv: KV = mx.concatenate([latent[:, None], k_rope], axis=-1)  # [B, 1, L, latent]
        indexer: Indexer | None = self.get("indexer")
        keys: KV = kv[..., :0] if indexer is None else indexer.keys_of(x, offset).astype(kv.dtype)
        if cache is not None:
            kv, keys = cache.update(kv, keys)
        if indexer is not None:
            chosen = indexer(x, low, keys, mask, offset)
        if chosen is not None:
            kv, mask = _narrowed(kv, mask, chosen)
        if not isinstance(kv, Ragged) and expanding_is_cheaper(c, L, kv.shape[2]):
            out = self._expanded(q, q_rope, dense(kv), mask)
        else:
            out = self._absorbed(q, q_rope, kv, mask)
        return self["o_proj"](out.transpose(0, 2, 1, 3).reshape(B, L, -1)), chosen


def _narrowed(kv: KV, mask: Mask, chosen: mx.array | tuple) -> tuple[KV, Mask]:
    """Keys and mask of queries that see the chosen ones alone."""
    if isinstance(kv, Ragged):
        assert isinstance(chosen, tuple)
        return replace(kv, masks=chosen), mask
    assert isinstance(chosen, mx.array)
    return kv, chosen
