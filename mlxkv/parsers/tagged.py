"""Formats that mark reasoning and calls with a pair of markers in otherwise plain text.

Decisions:
- In reasoning only its closing marker counts: models think aloud about markers.
- A marker that opens a call and is followed by what cannot be one is content.
- A call that the output ends in is given as far as it came, with `error` set, if the function's
  name is there; without a name its text is content. A call that lacks nothing but its closing
  marker is sound, where the notation shows that nothing else is missing.
- A closing marker inside a string of the call's arguments belongs to the string. Where that string
  turns out never to end, the first such marker was the end after all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlxkv.parsers.calls import Found, Notation, Tools
from mlxkv.parsers.events import Content, Event, Reasoning, ToolCall
from mlxkv.parsers.lexer import Lexer, Piece
from mlxkv.parsers.writer import Writer

# No name of a function is longer; behind it nothing is plausible or not.
_UNDECIDED_CHARS = 256


@dataclass(frozen=True, slots=True)
class Syntax:
    """One such format.

    Args:
        think: opening and closing marker of reasoning.
        labelled: a word on a line of its own follows the opening marker of reasoning.
        call: opening and closing marker of a call; without a closing one it goes on to the next
            call or the end.
        notation: what is between them.
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
    bare: Notation | None = None
    known_only: bool = False
    silent: frozenset[str] = frozenset()
    inner: frozenset[str] = frozenset()

    @property
    def markers(self) -> frozenset[str]:
        """All of them."""
        pair = (*(self.think or ()), *(self.call or ()))
        return self.silent | {marker for marker in pair if marker}


@dataclass(slots=True)
class _Call:
    """A call that is being written.

    Args:
        notation: how.
        pieces: its opening marker, if it has one, and what came since.
        bare: it has no markers.
        n_chars: length of the pieces.
        doubtful: index of the first closing marker that seemed to be in a string.
    """

    notation: Notation
    pieces: list[Piece]
    bare: bool
    n_chars: int = 0
    doubtful: int | None = None

    def body(self, stop: int | None = None) -> str:
        """The text after the opening marker, up to a piece."""
        return "".join(piece.text for piece in self.pieces[0 if self.bare else 1 : stop])


@dataclass(slots=True)
class _State:
    """Where the output is.

    Args:
        reasoning: between the markers of reasoning.
        label: start of the reasoning's label, None once it is read.
        call: the call that is being written.
        begun: the answer has begun with text, so that it is no bare call.
        fenced: the last marker, which opens calls and closes them, opened something else.
    """

    reasoning: bool = False
    label: str | None = None
    call: _Call | None = None
    begun: bool = False
    fenced: bool = False


