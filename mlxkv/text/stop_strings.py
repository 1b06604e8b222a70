"""Stop texts in a stream of text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

from mlxkv.errors import UsageError


class StopTexts:
    """Passes text on until a stop text appears; what may be the start of one is held back.

    Attributes:
        found: the stop text that appeared; of several at one place, the one given first.

    Raises:
        UsageError: one of them is empty or not a text.
    """

    def __init__(self, texts: str | Sequence[str] = ()):
        if not isinstance(texts, Sequence):
            raise UsageError(f"must be a text that is not empty; got {texts!r}", field="stop")
        self.texts = (texts,) if isinstance(texts, str) else tuple(texts)
        for text in self.texts:
            if not isinstance(text, str) or not text:
                raise UsageError(f"must be a text that is not empty; got {text!r}", field="stop")
        self._held = ""
        self.found: str | None = None

    @cached_property
    def tables(self) -> tuple[dict[str, int], list[int], list[str]]:
        """What texts are looked for with: their order, their lengths, and all of them sorted.

        With many texts they take long to make: made at the first text, or when asked for.
        """
        order = {text: i for i, text in reversed(list(enumerate(self.texts)))}
        return order, sorted({len(text) for text in order}), sorted(order)

    @property
    def stopped(self) -> bool:
        """Whether a stop text appeared."""
        return self.found is not None

    def add(self, text: str) -> str:
        """The part of the stream so far that can be shown; sets `found` at a stop text."""
        if not self.texts:
            return text
        n_known = len(self._held)
        self._held += text
        found = self._first_stop(n_known)
        if found is None:
            places = range(len(self._held))
            end = next((at for at in places if self._may_begin(at)), len(self._held))
            shown, self._held = self._held[:end], self._held[end:]
            return shown
        at, i = found
        self.found = self.texts[i]
        shown, self._held = self._held[:at], ""
        return shown

    def finish(self) -> str:
        """What was held back and turned out to be no stop text."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, n_known: int) -> tuple[int, int] | None:
        """Place and number of the first stop text that ends behind the first `n_known` characters.

        Of several at one place the one given first.
        """
        order, lengths, _ = self.tables
        found, end = [], len(self._held)
        for n in lengths:
            for at in range(max(0, n_known - n + 1), end - n + 1):
                i = order.get(self._held[at : at + n])
                if i is not None:
                    found.append((at, i))
                    break
        return min(found, default=None)

    def _may_begin(self, at: int) -> bool:
        """Whether all that is held behind a place begins a stop text."""
        rest, texts = self._held[at:], self.tables[2]
        i = bisect_left(texts, rest)
        return i < len(texts) and texts[i].startswith(rest)
