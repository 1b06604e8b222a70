"""What a batch of texts takes while their vectors are computed, traced as a prompt's steps are."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxkv.nn import kernels
from mlxkv.nn.embedder import Embedder, Texts

UNTRACED = 64
"""Multiple of the hidden states that bounds a batch's memory where MLX cannot trace the model."""


class BatchNeeds:
    """Peak bytes of batches beside the weights, traced once for each size.

    Args:
        model: loaded, or as `trace.hollow` makes it.
        longest: tokens of the longest text that may come.
    """

    def __init__(self, model: Embedder, longest: int):
        self._model, self._longest = model, longest
        self._known: dict[int, int] = {}

    def of(self, n_tokens: int) -> int:
        """Bytes of the batch of this many tokens that takes most: of texts as long as may be."""
        if n_tokens not in self._known:
            whole, rest = divmod(n_tokens, self._longest)
            self._known[n_tokens] = self._traced([self._longest] * whole + [rest] * bool(rest))
        return self._known[n_tokens]

    def largest(self, room_bytes: int, most: int) -> int:
        """Tokens of a batch that fits: `most`, halved until it does; 1 where nothing does."""
        while most > 1 and self.of(most) > room_bytes:
            most //= 2
        return most

    def _traced(self, lengths: Sequence[int]) -> int:
        from mlxkv.memory.graph import Graph
        from mlxkv.memory.simulation import Memory

        model, texts = self._model, Texts.of(lengths)
        tokens = mx.zeros((1, sum(lengths)), mx.int32)
        try:
            with kernels.traced():
                graph = Graph.of(lambda tokens: [model.vectors(tokens, texts)], tokens)
            peak = Memory(graph, graph.order(1)).peak()
            return peak + model.masks_bytes(max(lengths))
        except (ValueError, RuntimeError):
            return UNTRACED * tokens.size * model.config.hidden_size * model.compute_dtype.size
