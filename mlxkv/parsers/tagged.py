"""Formats that mark reasoning and calls with a pair of markers in otherwise plain text.

Decisions:
- In reasoning only its closing marker counts: models think aloud about markers, and draft calls.
  What stands behind a call's opening marker there is held back: if the output ends, and the
  reasoning did not, or nothing came behind it, it is a call. Where that marker is no token of its
  own, the call has to be sound, of a function that the model was told of, and the last thing.
- A marker that opens a call and is followed by what cannot be one is content.
- A call that the output ends in is given as far as it came, with `error` set, if the function's
  name is there; without a name its text is content. A call that lacks nothing but its closing
  marker is sound, where the notation shows that nothing else is missing; what follows is content.
- The next call's opening marker ends a call as well, and a second closing marker is markup.
- A marker inside a string of the call's arguments belongs to the string, also where it is the token
  itself. Where that string turns out never to end, the first such marker was the end after all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlxkv.parsers.events import Content, Reasoning, ToolCall
from mlxkv.parsers.lexer import Lexer, Piece
from mlxkv.parsers.notations.tools import Found, Tools
from mlxkv.parsers.piece_parser import PieceParser
from mlxkv.parsers.syntax import Call, Held, Syntax
from mlxkv.parsers.writer import Writer

# No name of a function is longer; behind it nothing is plausible or not.
_UNDECIDED_CHARS = 256


@dataclass(slots=True)
class _State:
    """Where the output is.

    Args:
        reasoning: between the markers of reasoning.
        label: start of the reasoning's label, None once it is read.
        call: the call that is being written.
        begun: the answer has begun with text, so that it is no bare call.
        fenced: the last marker, which opens calls and closes them, opened something else.
        called: nothing but white space has come since a call.
        held: the end of the reasoning, which may be a call.
    """

    reasoning: bool = False
    label: str | None = None
    call: Call | None = None
    begun: bool = False
    fenced: bool = False
    called: bool = False
    held: Held | None = None


class TaggedParser(PieceParser):
    """Reads one answer in such a format.

    Args:
        syntax: the format.
        ids: id -> marker, for the markers that are tokens.
        tools: what the model was told of.
        in_reasoning: the prompt has opened the reasoning already.
        behind_reasoning: it has closed it as well.
    """

    def __init__(
        self,
        syntax: Syntax,
        ids: Mapping[int, str] | None = None,
        tools: Tools | None = None,
        *,
        in_reasoning: bool = False,
        behind_reasoning: bool = False,
    ):
        super().__init__(Lexer(syntax.markers, ids), Writer(behind_markup=behind_reasoning))
        self.markers = syntax.markers | syntax.inner
        self._syntax = syntax
        self._tools = tools or Tools()
        self._state = _State(reasoning=in_reasoning)

    def _end(self) -> None:
        if self._state.held is not None:
            self._end_held(self._state.held)
        self._end_calls()
        if self._state.label is not None:
            self._writer.text(Reasoning, self._state.label)

    def _piece(self, piece: Piece) -> None:
        if self._state.call is not None:
            self._in_call(piece, self._state.call)
        elif self._state.held is not None:
            self._hold(piece, self._state.held)
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
                state.call = Call(syntax.notation, [piece], marked=piece.text != syntax.begins)
                return
            if piece.text in syntax.silent or self._is_spare_end(piece):
                self._writer.markup(piece.text)
                return
            state.fenced = False
        elif syntax.bare and self._tools.names and not state.begun:
            state.call = Call(syntax.bare, [], bare=True, marked=False)
            self._in_call(piece, state.call)
            return
        self._content(piece.text)

    def _opens_call(self, text: str) -> bool:
        if self._syntax.call is None or self._state.fenced:
            return False
        if text == self._syntax.begins:
            return bool(self._tools.names)
        if text != self._syntax.call[0]:
            return False
        return not self._syntax.known_only or bool(self._tools.names)

    def _is_spare_end(self, piece: Piece) -> bool:
        """Whether this is a call's closing marker, and no call has begun."""
        opens, closes = self._syntax.call or (None, None)
        return piece.text == closes != opens and (piece.sure or self._state.called)

    def _content(self, text: str) -> None:
        if text.strip():
            self._state.begun, self._state.called = True, False
        self._writer.text(Content, text)

    def _in_reasoning(self, piece: Piece) -> None:
        opens, closes = self._syntax.call or (None, None)
        if piece.marker and piece.text == opens != closes:
            self._state.held = Held([piece])
        else:
            self._reasoning(piece)

    def _reasoning(self, piece: Piece) -> None:
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

    def _hold(self, piece: Piece, held: Held) -> None:
        """More behind a call's opening marker in the reasoning."""
        assert self._syntax.think is not None
        is_shown = piece.marker or bool(piece.text.strip())
        if is_shown and held.thought:
            self._release(held)
            self._piece(piece)
            return
        held.pieces.append(piece)
        if piece.marker:
            held.thought = piece.text == self._syntax.think[1]
            held.ended |= self._syntax.call is not None and piece.text == self._syntax.call[1]
        elif is_shown and not self._may_be_call(held):
            self._release(held)

    def _may_be_call(self, held: Held) -> bool:
        notation = self._syntax.notation
        if held.ended:
            return held.is_sure
        if notation is None or len(held.pieces) > _UNDECIDED_CHARS:
            return True
        body = "".join(piece.text for piece in held.pieces[1:])
        return len(body) > _UNDECIDED_CHARS or notation.possible(body)

    def _release(self, held: Held) -> None:
        """What is held is reasoning."""
        self._state.held = None
        for piece in held.pieces:
            if self._state.reasoning:
                self._reasoning(piece)
            else:
                self._in_content(piece)

    def _end_held(self, held: Held) -> None:
        """The output ends behind the beginning of a call in the reasoning."""
        assert self._syntax.think is not None
        closing = self._syntax.think[1]
        trial = TaggedParser(self._syntax, None, self._tools)
        for piece in held.pieces:
            if not (piece.marker and piece.text == closing):
                trial._piece(piece)
        events = [*trial._writer.take(), *trial.finish()]
        calls = [event for event in events if isinstance(event, ToolCall)]
        if not held.is_sure:
            known = all(call.error is None and call.name in self._tools.names for call in calls)
            calls = calls if known and not any(isinstance(e, Content) for e in events) else []
        if not calls:
            self._release(held)
            return
        state = self._state
        if state.label is not None:
            self._writer.text(Reasoning, self._after_label(state.label, "", True))
        state.held, state.reasoning, state.begun = None, False, True
        for piece in held.pieces:
            if piece.marker and piece.text == closing:
                self._end_calls()
                self._writer.markup(closing)
            else:
                self._piece(piece)

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

    def _in_call(self, piece: Piece, call: Call) -> None:
        if piece.marker and piece.text in self._ends(call):
            if not call.notation.inside_string(call.body()):
                self._close(piece, call)
                return
            if call.doubtful is None:
                call.doubtful = len(call.pieces)
        call.pieces.append(piece)
        call.n_chars += len(piece.text)
        if call.n_chars <= _UNDECIDED_CHARS and not call.notation.possible(call.body()):
            self._no_call(call)

    def _ends(self, call: Call) -> set[str]:
        """Markers that end a call where they are in no string."""
        opens, closes = self._syntax.call or ("", None)
        if closes and not call.bare:
            return {opens, closes, *self._syntax.silent}
        think = self._syntax.think[:1] if call.bare and self._syntax.think else ()
        return {opens, *self._syntax.silent, *think}

    def _is_own_end(self, piece: Piece, call: Call) -> bool:
        return (
            self._syntax.call is not None and piece.text == self._syntax.call[1] and not call.bare
        )

    def _close(self, piece: Piece, call: Call) -> None:
        """A marker ends the call: its own, or one that begins something else."""
        own = self._is_own_end(piece, call)
        stop = len(call.pieces)
        if own:
            call.pieces.append(piece)
        if not self._settle(call, stop, closed=True):
            self._state.call = None
            self._put_text(call)
        if not own:
            self._piece(piece)

    def _put_text(self, call: Call) -> None:
        """There is no call between the markers."""
        is_blank = not call.body().strip()
        if is_blank and call.marked and call.pieces[0].sure:
            self._writer.markup("".join(piece.text for piece in call.pieces))
            return
        self._writer.text(Content, "".join(piece.text for piece in call.pieces))
        self._state.begun = self._state.begun or not is_blank

    def _settle(self, call: Call, stop: int, closed: bool) -> bool:
        """Give the calls that the pieces are, and read anew what is behind them.

        Args:
            call: what has come.
            stop: index of the closing marker; past the pieces where it is none of the call's own.
            closed: whether a marker has ended it.

        Returns:
            Whether there are calls.
        """
        body = call.body(stop)
        length = len(body)
        if stop == len(call.pieces):
            length = call.notation.length(body)
            length = length if body[length:].strip() else len(body)
        found, rest = self._found(call, body[:length], closed), call.rest(length, stop)
        if found and found[-1].error and not closed:
            error = f"the call is cut off ({found[-1].error})"
            found[-1] = dataclasses.replace(found[-1], error=error)
        if call.doubtful is not None and not (found and found[-1].error is None):
            earlier, behind = self._found_before(call, call.doubtful)
            found, rest = (earlier, behind) if earlier else (found, rest)
        if not found:
            return False
        n_rest = sum(len(piece.text) for piece in rest)
        text = "".join(piece.text for piece in call.pieces)
        self._put_calls(found, text[: len(text) - n_rest])
        for piece in rest:
            self._piece(piece)
        return True

    def _found_before(self, call: Call, marker: int) -> tuple[list[Found], list[Piece]]:
        """The calls before a marker that seemed to be in a string, and what is behind them.

        What is missing at their end is taken for missing only where another call follows, or
        nothing: the string might have gone on.
        """
        rest = call.pieces[marker + self._is_own_end(call.pieces[marker], call) :]
        shown = next((p for p in rest if p.marker or p.text.strip()), None)
        opens = self._syntax.call[0] if self._syntax.call else None
        closed = shown is None or (shown.marker and shown.text == opens)
        return self._found(call, call.body(marker), closed), rest

    def _found(self, call: Call, body: str, closed: bool) -> list[Found]:
        found = call.notation.parse(body, self._tools, closed)
        found = [dataclasses.replace(e, name=self._tools.name_of(e.name)) for e in found]
        if call.bare or not call.marked or self._syntax.known_only:
            known = self._tools.names
            return found if all(each.name in known for each in found) else []
        return found

    def _put_calls(self, found: list[Found], text: str) -> None:
        calls = []
        for each in found:
            call = ToolCall("" if calls else text, each.name, each.arguments, error=each.error)
            calls.append(dataclasses.replace(call, id=each.id) if each.id else call)
        self._writer.calls(calls)
        self._state.call, self._state.begun, self._state.called = None, True, True

    def _no_call(self, call: Call) -> None:
        """The opening marker was text, or there was none; what follows is read anew."""
        self._state.call = None
        first, *rest = call.pieces
        self._state.fenced = first.marker and first.text == (self._syntax.call or ("", ""))[1]
        self._state.begun = True
        self._content(first.text)
        for piece in rest:
            self._piece(piece)

    def _cut_off(self, call: Call) -> None:
        """The output ends inside a call."""
        if not self._settle(call, len(call.pieces), closed=False):
            if call.pieces:
                self._no_call(call)
            self._state.call = None if self._state.call is call else self._state.call

    def _end_calls(self) -> None:
        while self._state.call is not None:
            self._cut_off(self._state.call)
