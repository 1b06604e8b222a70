"""What a parser makes of a model's output, and what every parser can do.

Invariant: the `text` of all events, joined, is what the model wrote, character for character.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Markup:
    """Text of the format itself, never shown: markers, headers, the white space around them."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called.

    Args:
        text: the call as the model wrote it, markers included. Of several calls between one pair
            of markers the first has it all.
        name: the function.
        arguments: a JSON object; empty where `error` is set.
        id: names this call; what the model gave it, or nine letters and digits (some templates
            take no other form).
        error: why the arguments could not be read, None for a sound call: not to be run.
    """

    text: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: secrets.token_hex(5)[:9])
    error: str | None = None


Event = Content | Reasoning | Markup | ToolCall


class OutputParser(Protocol):
    """Reads one answer while it is written."""

    markers: frozenset[str]
    """Texts that mean something in this format."""

    def add(self, text: str, token: int | None = None) -> list[Event]:
        """Take more of the output; give what is certain now.

        Args:
            text: any piece of it; a marker may lie across pieces.
            token: the id that ended this piece, where markers are tokens of their own.
        """
        ...

    def finish(self) -> list[Event]:
        """Give what was held back: the output has ended."""
        ...
