"""Stop texts in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence

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

    @property
    def stopped(self) -> bool:
        """Whether a stop text appeared."""
        return self.found is not None

    def add(self, text: str) -> str:
        """The part of the stream so far that can be shown; sets `found` at a stop text."""
        if not self.texts:
            return text
        self._held += text
        places = {stop: at for stop in self.texts if (at := self._held.find(stop)) >= 0}
        if places:
            self.found = min(places, key=places.__getitem__)
            shown, self._held = self._held[: places[self.found]], ""
            return shown
        end = len(self._held) - max(self._overlap(stop) for stop in self.texts)
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def finish(self) -> str:
        """What was held back and turned out to be no stop text."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Longest end of the held text that a stop text begins with."""
        for n in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:n]):
                return n
        return 0
