"""Text around lines that were taken out of it."""

from __future__ import annotations

from collections.abc import Sequence


def join_around(pieces: Sequence[str]) -> str:
    """The pieces of a text between lines that were taken out, as if those had never been there.

    Of the empty lines on either side of a place, the side with more keeps them; none stay where
    the text would begin or end with them.
    """
    made: list[str] = []
    gap, last = 0, len(pieces) - 1
    for i, piece in enumerate(pieces):
        body = piece.lstrip("\n") if i else piece
        gap = max(gap, len(piece) - len(body))
        n = len(body)
        body = body.rstrip("\n") if i < last else body
        if body:
            made += ["\n" * gap if made else "", body]
            gap = 0
        gap = max(gap, n - len(body))
    return "".join(made)
