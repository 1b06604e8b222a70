"""Collects events; the white space around reasoning and calls becomes markup."""

from __future__ import annotations

from mlxkv.parsers.events import Content, Event, Markup, Reasoning, ToolCall

SPACE = " \t\r\n"


class Writer:
    """Events in order, with the edges of content and reasoning trimmed.

    White space at an edge is held until it is known what it is:

    - Before any text it is text, so that an answer may begin with an indented line. Behind
      reasoning line breaks are markup and blanks are text, behind a call all of it is markup.
    - At the end of a stretch it is markup, at the very end of an output text.
    - Around reasoning all of it is markup.

    Args:
        behind_markup: the prompt has ended in reasoning that is closed.
    """

    def __init__(self, *, behind_markup: bool = False) -> None:
        self._events: list[Event] = []
        self._space = ""
        self._kind: type[Content] | type[Reasoning] | None = None
        self._begun = False
        self._behind_markup, self._behind_call = behind_markup, False

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def text(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        """More content or reasoning."""
        if kind is not self._kind:
            self.edge()
            self._kind, self._begun = kind, False
        text = self._space + text
        if not self._begun:
            rest = text.lstrip(SPACE)
            if not rest:
                self._space = text
                return
            n_markup = self._n_markup(kind, text[: len(text) - len(rest)])
            self._put(Markup, text[:n_markup])
            text, self._begun, self._behind_call = text[n_markup:], True, False
        shown = text.rstrip(SPACE)
        self._space = text[len(shown) :]
        self._put(kind, shown)

    def edge(self) -> None:
        """The stretch of text ends here."""
        self._put(Markup, self._space)
        self._space, self._kind = "", None

    def markup(self, text: str) -> None:
        """Text of the format."""
        self.edge()
        self._put(Markup, text)

    def inside(self, text: str) -> None:
        """Text of the format in the middle of a stretch, whose white space before it stays."""
        if self._kind is not None:
            self._put(self._kind, self._space)
            self._space = ""
        self._put(Markup, text)

    def calls(self, calls: list[ToolCall]) -> None:
        """Calls between two stretches of text."""
        self.edge()
        self._events += calls
        self._behind_markup = self._behind_call = True

    def finish(self) -> None:
        """The output ends."""
        if self._kind is not None:
            is_text = self._begun or (self._kind is Content and not self._behind_markup)
            self._put(self._kind if is_text else Markup, self._space)
        self._space, self._kind = "", None

    def _n_markup(self, kind: type[Content] | type[Reasoning], space: str) -> int:
        """How much of the white space before a text is markup."""
        if kind is Reasoning or self._behind_call:
            return len(space)
        return space.rfind("\n") + 1 if self._behind_markup else 0

    def _put(self, kind: type[Content] | type[Reasoning] | type[Markup], text: str) -> None:
        if text:
            self._events.append(kind(text))
            self._behind_markup = True
