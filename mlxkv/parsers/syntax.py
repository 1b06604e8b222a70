"""What a format with markers is made of, and what of an answer waits for more."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkv.parsers.lexer import Piece
from mlxkv.parsers.notations.notation import Notation


@dataclass(frozen=True, slots=True)
class Syntax:
    """One such format.

    Args:
        think: opening and closing marker of reasoning.
        labelled: a word on a line of its own follows the opening marker of reasoning.
        call: opening and closing marker of a call; without a closing one it goes on to the next
            call or the end.
        notation: what is between them.
        begins: the text that a call's own notation begins with: where the opening marker was
            forgotten, a call of a function that the model was told of begins with it.
        bare: how a call looks that has no markers and is the whole answer. It counts only when the
            model was told of tools, and names one of them.
        known_only: calls between markers, too, count only if they name such a tool.
        silent: markers that close something and mean no more.
        inner: tokens within calls: text to the notation, which must not lack it.
    """

    think: tuple[str, str] | None = None
    labelled: bool = False
    call: tuple[str, str | None] | None = None
    notation: Notation | None = None
    begins: str | None = None
    bare: Notation | None = None
    known_only: bool = False
    silent: frozenset[str] = frozenset()
    inner: frozenset[str] = frozenset()

    @property
    def markers(self) -> frozenset[str]:
        """All of them."""
        pair = (*(self.think or ()), *(self.call or ()), self.begins)
        return self.silent | {marker for marker in pair if marker}


@dataclass(slots=True)
class Call:
    """A call that is being written.

    Args:
        notation: how.
        pieces: its opening marker, if it has one, and what came since.
        bare: it has no markers.
        marked: it has an opening marker.
        n_chars: length of the pieces.
        doubtful: index of the first marker that seemed to be in a string.
    """

    notation: Notation
    pieces: list[Piece]
    bare: bool = False
    marked: bool = True
    n_chars: int = 0
    doubtful: int | None = None

    def body(self, stop: int | None = None) -> str:
        """The text after the opening marker, up to a piece."""
        return "".join(piece.text for piece in self.pieces[int(self.marked) : stop])

    def rest(self, n_chars: int, stop: int) -> list[Piece]:
        """What the pieces up to one hold behind so many characters of the body."""
        rest = []
        for piece in self.pieces[int(self.marked) : stop]:
            if n_chars < len(piece.text):
                rest.append(Piece(piece.text[n_chars:], piece.marker and not n_chars, piece.sure))
            n_chars = max(n_chars - len(piece.text), 0)
        return rest


@dataclass(slots=True)
class Held:
    """What came in the reasoning since a call's opening marker.

    Args:
        pieces: that marker, and what came since.
        ended: a call's closing marker is among them.
        thought: the end of the reasoning is the last of them, but for white space.
    """

    pieces: list[Piece]
    ended: bool = False
    thought: bool = False

    @property
    def is_sure(self) -> bool:
        """Whether the opening marker is a token of its own."""
        return self.pieces[0].sure
