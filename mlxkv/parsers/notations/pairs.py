"""Calls whose arguments are pairs of tags around raw text: GLM's, and the XML of Qwen3-Coder.

What a value is, its text and its schema say together: see `Tools.read`. A value may hold such tags
itself. Where all of them come in pairs that is how they are read. Where one is missing, the next
key that the schema knows begins a new pair; if values then still hold tags, or a key comes twice,
there is more than one reading, and the call has an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlxkv.parsers.notations.notation import JsonCalls, arguments_of
from mlxkv.parsers.notations.tools import Found, Tools
from mlxkv.parsers.notations.values import Unreadable


@dataclass(frozen=True, slots=True)
class _Tags:
    """Tags of a pair.

    Args:
        opening: the key and all up to its value.
        last: what an opening ends with if nothing of it is missing.
        closing: behind the value.
        end: behind the last pair, if there is such a tag.
        stray: within a value, a closing tag and a key that lacks its opening.
        own_lines: a value stands on lines of its own.
    """

    opening: re.Pattern[str]
    last: str
    closing: str
    end: str = ""
    stray: re.Pattern[str] | None = None
    own_lines: bool = False

    def read(self, text: str, at: int, known: Sequence[str]) -> tuple[list[tuple[str, str]], int]:
        """Keys and texts of values, and where they end.

        Args:
            text: a body, or more.
            at: where the first pair may begin.
            known: the keys that there are; empty where that is not known.

        Raises:
            Unreadable: there is no single reading.
        """
        try:
            pairs, at = self.in_pairs(text, at)
        except Unreadable:
            pairs, at = self._one_by_one(text, at, known)
        values: dict[str, str] = {}
        for key, value in pairs:
            if values.setdefault(key, value) != value:
                raise Unreadable(f"the key {key[:40]!r} comes twice")
        for key, value in values.items():
            if self._is_damaged(value):
                raise Unreadable(f"a tag of {key[:40]!r} is missing or comes twice")
        return pairs, at

    def _is_damaged(self, value: str) -> bool:
        """Whether a value has a tag in it that looks like one of its own."""
        ends = (self.closing, self.closing[1:], self.closing[:-1])
        if value.startswith(self.last) or value.rstrip().endswith(ends):
            return True
        return self.stray is not None and self.stray.search(value) is not None

    def is_open(self, text: str, at: int) -> bool:
        """Whether a value has begun and not ended."""
        try:
            self.in_pairs(text, at)
        except Unreadable:
            return True
        return False

    def in_pairs(self, text: str, at: int) -> tuple[list[tuple[str, str]], int]:
        """As `read`, where no tag is missing."""
        pairs: list[tuple[str, str]] = []
        tags = re.compile(f"{re.escape(self.closing)}|{self.opening.pattern}")
        while opening := self.opening.match(text, _skip(text, at)):
            depth = 1
            for tag in tags.finditer(text, opening.end()):
                if tag[0] != self.closing:
                    depth += 1
                elif depth > 1:
                    depth -= 1
                elif self._may_follow(text, tag.end()):
                    pairs.append((_key(opening), text[opening.end() : tag.start()]))
                    at = tag.end()
                    break
            else:
                raise Unreadable(f"{self.closing} is missing")
        return pairs, at

    def _may_follow(self, text: str, at: int) -> bool:
        """Whether a pair may end here."""
        at = _skip(text, at)
        return (
            at == len(text)
            or self.opening.match(text, at) is not None
            or (bool(self.end) and text.startswith(self.end, at))
        )

    def _one_by_one(
        self, text: str, at: int, known: Sequence[str]
    ) -> tuple[list[tuple[str, str]], int]:
        """Each key that is known begins a pair; closing tags may be missing."""
        stop = text.find(self.end, at) if self.end else -1
        stop = len(text) if stop < 0 else stop
        found = [
            opening
            for opening in self.opening.finditer(text, at, stop)
            if not known or _key(opening) in known
        ]
        if not found or text[at : found[0].start()].strip():
            raise Unreadable(f"{self.closing} is missing, or a tag too many")
        pairs, n_missing, holds_tags = [], 0, False
        for opening, following in zip(found, [*found[1:], None], strict=True):
            value = text[opening.end() : following.start() if following else stop]
            trimmed = value.rstrip().removesuffix(self.closing)
            if trimmed == value.rstrip():
                n_missing += 1
                in_line = self.own_lines and following is not None and not value.endswith("\n")
                if in_line or not opening[0].endswith(self.last):
                    raise Unreadable(f"{self.closing} is missing")
                value = value.removesuffix("\n")
            else:
                value = trimmed
            holds_tags |= self.closing in value or self.opening.search(value) is not None
            pairs.append((_key(opening), value))
        if n_missing and holds_tags:
            raise Unreadable(f"{self.closing} is missing")
        return pairs, stop


def _key(opening: re.Match[str]) -> str:
    """A key, without quotes around it."""
    key = opening[1].strip()
    return key[1:-1] if len(key) > 2 and key[0] == key[-1] and key[0] in "\"'" else key


def _skip(text: str, at: int) -> int:
    """Where the white space that begins here ends."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _call(name: str, pairs: list[tuple[str, str]], tools: Tools) -> Found:
    known = tools.name_of(name)
    try:
        return Found(name, {key: tools.read(known, key, text) for key, text in pairs})
    except Unreadable as error:
        return Found(name, error=str(error))