class TaggedParser:
    """Reads one answer in such a format.

    Args:
        syntax: the format.
        ids: id -> marker, for the markers that are tokens.
        tools: what the model was told of.
        in_reasoning: the prompt has opened the reasoning already.
    """

    def __init__(
        self,
        syntax: Syntax,
        ids: Mapping[int, str] | None = None,
        tools: Tools | None = None,
        *,
        in_reasoning: bool = False,
    ):
        self.markers = syntax.markers | syntax.inner
        self._syntax = syntax
        self._tools = tools or Tools()
        self._lexer = Lexer(syntax.markers, ids)
        self._writer = Writer()
        self._state = _State(reasoning=in_reasoning)

    def add(self, text: str, token: int | None = None) -> list[Event]:
        """See `OutputParser.add`."""
        for piece in self._lexer.add(text, token):
            self._piece(piece)
        return self._writer.take()

    def finish(self) -> list[Event]:
        """See `OutputParser.finish`."""
        for piece in self._lexer.finish():
            self._piece(piece)
        while self._state.call is not None:
            self._cut_off(self._state.call)
        if self._state.label is not None:
            self._writer.text(Reasoning, self._state.label)
        self._writer.finish()
        return self._writer.take()

    def _piece(self, piece: Piece) -> None:
        if self._state.call is not None:
            self._in_call(piece, self._state.call)
        elif self._state.reasoning:
            self._in_reasoning(piece)
        else:
            self._in_content(piece)

    def _in_content(self, piece: Piece) -> None:
        syntax, state = self._syntax, self._state
        if piece.marker:
            if syntax.think and piece.text == syntax.think[0]:
                self._writer.markup(piece.text)
                state.reasoning, state.label = True, "" if syntax.labelled else None
                return
            if syntax.notation and self._opens_call(piece.text):
                state.call = _Call(syntax.notation, [piece], bare=False)
                return
            if piece.text in syntax.silent:
                self._writer.markup(piece.text)
                return
            state.fenced = False
        elif syntax.bare and self._tools.names and not state.begun:
            state.call = _Call(syntax.bare, [], bare=True)
            self._in_call(piece, state.call)
            return
        self._content(piece.text)

    def _opens_call(self, text: str) -> bool:
        if self._syntax.call is None or text != self._syntax.call[0] or self._state.fenced:
            return False
        return not self._syntax.known_only or bool(self._tools.names)

    def _content(self, text: str) -> None:
        self._state.begun = self._state.begun or bool(text.strip())
        self._writer.text(Content, text)

    def _in_reasoning(self, piece: Piece) -> None:
        assert self._syntax.think is not None
        state = self._state
        closes = piece.marker and piece.text == self._syntax.think[1]
        if state.label is not None:
            piece = Piece(self._after_label(state.label, "" if closes else piece.text, closes))
        if closes:
            if piece.text != self._syntax.think[1]:
                self._writer.text(Reasoning, piece.text)
            self._writer.markup(self._syntax.think[1])
            state.reasoning, state.begun = False, False
        elif piece.text:
            self._writer.text(Reasoning, piece.text)

    def _after_label(self, label: str, text: str, ended: bool) -> str:
        """What of the text is reasoning; a label before it is markup."""
        label += text
        found = re.match(r"[A-Za-z_]+\n", label)
        if found or ended or not re.fullmatch(r"[A-Za-z_]*", label):
            self._state.label = None
            if found:
                self._writer.markup(found[0])
                return label[found.end() :]
            return label
        self._state.label = label
        return ""

    def _in_call(self, piece: Piece, call: _Call) -> None:
        opens, closes = self._syntax.call or ("", None)
        ends = {closes} if closes and not call.bare else {opens, *self._syntax.silent}
        if call.bare and self._syntax.think:
            ends.add(self._syntax.think[0])
        if piece.marker and piece.text in ends:
            if piece.sure or not call.notation.inside_string(call.body()):
                self._close(piece, call)
                return
            if call.doubtful is None:
                call.doubtful = len(call.pieces)
        call.pieces.append(piece)
        call.n_chars += len(piece.text)
        if call.n_chars <= _UNDECIDED_CHARS and not call.notation.possible(call.body()):
            self._no_call(call)

    def _close(self, piece: Piece, call: _Call) -> None:
        """A marker ends the call: its own, or one that begins something else."""
        own = self._syntax.call is not None and piece.text == self._syntax.call[1]
        if own and not call.bare:
            call.pieces.append(piece)
        found = self._found(call, call.body(-1 if own and not call.bare else None))
        if found:
            self._put_calls(found, call.pieces)
        else:
            self._writer.text(Content, "".join(each.text for each in call.pieces))
            self._state.begun = self._state.begun or bool(call.body().strip())
        self._state.call = None
        if not own or call.bare:
            self._piece(piece)

    def _found(self, call: _Call, body: str) -> list[Found]:
        found = call.notation.parse(body, self._tools)
        if call.bare or self._syntax.known_only:
            known = self._tools.names
            return found if all(each.name in known for each in found) else []
        return found

    def _put_calls(self, found: list[Found], pieces: list[Piece]) -> None:
        calls = []
        for each in found:
            text = "" if calls else "".join(piece.text for piece in pieces)
            call = ToolCall(text, each.name, each.arguments, error=each.error)
            calls.append(dataclasses.replace(call, id=each.id) if each.id else call)
        self._writer.calls(calls)
        self._state.call, self._state.begun = None, True

    def _no_call(self, call: _Call) -> None:
        """The opening marker was text, or there was none; what follows is read anew."""
        self._state.call = None
        first, *rest = call.pieces
        self._state.fenced = first.marker and first.text == (self._syntax.call or ("", ""))[1]
        self._state.begun = True
        self._content(first.text)
        for piece in rest:
            self._piece(piece)

    def _cut_off(self, call: _Call) -> None:
        """The output ends inside a call."""
        found = self._found(call, call.body())
        if call.doubtful is not None and not (found and found[-1].error is None):
            stop = call.doubtful
            found = self._found(call, call.body(stop))
            rest = call.pieces[stop + 1 :]
            if found:
                self._put_calls(found, call.pieces[: stop + 1])
                for piece in rest:
                    self._piece(piece)
                return
        if not found:
            if call.pieces:
                self._no_call(call)
            self._state.call = None if self._state.call is call else self._state.call
            return
        last = found[-1]
        if not last.error and not call.notation.shows_its_end:
            last = dataclasses.replace(last, error="its end is missing")
        if last.error:
            found[-1] = dataclasses.replace(last, error=f"the call is cut off ({last.error})")
        self._put_calls(found, call.pieces)
