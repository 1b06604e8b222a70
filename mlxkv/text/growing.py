"""Token ids of texts that go on from earlier ones, as the prompts of a conversation do.

A tokenizer cuts a text at its special tokens first, and encodes what lies between them piece by
piece. So where two texts are equal up to a special token, their ids up to there are equal, and only
the rest of the second text is encoded.

An owner's texts are of use to its own later ones alone: the time that encoding takes tells no other
owner what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxkv.text.least_tokens import LeastTokens
from mlxkv.text.pieces import Pieces

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

LEAST = 4096
"""Characters of a text that is remembered: a shorter one is encoded in a few milliseconds."""
MAX_TEXTS = 8
"""Texts of an owner that are remembered."""
MAX_OWNERS = 16
"""Owners whose texts are remembered: those that came last."""
MAX_CHARS = 8_000_000
"""Characters of all texts of an owner."""
COUNTED = 1_000_000
"""Characters of which the tokens are always counted, also where they are too many."""


class TooManyTokens(Exception):
    """A text has more tokens than it may.

    Args:
        n_tokens: that it has at least.
    """

    def __init__(self, n_tokens: int):
        super().__init__(f"at least {n_tokens:,} tokens")
        self.n_tokens = n_tokens


@dataclass(frozen=True, slots=True)
class _Known:
    """A text, its ids, and where it can be cut: (characters, ids) before a special token."""

    text: str
    ids: list[int]
    cuts: tuple[tuple[int, int], ...]


class GrowingTexts:
    """Encodes texts without adding special tokens, and remembers the last ones.

    Args:
        backend: of the tokenizer.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        self._pieces, self._least = Pieces(backend), LeastTokens(backend)
        self._added = backend.get_added_tokens_decoder()
        self._is_cut: dict[int, bool] = {}
        # Replaced as a whole: threads may share a tokenizer.
        self._known: dict[str, tuple[_Known, ...]] = {}

    def encode(self, text: str, owner: str = "", most: int | None = None) -> list[int]:
        """The ids of a text of an owner.

        Args:
            text: any.
            owner: whose it is.
            most: the tokens that it may have.

        Raises:
            TooManyTokens: it has more, found before the whole of a long text was encoded. A text
                of which no more than `COUNTED` characters are left is encoded all the same.
        """
        if len(text) < LEAST:
            return self._backend.encode(text, add_special_tokens=False).ids
        mine = self._known.get(owner, ())
        best = max(mine, key=lambda known: _n_equal(known.text, text), default=None)
        at, n_ids, cuts = self._last_cut(best, text)
        ids = [] if best is None else best.ids[:n_ids]
        self.check(text, most, at, len(ids))
        for start, end, encoding in self._pieces.encode(text, at):
            found = self._cuts(encoding, text[start:end])
            cuts += tuple((start + place, len(ids) + i) for place, i in found)
            ids += encoding.ids
            if most is not None and len(ids) > most and len(text) - end > COUNTED:
                raise TooManyTokens(len(ids))
        self._remember(_Known(text, ids, cuts), owner)
        return list(ids)

    def check(self, text: str, most: int | None, at: int = 0, n_ids: int = 0) -> None:
        """Refuse a long text that has too many tokens however it is encoded.

        Args:
            text: any.
            most: the tokens that it may have.
            at: up to where it is encoded.
            n_ids: tokens of that.

        Raises:
            TooManyTokens: it has more.
        """
        n_chars = len(text) - at
        if most is None or n_chars <= max(COUNTED, most):
            return
        if (least := n_ids + self._least.of(text[at:])) > most:
            raise TooManyTokens(least)

    def _remember(self, known: _Known, owner: str) -> None:
        before = self._known
        others = [each for each in before.get(owner, ()) if not known.text.startswith(each.text)]
        kept, n_chars = [], 0
        for each in [known, *others][:MAX_TEXTS]:
            n_chars += len(each.text)
            if n_chars > MAX_CHARS:
                break
            kept.append(each)
        owners = [each for each in before if each != owner][1 - MAX_OWNERS :]
        self._known = {**{each: before[each] for each in owners}, owner: tuple(kept)}

    def _last_cut(
        self, known: _Known | None, text: str
    ) -> tuple[int, int, tuple[tuple[int, int], ...]]:
        """Where the rest of a text begins, in characters and ids, and the cuts before that."""
        if known is None:
            return 0, 0, ()
        equal = _n_equal(known.text, text)
        for i in range(len(known.cuts) - 1, -1, -1):
            at, n_ids = known.cuts[i]
            if at + len(self._added[known.ids[n_ids]].content) <= equal:
                return at, n_ids, known.cuts[:i]
        return 0, 0, ()

    def _cuts(self, encoding: Encoding, text: str) -> Iterator[tuple[int, int]]:
        """(characters, ids) before each special token that a text can be cut at."""
        ids = encoding.ids
        places = [i for i, token in enumerate(ids) if token in self._added]
        offsets = encoding.offsets if places else []
        for i in places:
            start, content = offsets[i][0], self._added[ids[i]].content
            if self._cuts_at(ids[i]) and text.startswith(content, start):
                yield start, i

    def _cuts_at(self, token: int) -> bool:
        """Whether this token, wherever its text is, begins there and takes nothing before it."""
        if token not in self._is_cut:
            added = self._added[token]
            is_plain = added.special and not (added.normalized or added.lstrip or added.single_word)
            mine = added.content
            others = [other.content for i, other in self._added.items() if i != token]
            self._is_cut[token] = is_plain and not any(_may_cover(c, mine) for c in others)
        return self._is_cut[token]


def _may_cover(other: str, content: str) -> bool:
    """Whether a token may begin before `content` and reach into it, or begin like it."""
    if content in other:
        return True
    return any(content.startswith(other[k:]) for k in range(1, len(other)))


def _n_equal(a: str, b: str) -> int:
    """Leading characters that two texts share."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a.startswith(b[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low
