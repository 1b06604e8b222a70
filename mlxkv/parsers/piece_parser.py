"""A parser that reads an answer piece by piece."""

from __future__ import annotations

from mlxkv.parsers.events import Event
from mlxkv.parsers.lexer import Lexer, Piece
from mlxkv.parsers.writer import Writer


class PieceParser:
    """Cuts an answer into pieces, which a format's parser reads one after another."""

    def __init__(self, lexer: Lexer, writer: Writer):
        self._lexer, self._writer = lexer, writer

    def add(self, text: str, token: int | None = None) -> list[Event]:
        """See `OutputParser.add`."""
        for piece in self._lexer.add(text, token):
            self._piece(piece)
        return self._writer.take()

    def finish(self) -> list[Event]:
        """See `OutputParser.finish`."""
        for piece in self._lexer.finish():
            self._piece(piece)
        self._end()
        self._writer.finish()
        return self._writer.take()

    def _piece(self, piece: Piece) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Write what is held: no more comes."""
        raise NotImplementedError