class GlmCalls:
    """GLM-4.5 and later: a name, then `<arg_key>k</arg_key><arg_value>v</arg_value>` pairs."""

    _NAME = re.compile(r"\s*([\w.:/-]+)\s*")
    _TAGS = _Tags(
        re.compile(
            r"(?:<arg_key>\s*)+([^<>\n]{1,128})"
            r"(?:(?:\s*</arg_key>)+(?:\s*<arg_value>)?|<arg_value>)"
        ),
        "<arg_value>",
        "</arg_value>",
        stray=re.compile(r"</arg_value>\s*[^<>\n]{1,128}</arg_key>"),
    )

    def possible(self, body: str) -> bool:
        if body.lstrip()[:1] in ("{", "["):
            return True
        named = self._NAME.match(body)
        rest = body[named.end() :] if named else body.lstrip()
        if not rest or not named:
            return not rest
        opening, stray = "<arg_key>", "</arg_key>"
        if rest.startswith(stray) or stray.startswith(rest) or opening.startswith(rest):
            return True
        return (
            rest.startswith(opening) and "\n" not in rest[len(opening) :].strip().partition("<")[0]
        )

    def inside_string(self, body: str) -> bool:
        if body.lstrip()[:1] in ("{", "["):
            return JsonCalls().inside_string(body)
        named = self._NAME.match(body)
        return named is not None and self._TAGS.is_open(body, named.end())

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        if body.lstrip()[:1] in ("{", "["):
            return JsonCalls().parse(body, tools, closed)
        body = self._with_first_tag(body, tools)
        named = self._NAME.match(body)
        if named is None:
            return []
        name, rest = named[1], body[named.end() :]
        if closed and rest and not self._TAGS.opening.match(rest):
            return []  # words, and no call
        if not closed:
            return [Found(name, error="its end is missing")]
        try:
            pairs, end = self._TAGS.read(body, named.end(), tools.parameters(tools.name_of(name)))
        except Unreadable as error:
            return [Found(name, error=str(error))]
        if rest := body[end:].strip():
            return [Found(name, error=f"<arg_key> expected; found {rest[:20]!r}")]
        return [_call(name, pairs, tools)]

    def length(self, body: str) -> int:
        return len(body)

    def _with_first_tag(self, body: str, tools: Tools) -> str:
        """The body with its first `<arg_key>`, which models forget: the tools' names tell."""
        head = body.partition("</arg_key>")
        if not head[1] or "<" in head[0]:
            return body
        written = head[0].strip()
        fits = [
            (name, key)
            for name in tools.names
            if written.startswith(name)
            for key in [written[len(name) :].strip()]
            if key in tools.parameters(name)
        ]
        if len(fits) != 1:
            return body
        name, key = fits[0]
        return f"{name}<arg_key>{key}</arg_key>{head[2]}"


