"""Calls in a Markdown fence, as Gemma 3 writes them when its prompt asks for it."""

from __future__ import annotations

import re

from mlxkv.parsers.notations.notation import Notation
from mlxkv.parsers.notations.tools import Found, Tools

_LABELS = ("tool_code", "tool_call", "json", "python", "")
_LABEL = re.compile(r"[ \t]*(tool_code|tool_call|json|python)?[ \t]*\n")


class FencedCalls:
    """A fence of one of the labels that models put on calls; in any other it is content.

    Facts: https://ai.google.dev/gemma/docs/capabilities/function-calling. That guide's prompt asks
    for bare calls; `tool_code` fences are what the models were seen to write.

    Args:
        notation: how the calls in it are written.
    """

    def __init__(self, notation: Notation):
        self._notation = notation

    def possible(self, body: str) -> bool:
        """See `Notation`."""
        label = _LABEL.match(body)
        if label is None:
            return any(known.startswith(body.strip(" \t")) for known in _LABELS)
        return self._notation.possible(body[label.end() :])

    def inside_string(self, body: str) -> bool:
        """See `Notation`."""
        label = _LABEL.match(body)
        return label is not None and self._notation.inside_string(body[label.end() :])

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        """See `Notation`."""
        label = _LABEL.match(body)
        return self._notation.parse(body[label.end() :], tools, closed) if label else []

    def length(self, body: str) -> int:
        """See `Notation`."""
        return len(body)
