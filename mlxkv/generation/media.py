"""The rows of media that a prefill puts among the embeddings of its tokens.

Invariants:
- A row is computed once for all prompts while it is kept, and not at all where KV is restored.
- A medium is encoded right before the first chunk that needs it, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from mlxkv.errors import MediaError
from mlxkv.media.prompt import MediaSpan, PromptMedia, chunk_within, label
from mlxkv.media.types import Medium
from mlxkv.memory.media import Rows
from mlxkv.nn.model import CausalLM, Placed

Ask = Callable[[int, bool], int]
"""(tokens, whether fewer are of no use) -> tokens that may be computed at once."""


class MediaRows:
    """The media among the tokens of one prefill.

    Args:
        model: of the tokens.
        media: of the prompt.
        tokens: all of the prompt.
        kept: rows of media by content.
        make_room: called before an encoder runs; raises where there is no room for it.
    """

    def __init__(
        self,
        model: CausalLM,
        media: PromptMedia,
        tokens: Sequence[int],
        kept: Rows,
        make_room: Callable[[Medium], None],
    ):
        self._model, self._kept, self._make_room = model, kept, make_room
        self._spans = media.spans(tokens)
        self._two_way = model.two_way_kinds if self._spans else frozenset()
        self._rows: dict[bytes, mx.array] = {}

    def take(self, at: int, n: int, ask: Ask) -> int:
        """How many of the next `n` tokens are computed at once; raises as `ask`.

        Args:
            at: position of the first.
            n: at least one.
            ask: for memory; it may grant fewer.
        """
        n, whole = chunk_within(self._spans, self._two_way, at, n)
        while (granted := ask(n, whole)) < n:
            n, whole = chunk_within(self._spans, self._two_way, at, granted)
            if not whole:
                return n
        return n

    def encoding(self, at: int, n: int) -> Iterator[None]:
        """Compute rows that the next `n` tokens need, a medium a step.

        Raises:
            MediaError: only KV of it was kept, and that is gone.
            KVCacheFull: there is no room for the encoder.
        """
        needed = self._inside(at, n)
        self._rows = {
            span.medium.digest: self._rows[span.medium.digest]
            for span in needed
            if span.medium.digest in self._rows
        }
        for span in needed:
            medium = span.medium
            if medium.digest in self._rows:
                continue
            rows = self._kept.get(medium)
            if rows is None:
                if medium.data is None:
                    raise MediaError(
                        f"{label(medium)}: its KV is not on disk any more, and only its KV was "
                        "saved; save it again"
                    )
                self._make_room(medium)
                rows = self._kept.encode(self._model, medium)
                self._rows[medium.digest] = rows
                yield
            self._rows[medium.digest] = rows

    def placed(self, at: int, n: int) -> list[Placed]:
        """The rows among the next `n` tokens, once they are computed."""
        found = []
        for start, stop, medium in self._inside(at, n):
            first, last = max(start, at), min(stop, at + n)
            rows = self._rows[medium.digest][first - start : last - start]
            found.append(Placed(medium.kind, first - at, rows))
        return found

    def _inside(self, at: int, n: int) -> list[MediaSpan]:
        return [span for span in self._spans if span.start < at + n and span.stop > at]
