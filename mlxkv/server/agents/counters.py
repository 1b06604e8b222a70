"""Lines that agents change with every request, and that say nothing to a model here.

- Claude Code's `x-anthropic-billing-header: cc_version=...; cch=...` line of the system prompt.
- `<total_tokens>N tokens left</total_tokens>`: the rest of the context that its own service has.

A line is left out only as a whole, with the empty lines that set it off, so that a text reads the
same whether a client sends the line in it or no longer does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlxkv.generation.request import Message
from mlxkv.server.agents.lines import join_around
from mlxkv.server.media.content import with_texts

BILLING = "system.x-anthropic-billing-header"
TOTAL_TOKENS = "messages.total_tokens"
"""The names that responses have for them, in `mlxkv-ignored`."""

_BILLING_MARK, _TOTAL_MARK = "x-anthropic-billing-header:", "<total_tokens>"
_ROLES = ("system", "developer", "user", "tool")
_BILLING_LINE = re.compile(r"^x-anthropic-billing-header:.*\b(?:cc_version|cch)=.*$", re.M)
_TOTAL_LINE = re.compile(r"^[ \t]*<total_tokens>[\d,. ]+ tokens left</total_tokens>[ \t]*$", re.M)


def without_counters(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """Messages without these lines, and the names of what was left out.

    A message of the system or the user that has nothing else is left out as well, unless nothing
    would be left to answer.
    """
    kept: list[Message] = []
    names: dict[str, None] = {}
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            kept.append(message)
            continue
        is_system = role in ("system", "developer")
        shorter = with_texts(
            content, lambda text, is_system=is_system: _shorter(text, is_system, names)
        )
        if shorter == content:
            kept.append(message)
        elif shorter or role == "tool":
            kept.append({**message, "content": shorter})
    if any(message.get("role") in ("user", "tool") for message in kept):
        return kept, list(names)
    return list(messages), []


def _shorter(text: str, is_system: bool, names: dict[str, None]) -> str:
    if is_system:
        text = _without(_BILLING_MARK, _BILLING_LINE, text, BILLING, names)
    return _without(_TOTAL_MARK, _TOTAL_LINE, text, TOTAL_TOKENS, names)


def _without(mark: str, line: re.Pattern[str], text: str, name: str, names: dict[str, None]) -> str:
    """A text without the lines that match, which hold the mark; notes the name if there are any."""
    if mark not in text:
        return text
    pieces = line.split(text)
    if len(pieces) == 1:
        return text
    names[name] = None
    return join_around(pieces)