class XmlCalls:
    """Qwen3-Coder, Qwen3.5 and later, between `<tool_call>` and `</tool_call>`:

    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>
    """

    END = "</function>"
    _HEAD = re.compile(r"\s*<function=\s*[\"']?([\w.:/-]+)[\"']?\s*(?:>|(?=\n))")
    _START = re.compile(r"<function=[^<>\n]*(?:[>\n]\s*(?:[<{].*)?)?", re.DOTALL)
    _TAGS = _Tags(
        re.compile(r"<parameter=([^<>\n]{1,128})(?:>|(?=\n))"),
        ">",
        "</parameter>",
        END,
        stray=re.compile(r"\n</parameter>\n[^<>\n]{1,128}>\n|\n<\Z"),
        own_lines=True,
    )

    def possible(self, body: str) -> bool:
        start = body.lstrip()
        if start[:1] in ("{", "["):
            return JsonCalls().possible(body)
        return "<function=".startswith(start) or self._START.fullmatch(start) is not None

    def inside_string(self, body: str) -> bool:
        if body.lstrip()[:1] in ("{", "["):
            return JsonCalls().inside_string(body)
        named = self._HEAD.match(body)
        while named is not None:
            try:
                _, at = self._TAGS.in_pairs(body, named.end())
            except Unreadable:
                return True
            end = body.find(self.END, at)
            named = None if end < 0 else self._HEAD.match(body, end + len(self.END))
        return False

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        if body.lstrip()[:1] in ("{", "["):
            return JsonCalls().parse(body, tools, closed)
        found: list[Found] = []
        at = 0
        while named := self._HEAD.match(body, at):
            call, at = self._one(named, body, tools, closed)
            found.append(call)
            if call.error:
                return found
        rest = body[at:].strip()
        if found and "<" in rest:
            found[-1] = Found(found[-1].name, error=f"{self.END} expected; found {rest[:20]!r}")
        return found

    def length(self, body: str) -> int:
        end = body.rfind(self.END)
        return len(body) if end < 0 else end + len(self.END)

    def _one(
        self, named: re.Match[str], body: str, tools: Tools, closed: bool
    ) -> tuple[Found, int]:
        """A call, and where it ends."""
        name, at = named[1], named.end()
        if body[at:].lstrip()[:1] == "{":
            inner, ended, _ = body[at:].partition(self.END)
            try:
                call = Found(name, arguments_of(inner))
            except Unreadable as error:
                call = Found(name, error=str(error))
            return call, at + len(inner) + len(ended)
        try:
            known = tools.parameters(tools.name_of(name))
            pairs, at = (
                self._TAGS.read(body, at, known) if closed else self._TAGS.in_pairs(body, at)
            )
        except Unreadable as error:
            return Found(name, error=str(error)), len(body)
        at = _skip(body, at)
        if body.startswith(self.END, at):
            return _call(name, [(k, _on_its_lines(v)) for k, v in pairs], tools), at + len(self.END)
        if not closed:
            return Found(name, error="its end is missing"), len(body)
        if body[at:].strip():
            error = f"<parameter= or {self.END} expected; found {body[at : at + 20]!r}"
            return Found(name, error=error), len(body)
        return _call(name, [(k, _on_its_lines(v)) for k, v in pairs], tools), len(body)


def _on_its_lines(text: str) -> str:
    """A value without the line breaks that stand around it."""
    return text.removeprefix("\n").removesuffix("\n")
