"""What every family is: tokens to hidden states to logits, over caches that it specifies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.kv.layout import LayerCache, Mask, windowed_mask
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.rope import RoPE


def attention_masks(
    windows: Sequence[int | None], caches: Sequence[LayerCache] | None, L: int
) -> dict[int | None, Mask]:
    """One mask per window for the next `L` tokens.

    Args:
        windows: the window of each layer that owns KV, None for all tokens.
        caches: their caches in the same order; None for one pass over a whole sequence.
        L: new tokens.

    Returns:
        window -> what `attend` takes.
    """
    kinds = dict.fromkeys(windows)
    if L == 1:
        return kinds
    if caches is None:
        return {
            window: "causal" if window is None or L <= window else windowed_mask(L, 0, window)
            for window in kinds
        }
    first = dict(zip(reversed(windows), reversed(caches), strict=True))
    return {window: first[window].mask(L) for window in kinds}


class CausalLM(nn.Module):
    """What the engine asks of a model.

    A family's `Model` sets `config`, has a `hidden` and a `logits`, and one cache spec per layer.

    Attributes:
        compute_dtype: what it computes in, and keeps KV in; the loader sets it.
    """

    config: Any
    compute_dtype: mx.Dtype = mx.float32

    @property
    def batches(self) -> bool:
        """Whether `last_logits` takes several sequences of different lengths (`batch.batch`)."""
        return True

    @property
    def one_part(self) -> bool:
        """Whether a batch's keys must be one array, the short sequences padded."""
        return False

    def weights_root(self) -> nn.Module:
        """The module whose parameters have the checkpoint's names."""
        return self

    @property
    def mixes_dtypes(self) -> bool:
        """Whether its products with packed weights may be computed in more than the model is."""
        return True

    def keeps_dtype(self, name: str) -> bool:
        """Whether this tensor stays in the checkpoint's dtype, whatever the model computes in."""
        return False

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer; None where a layer reads another layer's KV."""
        raise NotImplementedError

    @property
    def stable_tokens(self) -> int | None:
        """Length up to which the KV of a token does not depend on what follows it; None for any.

        Rotary embeddings that stretch with the sequence turn every key anew past their context.
        """
        limits = [module.stable_tokens for module in self.modules() if isinstance(module, RoPE)]
        return min((n for n in limits if n is not None), default=None)

    def hidden(self, tokens: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        """Final hidden states `[B, L, E]` of tokens `[B, L]`; the caches take their KV."""
        raise NotImplementedError

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, V]` of final hidden states `[B, L, E]`."""
        raise NotImplementedError

    def __call__(self, tokens: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        """Logits of every position.

        Args:
            tokens: `[B, L]`, continuing what the caches hold.
            caches: one per layer that owns KV (`make_caches`); None scores one whole sequence.

        Returns:
            `[B, L, V]`.
        """
        return self.logits(self.hidden(tokens, caches))

    def last_logits(self, tokens: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        """Logits `[B, V]` after the last token: the head's product for one position only."""
        return self.logits(self.hidden(tokens, caches)[:, -1:])[:, 0]


def model_windows(specs: Iterable[CacheSpec | None]) -> list[int | None]:
    """The window of each layer that owns KV."""
    return [spec.window for spec in specs if spec is not None]
