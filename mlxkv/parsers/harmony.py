"""Harmony, the format of GPT-OSS: an answer is a row of messages.

    <|start|>assistant<|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>

The prompt ends with `<|start|>assistant`. The recipient stands before or after the channel, and
makes a message of any channel a call. The channel `analysis` is reasoning; `final`, `commentary`
without a recipient (what the model says before it calls) and any other are content. Facts:
https://cookbook.openai.com/articles/openai-harmony

Models forget `<|start|>`, `<|end|>` and `<|message|>`: a message ends where the next one begins,
and a header where something stands that is none. A header that the output ends in shows nothing. A
call that it ends in is given as far as it came, with `error` set; one that lacks nothing but its
end is sound. Text where a header should be is content.

The format's own tools (`python`, `browser.search`) are called without `functions.`; where the
request has no such tool the call has an `error`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mlxkv.chat.gpt_oss.harmony_tokens import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from mlxkv.parsers.events import Content, Reasoning, ToolCall
from mlxkv.parsers.lexer import Lexer, Piece
from mlxkv.parsers.notations.in_text import JsonCalls
from mlxkv.parsers.notations.values import Unreadable, read_object
from mlxkv.parsers.piece_parser import PieceParser
from mlxkv.parsers.writer import Writer

ENDS = frozenset({END, RETURN, CALL})
MARKERS = frozenset({START, CHANNEL, CONSTRAIN, MESSAGE}) | ENDS

_NAME = r"to=([^\s<]+)"
_RECIPIENT = re.compile(rf"\b{_NAME}")
_CHANNEL = re.compile(
    rf"{re.escape(CHANNEL)}\s*(?!to=)([\w-]+)|(?:assistant|\s)(analysis|commentary|final)\b"
)
# Before the first marker of a header: a role and perhaps a recipient, or the start of those.
_TO = r"to=\S*(?:\s+[a-z]{0,12}){0,2}"
_ROLE = re.compile(rf"\s*(?:[a-z]{{1,12}}(?:[ ](?:t|to|{_TO})?)?|[ ]?t?o?=?|{_TO})?\s*")
# The same with markers, up to that of the channel.
_AUTHOR = re.compile(
    rf"\s*(?:{re.escape(START)}\s*)?(?:assistant[a-z]{{0,10}}|(?!assistant)[\w.:/-]*)"
    rf"(?:\s+(?:t|to|{_TO}))?(?:\s+[a-z]{{0,12}})?(?:\s*{re.escape(CONSTRAIN)}[^<]*)?\s*"
)
_KIND = rf"(?:\s*{re.escape(CONSTRAIN)}\s*[\w/+.-]*|\s+(?:json|code)\b)?"
# What of a text is a header, where the marker behind it is missing.
_HEADER = re.compile(
    rf"\s*(?:{re.escape(START)}\s*(?:assistant)?|assistant\b)?(?:\s*{_NAME})?"
    rf"(?:\s*{re.escape(CHANNEL)}\s*(?:analysis|commentary|final)\b)?"
    rf"(?:\s+{_NAME}{_KIND})?"
)
_WORD = re.compile(r"[a-z][\w/+.-]*")
_PEOPLE = frozenset({"assistant", "user", "all"})


@dataclass(slots=True)
class _Message:
    """The message that is being written.

    Args:
        kind: of text that goes out as it comes, or None for a call.
        name: the function that is called.
        pieces: header and arguments of a call.
        n_header: how many of the pieces are the header.
        loose: text that stands where a header should be, up to the next start.
        is_function: the call is one in the name space of the request's tools.
    """

    kind: type[Content] | type[Reasoning] | None
    name: str = ""
    pieces: list[Piece] = field(default_factory=list)
    n_header: int = 0
    loose: bool = False
    is_function: bool = False

    @property
    def body(self) -> str:
        """Arguments of a call, as far as they came."""
        return "".join(piece.text for piece in self.pieces[self.n_header :])


class HarmonyParser(PieceParser):
    """Reads one answer.

    Args:
        ids: id -> marker.
        prompt: what the model answers to; its end says where in a message the answer begins.
        functions: names of the tools that the model was told of; None where that is not known.
    """

    def __init__(
        self,
        ids: Mapping[int, str] | None = None,
        *,
        prompt: str = START,
        functions: Collection[str] | None = None,
    ):
        super().__init__(Lexer(MARKERS, ids), Writer(behind_markup=True))
        self.markers = MARKERS
        self._functions = functions
        self._header: list[Piece] | None = []
        self._message: _Message | None = None
        # What the prompt holds of the header.
        self._before = ""
        tail = prompt[prompt.rfind(START) :] if START in prompt else ""
        header, opened, body = tail.partition(MESSAGE)
        if opened and not any(end in body for end in ENDS):
            self._message, self._header = _message(header + opened, []), None
        elif not opened:
            self._before = header

    def _end(self) -> None:
        if self._message is not None and self._message.kind is None:
            self._end_call(self._message, cut_off=True)
        elif self._header:
            self._end_header(self._header, cut_off=True)

    def _piece(self, piece: Piece) -> None:
        if self._message is not None:
            self._in_message(piece, self._message)
        elif self._header is not None:
            self._in_header(piece, self._header)
        elif piece.marker and piece.text in (START, CHANNEL, MESSAGE):
            self._header, self._before = [], ""
            self._in_header(piece, self._header)
        else:
            self._between(piece)

    def _in_header(self, piece: Piece, header: list[Piece]) -> None:
        if piece.marker and piece.text in ENDS:
            self._header = None
            self._end_header(header)
            self._piece(piece)
            return
        if piece.marker and piece.text == START:  # what came before it was none
            if header:
                self._writer.markup("".join(each.text for each in header))
            header.clear()
            self._before = ""
        header.append(piece)
        text = self._before + "".join(each.text for each in header)
        if piece.marker and piece.text == MESSAGE:
            self._header = None
            self._message = _message(text, header)
            if self._message.kind is not None:
                self._writer.markup("".join(each.text for each in header))
        elif not _plausible(header):
            self._header = None
            self._without_marker(text)

    def _end_header(self, header: list[Piece], cut_off: bool = False) -> None:
        """Something ends in its header: a message without its marker, an answer, or nothing."""
        text = "".join(piece.text for piece in header)
        if not cut_off and CHANNEL in text:
            self._without_marker(self._before + text)
        elif _is_cut(header, self._before):
            self._writer.markup(text)
        else:
            self._writer.text(Content, text)

    def _without_marker(self, text: str) -> None:
        """A header that has no end, what the prompt holds of it included: go on behind it."""
        found = _HEADER.match(text)
        n_header = max(found.end() if found else 0, len(self._before))
        n_header = len(text) - len(text[n_header:].lstrip())
        head, body = text[len(self._before) : n_header], text[n_header:]
        message = self._message = _message(text[:n_header], [Piece(head)])
        message.loose = True
        if message.kind is None:
            message.pieces.append(Piece(body))
            return
        if head:
            self._writer.markup(head)
        self._writer.text(message.kind, body)

    def _in_message(self, piece: Piece, message: _Message) -> None:
        begins = piece.marker and piece.sure and piece.text in (START, CHANNEL)
        begins = begins or (message.loose and piece.marker and piece.text == START)
        ends = piece.marker and piece.text in ENDS
        if ends and message.kind is None and not piece.sure:
            ends = not JsonCalls().inside_string(message.body)
        if not begins and not ends:
            if message.kind is None:
                message.pieces.append(piece)
            elif piece.sure:  # a marker that has no meaning here
                self._writer.inside(piece.text)
            else:
                self._writer.text(message.kind, piece.text)
            return
        self._message = None
        if message.kind is None:
            if ends:
                message.pieces.append(piece)
            self._end_call(message, n_end=int(ends))
        elif ends:
            self._writer.markup(piece.text)
        if begins:  # the model forgot the end
            self._writer.edge()
            self._piece(piece)

    def _between(self, piece: Piece) -> None:
        """Behind the end of a message; the next one has not begun."""
        if piece.marker or not piece.text.strip():
            self._writer.markup(piece.text)
        else:  # perhaps a role, and only the start is missing
            self._header, self._before = [], ""
            self._in_header(piece, self._header)

    def _end_call(self, message: _Message, *, n_end: int = 0, cut_off: bool = False) -> None:
        text = "".join(piece.text for piece in message.pieces)
        last = len(message.pieces) - n_end
        body = "".join(piece.text for piece in message.pieces[message.n_header : last])
        if message.name == "python" and not body.lstrip().startswith("{"):
            arguments, error = {"code": body}, None  # that tool's input is code, not JSON
        else:
            arguments, error = _arguments(body)
            if cut_off and not body.strip():
                error = "there are no arguments"
        if error and cut_off:
            error = f"the call is cut off ({error})"
        if error is None and not self._is_known(message):
            error = f"{message.name} is none of the tools of this request"
            arguments = {}
        self._writer.calls([ToolCall(text, message.name, arguments, error=error)])

    def _is_known(self, message: _Message) -> bool:
        """Whether a call is for a tool of the request, as far as they are known."""
        return self._functions is None or message.is_function or message.name in self._functions


def _arguments(body: str) -> tuple[dict[str, object], str | None]:
    try:
        return read_object(body), None
    except Unreadable as error:
        return {}, str(error)


def _message(header: str, pieces: list[Piece]) -> _Message:
    """What kind of message a header announces."""
    recipient = _RECIPIENT.search(header)
    if recipient and recipient[1] not in _PEOPLE:
        name = recipient[1].removeprefix("functions.")
        return _Message(None, name, list(pieces), len(pieces), is_function=name != recipient[1])
    channel = _CHANNEL.search(header)
    return _Message(Reasoning if channel and "analysis" in channel.groups() else Content)


def _plausible(header: list[Piece]) -> bool:
    """Whether this can be the start of a header."""
    text = "".join(piece.text for piece in header)
    if not any(piece.marker for piece in header):
        return _ROLE.fullmatch(text) is not None
    if len(text) >= 400 or "\n\n" in text:
        return False
    author, has_channel, rest = text.partition(CHANNEL)
    if not has_channel:
        return _AUTHOR.fullmatch(author) is not None
    words = rest.replace(CONSTRAIN, f" {CONSTRAIN}").replace(CHANNEL, " ").split()
    if words and "to=".startswith(words[-1]):
        words.pop()
    words = [word for word in words if not word.startswith((CONSTRAIN, "to="))]
    # Channels and a content type; behind the constraint's marker may stand a blank.
    n_words = text.count(CHANNEL) + (2 if CONSTRAIN in text else 1)
    return len(words) <= n_words and all(_WORD.fullmatch(word) for word in words)


def _is_cut(header: list[Piece], before: str) -> bool:
    """Whether the text that the output ends in is a header, and not an answer without one."""
    if any(piece.marker for piece in header):
        return True
    text = "".join(piece.text for piece in header)
    if re.match(r"\s+to?$|\s*to=", text):
        return True
    text = text.strip()
    has_role = before.removeprefix(START) != ""
    return not has_role and ("assistant".startswith(text) or text.startswith("assistant"))
