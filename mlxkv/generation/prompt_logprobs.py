"""Log-probabilities of a prompt's tokens, each under those before it.

Invariants:
- What is known of a prompt is known from its first token on, which has no log-probability.
- A token's comes from the logits behind the token before it: so of KV that is restored, one token
  less is taken than tokens are known.
- Known ones of recent prompts are kept, so that another prompt with the same beginning computes
  what it does not share: of the choices of a question, the choice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import mlx.core as mx

from mlxkv.generation.outputs import TokenLogprobs
from mlxkv.kv.layout import Cache
from mlxkv.media.prompt import NO_MEDIA, PromptMedia
from mlxkv.nn.model import POSITIONS, CausalLM, Media
from mlxkv.sampling.logprobs import tell
from mlxkv.text.tokenizer import Tokenizer

MAX_PROMPTS = 256
MAX_VALUES = 1 << 20
"""Log-probabilities that are kept, of all prompts together: 8 MiB."""


class PromptLogprobs:
    """Those of one prompt.

    Args:
        tokens: the prompt.
        n_top: how many of the likeliest tokens at each place.
        media: of the prompt; where they stand, the token that stands for a row is told.

    Attributes:
        n_known: leading tokens whose log-probability is known; the first one counts.
        is_shared: whether another prompt may take them.
    """

    def __init__(self, tokens: Sequence[int], n_top: int, media: PromptMedia = NO_MEDIA):
        import numpy as np

        self.tokens, self.n_top = np.array(tokens, np.int32), n_top
        self._said = np.array(media.vocabulary(tokens), np.int32) if media else self.tokens
        shape = len(tokens), 1 + n_top
        self._ids, self._values = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        self.n_known, self.is_shared = 1, True

    @property
    def size(self) -> int:
        """Log-probabilities that it has room for."""
        return self._values.size

    def n_shared(self, other: PromptLogprobs) -> int:
        """Leading tokens that another prompt has as well, and of which it knows enough."""
        import numpy as np

        if not other.is_shared or other.n_top < self.n_top:
            return 0
        n = min(len(self.tokens), other.n_known)
        differ = np.flatnonzero(self.tokens[:n] != other.tokens[:n])
        return int(differ[0]) if len(differ) else n

    def take(self, other: PromptLogprobs, n: int) -> None:
        """Take the first `n` tokens' from another prompt."""
        self._ids[:n] = other._ids[:n, : 1 + self.n_top]
        self._values[:n] = other._values[:n, : 1 + self.n_top]
        self.n_known = n

    def wants(self, position: int, n_new: int) -> bool:
        """Whether the logits of these positions say something that is not known."""
        return max(position + 1, self.n_known) < min(position + n_new + 1, len(self.tokens))

    def step_bytes(self, model: CausalLM) -> int:
        """Bytes that logits take at a time: as they are, in float32, and sorted."""
        return POSITIONS * model.config.vocab_size * 12

    def score(
        self,
        model: CausalLM,
        tokens: mx.array,
        caches: Sequence[Cache],
        position: int,
        media: Media = (),
    ) -> mx.array:
        """Compute tokens, and take the log-probabilities of those behind them.

        Args:
            tokens: `[1, L]`, at `position` of the prompt.
            caches: that hold what is before them.
            media: among them.

        Returns:
            Lazy logits `[1, V]` after the last token.
        """
        rows = None
        for rows in model.position_logits(tokens, caches, media):
            self._take(rows, position)
            position += rows.shape[0]
        assert rows is not None
        return rows[-1:]

    def _take(self, rows: mx.array, position: int) -> None:
        """Take what logits `[n, V]` of positions say of the tokens behind them."""
        import numpy as np

        start = max(position + 1, self.n_known)
        stop = min(position + 1 + rows.shape[0], len(self.tokens))
        if start >= stop:
            mx.eval(rows)
            return
        chosen = mx.array(self._said[start:stop])
        rows = rows[start - position - 1 : stop - position - 1]
        told = tell(rows, chosen, [self.n_top] * (stop - start))
        assert told is not None and start == self.n_known
        mx.eval(*told.arrays)
        ids, values = np.array(told.ids), np.array(told.logprobs.astype(mx.float32))
        order = np.argsort(-values[:, 1:], axis=-1, kind="stable")
        self._ids[start:stop, : ids.shape[1]] = ids
        self._values[start:stop, : ids.shape[1]] = values
        top = np.s_[start:stop, 1 : ids.shape[1]]
        self._ids[top] = np.take_along_axis(ids[:, 1:], order, axis=-1)
        self._values[top] = np.take_along_axis(values[:, 1:], order, axis=-1)
        self.n_known = stop

    def told(self, tokenizer: Tokenizer) -> tuple[TokenLogprobs, ...]:
        """Each token's; the first one's is None."""
        first = token_logprobs(tokenizer, int(self._said[0]), None)
        rest = zip(self._ids[1:].tolist(), self._values[1:].tolist(), strict=True)
        return (first, *(_told(tokenizer, ids, values) for ids, values in rest))


class Scores:
    """Those of recent prompts, of one owner."""

    def __init__(self) -> None:
        self._recent: deque[PromptLogprobs] = deque()

    def join(self, new: PromptLogprobs) -> None:
        """Give a prompt what is known of its beginning, and keep what will be known of it."""
        for old in self._recent:
            if (n := new.n_shared(old)) > new.n_known:
                new.take(old, n)
        self._recent.append(new)
        n_values = sum(each.size for each in self._recent)
        while len(self._recent) > MAX_PROMPTS or (n_values > MAX_VALUES and self._recent):
            n_values -= self._recent.popleft().size


def token_logprobs(
    tokenizer: Tokenizer,
    token: int,
    logprob: float | None,
    top: tuple[TokenLogprobs, ...] = (),
) -> TokenLogprobs:
    """A token with its text."""
    data = tokenizer.bytes_of(token)
    return TokenLogprobs(token, data.decode(errors="replace"), data, logprob, top)


def _told(tokenizer: Tokenizer, ids: list[int], values: list[float]) -> TokenLogprobs:
    top = (token_logprobs(tokenizer, *pair) for pair in zip(ids[1:], values[1:], strict=True))
    return token_logprobs(tokenizer, ids[0], values[0], tuple(top))


def answer_logprobs(
    tokenizer: Tokenizer, token: int, logprob: float | None, top: Sequence[tuple[int, float]]
) -> TokenLogprobs | None:
    """Those of a token of an answer; None where they were not asked for."""
    if logprob is None:
        return None
    likeliest = tuple(token_logprobs(tokenizer, each, value) for each, value in top)
    return token_logprobs(tokenizer, token, logprob, likeliest)
