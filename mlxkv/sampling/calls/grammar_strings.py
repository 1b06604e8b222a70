"""What a JSON schema asks of a string, as a terminal of a grammar: bare text, nothing escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlxkv.errors import UsageError

ANY = "/(?s:.*)/"
"""Every text, the empty one too."""

_DAY = "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|[12][0-9]))"  # noqa: E501
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{_HOUR})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_PLACE = r"(?:[A-Za-z0-9._~:/!$&'()*+,;=@-]|%[0-9A-Fa-f]{2})*"
_WORD = "[A-Za-z0-9_+-]+"
FORMATS: Mapping[str, str] = {
    "date": _DAY,
    "time": _TIME,
    "date-time": f"{_DAY}T{_TIME}",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "email": rf"{_WORD}(?:\.{_WORD})*@{_LABEL}(?:\.{_LABEL})*",
    "uri": rf"[A-Za-z][A-Za-z0-9+.-]*:{_PLACE}(?:\?{_PLACE})?(?:#{_PLACE})?",
}
"""Regular expressions of the formats that are kept."""

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]?|.", re.DOTALL)
_EDGES = frozenset({"^", "$", r"\b", r"\B", r"\A", r"\Z", r"\z"})


def text(rules: Mapping[str, Any], without: Iterable[str] = ()) -> str:
    """A terminal's body: the texts that a string's rules allow.

    Args:
        rules: of a `json_schema.Choice`.
        without: terminals' bodies that must not match the text as a whole.

    Raises:
        UsageError: a rule that cannot be kept, or rules that no text satisfies.
    """
    least, most = rules.get("minLength", 0), rules.get("maxLength")
    if most is not None and most < least:
        raise UsageError(f"maxLength {most} is less than minLength {least}")
    parts = [ANY]
    if least or most is not None:
        parts = [f"/(?s:.{{{least},{'' if most is None else most}}})/"]
    if "pattern" in rules:
        parts.append(_found(rules["pattern"]))
    if "format" in rules:
        if rules["format"] not in FORMATS:
            raise UsageError(
                f"format {rules['format']!r} cannot be kept here; known are {', '.join(FORMATS)}"
            )
        parts.append(_regex(FORMATS[rules["format"]]))
    return " & ".join([*parts, *(f"~{each}" for each in without)])


def holding(part: str) -> str:
    """A terminal's body: texts with a part."""
    return _regex(f"(?s:.*){re.escape(part)}(?s:.*)")


def one_of(texts: Iterable[str]) -> str:
    """A terminal's body: these texts."""
    return f"({' | '.join(map(literal, texts))})"


def literal(text: str) -> str:
    """A text as it is.

    Raises:
        UsageError: it is not Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{json.dumps(text)[:60]} holds half of a surrogate pair") from None
    return json.dumps(text, ensure_ascii=False)


def _regex(regex: str) -> str:
    """A regular expression as grammars write it; what is ASCII in JSON schemas is so here."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex, 'dw')}/"


def _found(pattern: str) -> str:
    """A terminal's body: the texts in which a schema's pattern is found.

    Its edges (`^`, `$`) are kept where an alternative of the whole pattern begins or ends.

    Raises:
        UsageError: they are elsewhere, or it is no regular expression of ours.
    """
    from llguidance import LLMatcher

    branches: list[list[str]] = [[]]
    depth = 0
    for token in _TOKEN.findall(pattern):
        depth += (token == "(") - (token == ")")
        if token == "|" and not depth:
            branches.append([])
        else:
            branches[-1].append(token)
    whole = _regex("|".join(_branch(tokens, pattern) for tokens in branches))
    failed, messages = LLMatcher.validate_grammar_with_warnings(
        LLMatcher.grammar_from_lark(f"start: T\nT: {whole}")
    )
    if failed:
        said = " ".join(str(messages[0]).split())[:200]
        raise UsageError(f"pattern {pattern!r} cannot be kept: {said}")
    return whole


def _branch(tokens: list[str], pattern: str) -> str:
    before = after = "(?s:.*)"
    if tokens[:1] == ["^"]:
        before, tokens = "", tokens[1:]
    if tokens[-1:] == ["$"]:
        after, tokens = "", tokens[:-1]
    if not _EDGES.isdisjoint(tokens):
        raise UsageError(f"pattern {pattern!r} has an edge within it, which cannot be kept")
    return f"{before}(?:{''.join(tokens)}){after}"
