"""Values as models really write them: between JSON, Python and Gemma's notation.

What is repaired has one reading:

- Python's quotes, words and tuples of none; keys without quotes; a comma before the end;
- a line break in a string, `\\'` in one, backslashes that escape nothing (`\\d`) and stay;
- `}` and `]` that are missing or too many at the end, `=` for `:`;
- in Gemma's notation strings without quotes, with one of them, and a comma missing behind one.

Quotes within a string that are not escaped, a key with two values, or one missing quote with more
arguments behind it have several readings, and are errors.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from mlxkv.parsers.notations.values import LITERALS, Unreadable, no_key_twice, read_json

_QUOTED: Mapping[str, re.Pattern[str]] = {
    '"': re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL),
    "'": re.compile(r"'(?:[^'\\]|\\.)*'", re.DOTALL),
}
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_WORD = re.compile(r"[^\s,:{}\[\]()\"']+")
_KEY = re.compile(r"[^,:={}\[\]()\"'\n]+")
_NEXT_KEY = re.compile(r"\s*[\"']?([\w-]+(?:[ .]+[\w-]+)*)[\"']?\s*[:=](?!//)")
_SPARE = re.compile(r"[\s}\])]*")


class Bare(str):
    """A text that stands where a string would have quotes."""


def read_loosely(text: str) -> Any:
    """A value.

    Raises:
        Unreadable: it is none, or has several readings.
    """
    try:
        return read_json(text)
    except Unreadable:
        reader = Reader(text)
        value = reader.value()
        if not reader.is_done:
            raise Unreadable(f"not a value: {text.strip()[:20]!r}") from None
        return value


class Reader:
    """Reads the value that a text begins with.

    Args:
        text: what to read.
        quote: Gemma's token around strings, in which nothing is escaped; with it, strings may lack
            quotes, and are `Bare` then.
        closed: the text is known to be whole, so that what is missing at its end is missing.
        keys: names of the outermost object, where they are known.

    Attributes:
        at: where the value ends.
        mended: a bracket was missing, and the schema has to say whether it was that one.
    """

    def __init__(
        self,
        text: str,
        quote: str | None = None,
        *,
        closed: bool = True,
        keys: Collection[str] = (),
    ):
        self._text, self._quote, self._closed, self._keys = text, quote, closed, keys
        self._stack: list[str] = []
        self._glued = False
        self.at, self.mended = 0, False

    @property
    def is_done(self) -> bool:
        """Whether nothing follows but brackets too many."""
        return _SPARE.fullmatch(self._text, self.at) is not None

    def value(self) -> Any:
        """The value.

        Raises:
            Unreadable: there is none.
        """
        try:
            return self._value()
        except RecursionError:
            raise Unreadable("it nests too deeply") from None

    def object(self) -> dict[str, Any]:
        """The value, which is an object; its outer brackets may be round.

        Raises:
            Unreadable: it is something else.
        """
        self._skip()
        try:
            return self._object(")" if self._text.startswith("(", self.at) else "}")
        except RecursionError:
            raise Unreadable("it nests too deeply") from None

    def _value(self) -> Any:
        self._skip()
        self._glued = False
        if self._text.startswith("{", self.at):
            return self._object("}")
        if self._text.startswith("[", self.at):
            return self._array()
        string = self._string(",}])")
        if string is not None:
            return string
        return self._word() if self._quote is None else self._unquoted()

    def _object(self, closing: str) -> dict[str, Any]:
        self._expect("(" if closing == ")" else "{")
        self._stack.append(closing)
        pairs: list[tuple[str, Any]] = []
        while not self._ends(closing):
            if pairs and self._comma() and self._take(closing):
                break
            key = self._key()
            if not self._take("="):
                self._expect(":")
            pairs.append((key, self._value()))
        self._stack.pop()
        try:
            return no_key_twice(pairs)
        except ValueError as error:
            raise Unreadable(str(error)) from None

    def _array(self) -> list[Any]:
        self._expect("[")
        self._stack.append("]")
        found: list[Any] = []
        while not self._ends("]"):
            if found and self._comma() and self._take("]"):
                break
            found.append(self._value())
        self._stack.pop()
        return found

    def _ends(self, closing: str) -> bool:
        """Whether an object or a list ends here; its bracket may be missing."""
        if self._take(closing):
            self._glued = False
            return True
        is_end = self.at >= len(self._text)
        missing = self._closed if is_end else self._text[self.at] in self._stack
        self.mended |= missing
        return missing

    def _comma(self) -> bool:
        """Take a comma; Gemma's models leave it out between a string and the next key."""
        if self._take(","):
            return True
        found = _NEXT_KEY.match(self._text, self.at)
        is_outer = len(self._stack) == 1 and found is not None and found[1] in self._keys
        if not (self._glued and is_outer and self._is_paired()):
            raise self._wrong("','")
        return False

    def _is_paired(self) -> bool:
        """Whether no quote is missing."""
        return self._quote is None or self._text.count(self._quote) % 2 == 0

    def _word(self) -> Any:
        found = _WORD.match(self._text, self.at)
        if found is None:
            raise self._wrong("a value")
        if found[0] not in LITERALS and found[0][0] not in "-0123456789":
            raise self._wrong("a value")
        self.at = found.end()
        return LITERALS[found[0]] if found[0] in LITERALS else read_json(found[0])

    def _key(self) -> str:
        self._skip()
        key = self._string(":=")
        if key is None:
            found = _KEY.match(self._text, self.at)
            key = found[0].strip() if found else ""
            self.at = found.end() if found else self.at
        if not key:
            raise self._wrong("a key")
        return key

    def _string(self, ends: str) -> str | None:
        """A string in quotes, None where none begins.

        Args:
            ends: what may follow it.
        """
        if self._quote is not None and self._text.startswith(self._quote, self.at):
            return self._in_tokens()
        quote = self._text[self.at : self.at + 1]
        if not quote or quote not in _QUOTED:
            return None
        found = _QUOTED[quote].match(self._text, self.at)
        if found is not None and self._followed_by(ends, found.end()):
            self.at = found.end()
            return _unescaped(found[0])
        return self._half_quoted(quote, ends)

    def _in_tokens(self) -> str:
        """A string between two of Gemma's tokens, the second of which may be missing."""
        assert self._quote is not None
        start = self.at + len(self._quote)
        end = self._text.find(self._quote, start)
        self._glued = True
        if end >= 0:
            self.at = end + len(self._quote)
            return self._text[start:end]
        closers = "".join(reversed(self._stack))
        rest = self._text[start:].rstrip()
        text = rest[: len(rest) - len(closers)]
        several = _NEXT_KEY.search(text, text.find(",") + 1) if "," in text else None
        listed = self._stack[-1:] == ["]"] and "," in text
        marked = text[-1:] in tuple("}])\"'")
        if not (self._closed and rest.endswith(closers)) or several or listed or marked:
            raise Unreadable("a string does not end")
        self.at = start + len(text)
        return text

    def _half_quoted(self, quote: str, ends: str) -> str:
        """A string with apostrophes in words, or one that a token of Gemma's ends."""
        start = self.at + 1
        for found in re.finditer(rf"(?<!\\){quote}", self._text[start:]):
            end = start + found.start()
            if self._followed_by(ends, end + 1):
                self.at = end + 1
                return _unescaped(self._text[start - 1 : end + 1])
            around = self._text[end - 1 : end] + self._text[end + 1 : end + 2]
            if quote != "'" or len(around) < 2 or not around.isalnum():
                break
        end = -1 if self._quote is None else self._text.find(self._quote, start)
        if self._quote is None or end < 0 or quote in self._text[start:end]:
            raise Unreadable("a string does not end, or has quotes within")
        self.at = end + len(self._quote)
        if not self._followed_by(ends, self.at):
            raise Unreadable("a string does not end")
        return self._text[start:end]

    def _unquoted(self) -> Bare:
        """A text without quotes, up to the next key or the end of what it stands in."""
        found = _NEXT_KEY.match(self._text, self.at) if self._stack[-1:] == ["]"] else None
        if found is not None and (not self._keys or found[1] in self._keys):
            raise Unreadable(f"{found[1]!r} may be a key, or a part of a text without quotes")
        start, end = self.at, self._end_of_unquoted()
        text = self._text[start:end].strip()
        if not text:
            raise Unreadable("a value is missing")
        if end >= len(self._text) and not self._closed:
            raise Unreadable("a value does not end")
        self.at = end
        if self._quote is not None and self._text.startswith(self._quote, end):
            self.at = end + len(self._quote)
            if not self._followed_by(",}])", self.at):
                raise self._wrong("the end of a string")
        return Bare(text)

    def _end_of_unquoted(self) -> int:
        at, depth = self.at, 0
        while at < len(self._text):
            char = self._text[at]
            if self._quote is not None and self._text.startswith(self._quote, at):
                break
            if char == '"':
                at = self._text.find('"', at + 1)
                if at < 0:
                    raise Unreadable("a string does not end")
            elif char in "{[(":
                depth += 1
            elif char in "}])":
                if not depth and char in self._stack:
                    break
                depth = max(depth - 1, 0)
            elif char == "," and not depth and self._next_begins(at + 1):
                break
            at += 1
        if depth:
            raise Unreadable("a bracket does not close")
        return at

    def _next_begins(self, at: int) -> bool:
        """Whether the next item of a list or an object begins behind a comma."""
        if self._stack[-1:] == ["]"] or self._followed_by("}]),", at):
            return True
        if self._quote is not None and self._text[at:].lstrip().startswith(self._quote):
            return True
        found = _NEXT_KEY.match(self._text, at)
        if found is None:
            return False
        is_outer = len(self._stack) == 1 and bool(self._keys)
        if not is_outer or found[1] in self._keys:
            return " " not in found[1] or found[1] in self._keys
        if " " in found[1]:
            return False
        raise Unreadable(f"{found[1]!r} may be a key, or a part of a text without quotes")

    def _followed_by(self, chars: str, at: int) -> bool:
        """Whether the next character that is no white space is one of these, or the end."""
        rest = self._text[at : at + 200].lstrip() or self._text[at:].lstrip()
        return not rest or rest[0] in chars

    def _skip(self) -> None:
        while self.at < len(self._text) and self._text[self.at].isspace():
            self.at += 1

    def _take(self, char: str) -> bool:
        self._skip()
        found = self._text.startswith(char, self.at)
        self.at += found
        return found

    def _expect(self, char: str) -> None:
        if not self._take(char):
            raise self._wrong(repr(char))

    def _wrong(self, wanted: str) -> Unreadable:
        found = self._text[self.at : self.at + 10]
        return Unreadable(f"{wanted} expected at character {self.at}; found {found!r}")


