"""Cut a sequence's KV, and the residual stream of its prompt, at a border (`border`).

Invariants:
- `Recorder` has the stream of the positions from `_start`, the beginning of a page, to `_stop`, or
  nothing at all: what comes behind a gap is not kept.
- Rows are those that the layers were given, of chunks that are computed or about to be.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxkv.kv.layout import Cache, Slice
from mlxkv.kv.types import STEP
from mlxkv.prefix.border import Border, JoinedPages, Lift
from mlxkv.prefix.capture import Cutter
from mlxkv.prefix.layout import FULL, Link, chain_of, token_bytes
from mlxkv.prefix.match import Match
from mlxkv.prefix.on_disk.format import ROOT, page_name
from mlxkv.prefix.on_disk.part import Part
from mlxkv.prefix.pages import Pages


class Recorder:
    """Keeps the residual stream of prompts.

    Attributes:
        at: the layer whose input it is.
    """

    def __init__(self, border: Border):
        self.at, self._pages = border.at, border.stream
        self._rows: list[mx.array] | None = None
        self._links: list[Link] = []
        self._start = self._stop = 0

    @property
    def is_on(self) -> bool:
        """Whether it keeps what comes next."""
        return self._rows is not None

    def stop(self) -> None:
        """Keep nothing until `begin`."""
        self._rows = None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are no page yet."""
        return sum(rows.nbytes for rows in self._rows or ())

    def begin(self, tokens: Sequence[int], start: int) -> None:
        """A prompt is about to be computed from position `start` on."""
        n_pages = start // STEP
        self._rows, self._start, self._stop = None, STEP * n_pages, start
        self._links = list(chain_of(token_bytes(tokens[:start]), n_pages))
        if not start:
            self._rows = []
            return
        match = self._pages.match(tokens[:start], start, 1)
        if match.n_tokens < start:
            return
        if start == self._start:
            self._rows = []
        elif (rows := self._pages.rows(match.links, self._start, start)) is not None:
            self._rows = [mx.contiguous(rows)]

    def hear(self, start: int, rows: mx.array) -> None:
        """Keep the stream `[1, L, E]` of a chunk that begins at position `start`."""
        if self._rows is None or start != self._stop:
            self._rows = None
            return
        self._rows.append(rows)
        self._stop += rows.shape[1]

    def flush(self, tokens: Sequence[int], n: int, *, tip: bool = False) -> None:
        """Store the pages that are complete, and perhaps what is behind them.

        Args:
            tokens: of the sequence.
            n: those that are computed.
            tip: whether no more of the prompt comes.
        """
        stop = min(n, self._stop)
        while self._rows is not None and (n_tokens := min(STEP, stop - self._start)) > 0:
            if n_tokens < STEP and not tip:
                return
            self._store(tokens, self._rows, n_tokens)
            if n_tokens < STEP:
                break
        if tip:
            self._rows = None

    def _store(self, tokens: Sequence[int], pieces: list[mx.array], n_tokens: int) -> None:
        rows = mx.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]
        start, stop = self._start, self._start + n_tokens
        parent = self._links[-1].name if self._links else ROOT
        data = token_bytes(tokens[start:stop])
        link = Link(parent, page_name(parent, data), start, n_tokens)
        if not self._pages.has(link):
            part = Part.of([Slice((rows[:, None, :n_tokens],), start, stop)])
            mx.eval(part.words)
            self._pages.add(link, data, {FULL: part}, self._links)
        if n_tokens == STEP:
            self._links.append(link)
            self._rows = [rows[:, STEP:]] if rows.shape[1] > STEP else []
            self._start = stop

    def forget(self, n: int) -> None:
        """Have the pages forget those of the sequence's that end behind `n` tokens."""
        self._pages.forget([link for link in self._links if link.stop > n])
        self._rows = None


class BorderCutter(Cutter):
    """Cuts a sequence's pages for the base or an adapter, and what both share below a border.

    Args:
        pages: its own: the base's, or an adapter's above the border.
        caches: of all layers.
        border: of the same model and owner.

    Attributes:
        border: see above.
    """

    def __init__(self, pages: Pages, caches: Sequence[Cache], border: Border):
        self.border = border
        self.recorder = Recorder(border)
        is_base = pages is border.lower.base
        self._below = None if is_base else Cutter(border.lower, caches)
        kinds = border.lower.base.kinds.within(border.at, len(caches))
        self._joined = Cutter(JoinedPages(border.lower, kinds), caches) if is_base else None
        super().__init__(pages, caches)

    @property
    def tap(self) -> Recorder | None:
        """What hears the residual stream of the next chunk, if anything does."""
        return self.recorder if self.recorder.is_on else None

    def lift(self, tokens: Sequence[int], start: int, limit: int) -> Lift | None:
        """See `Border.lift`; `advance_above` cuts what comes behind `start`."""
        if self._joined is not None:
            self._joined.restart(tokens[:start])
        return self.border.lift(tokens, start, limit)

    def resume(self, tokens: Sequence[int], match: Match) -> None:
        super().resume(tokens, match)
        if self._below is not None:
            self._below.resume(tokens, match.below or Match())

    def lifted(self, tokens: Sequence[int], lift: Lift) -> None:
        """All caches hold `tokens` now; `advance_above` has cut what is above the border."""
        if self._below is None or len(tokens) < lift.stop:  # it ended early
            self.resume(tokens, Match())
        else:
            self._below.resume(tokens, lift.below)

    def begin(self, tokens: Sequence[int], start: int, is_whole: bool) -> None:
        """A prompt is about to be computed from position `start` on.

        Args:
            tokens: the prompt.
            start: the position.
            is_whole: whether its layers cannot be cut.
        """
        if is_whole:
            self.recorder.stop()
        else:
            self.recorder.begin(tokens, start)

    def forget(self, n: int) -> None:
        super().forget(n)
        self.recorder.forget(n)
        if self._below is not None:
            self._below.forget(n)

    @property
    def nbytes(self) -> int:
        below = 0 if self._below is None else self._below.nbytes
        return super().nbytes + below + self.recorder.nbytes

    def is_due(self, n: int) -> bool:
        return super().is_due(n) or (self._below is not None and self._below.is_due(n))

    def advance_above(self, tokens: Sequence[int], n: int) -> None:
        """`advance`, while the layers below the border hold more than `n` tokens."""
        if self._joined is not None:
            self._joined.advance(tokens, n)
        else:
            super().advance(tokens, n)

    def advance(self, tokens: Sequence[int], n: int) -> None:
        super().advance(tokens, n)
        if self._below is not None:
            self._below.advance(tokens, n)
        self.recorder.flush(tokens, n)

    def finish(self, tokens: Sequence[int], n: int) -> list[Link]:
        links = super().finish(tokens, n)
        if self._below is None:
            self.border.lower.drop_doubles(links)
        else:
            self._below.finish(tokens, n)
        self.recorder.flush(tokens, n, tip=True)
        return links
