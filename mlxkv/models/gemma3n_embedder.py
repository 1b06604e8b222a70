"""From an encoder of pictures or sound to the language model of Gemma 3n.

Reference: transformers `Gemma3nMultimodalEmbedder`.
"""

from __future__ import annotations

import mlx.core as mx

from mlxkv.nn.layers import Prepared, RMSNorm
from mlxkv.nn.linear import Embedding, Linear


class Embedder(Prepared):
    """Project rows of an encoder, and embed the tokens around them (the end of a picture, say).

    The vocabulary's last tokens belong to embedders, though the language model's own embedding has
    rows for them too.

    Args:
        first: id of its first token.
        n_tokens: its tokens.
        width: of the encoder's rows.
        hidden_size: of the language model's.
        eps: of the norms.
    """

    def __init__(self, first: int, n_tokens: int, width: int, hidden_size: int, eps: float):
        super().__init__()
        self._first, self._n_tokens, self._eps = first, n_tokens, eps
        self.embedding = Embedding(n_tokens, width)
        self.hard_embedding_norm = RMSNorm(width, eps)
        self.soft_embedding_norm = RMSNorm(width, eps)
        self.embedding_projection = Linear(width, hidden_size, bias=False)

    def prepare(self) -> None:
        """Compute the tokens' rows once; what they are made of is not needed any more."""
        self._tokens = self.token_rows()
        mx.eval(self["_tokens"])
        del self.embedding, self.hard_embedding_norm

    def __call__(self, rows: mx.array) -> mx.array:
        """The encoder's rows `[n, width]` as `[n, E]`."""
        return self._projected(self["soft_embedding_norm"](rows))

    def over(self, x: mx.array, tokens: mx.array) -> mx.array:
        """Embeddings x `[B, L, E]` of tokens `[B, L]`, its own tokens' replaced."""
        table = self.token_rows()
        index = tokens - self._first
        own = (index >= 0) & (index < self._n_tokens)
        rows = table[mx.where(own, index, 0)].astype(x.dtype)
        return mx.where(own[..., None], rows, x)

    def token_rows(self) -> mx.array:
        """The rows of its tokens, `[n_tokens, E]`."""
        if "_tokens" in self:
            return self["_tokens"]
        rows = self["embedding"](mx.arange(self._n_tokens))
        return self._projected(self["hard_embedding_norm"](rows))

    def _projected(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(self["embedding_projection"](x), None, self._eps)
