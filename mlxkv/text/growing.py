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

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

LEAST = 4096
"""Characters of a text that is remembered: a shorter one is encoded in a few milliseconds."""
MAX_TEXTS = 8
"""Texts of an owner that are remembered."""
MAX_OWNERS = 16
"""Owners whose texts are remembered: those that came last."""


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
        self._added = backend.get_added_tokens_decoder()
        self._is_cut: dict[int, bool] = {}
        # Replaced as a whole: threads may share a tokenizer.
        self._known: dict[str, tuple[_Known, ...]] = {}

    def encode(self, text: str, owner: str = "") -> list[int]:
        """The ids of a text of an owner."""
        if len(text) < LEAST:
            return self._backend.encode(text, add_special_tokens=False).ids
        before = self._known
        mine = before.get(owner, ())
        best = max(mine, key=lambda known: _n_equal(known.text, text), default=None)
        at, n_ids, cuts = self._last_cut(best, text)
        encoding = self._backend.encode(text[at:], add_special_tokens=False)
        kept = [] if best is None else best.ids[:n_ids]
        ids = kept + encoding.ids
        cuts += tuple((at + start, n_ids + i) for start, i in self._cuts(encoding, text[at:]))
        others = [known for known in mine if not text.startswith(known.text)]
        kept_owners = [each for each in before if each != owner][1 - MAX_OWNERS :]
        self._known = {
            **{each: before[each] for each in kept_owners},
            owner: (_Known(text, ids, cuts), *others)[:MAX_TEXTS],
        }
        return list(ids)

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