def _unescaped(quoted: str) -> str:
    """The text of a string in quotes, by JSON's rules or by Python's."""
    inner = quoted[1:-1]
    try:
        if quoted[0] == '"':
            return json.loads(f'"{_escapes_of_json(inner)}"', strict=False)
        inner = re.sub(r"\\.|'", lambda m: r"\'" if m[0] == "'" else m[0], inner, flags=re.DOTALL)
        inner = inner.replace("\r", r"\r").replace("\n", r"\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # backslashes that escape nothing
            return ast.literal_eval(f"'{inner}'")
    except (ValueError, SyntaxError):
        raise Unreadable(f"a string has an escape that means nothing: {inner[:20]!r}") from None


def _escapes_of_json(inner: str) -> str:
    """A string's inside with no escapes but JSON's.

    Raises:
        ValueError: backslashes that escape and others that do not, so that both may be meant.
    """
    inner = _ESCAPE.sub(lambda m: "'" if m[1] == "'" else m[0], inner)
    escapes = set(_ESCAPE.findall(inner))
    if escapes <= set('"\\/bfnrtu'):
        return inner
    if escapes & set("\\/bfnrtu"):
        raise ValueError("escapes")
    return _ESCAPE.sub(lambda m: m[0] if m[1] == '"' else "\\" + m[0], inner)
