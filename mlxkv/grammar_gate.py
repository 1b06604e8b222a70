"""Where in an answer its grammar begins: behind the reasoning.

What a model thinks is free; it cannot end the answer, so that what the user asked for comes.
"""

from __future__ import annotations

from typing import Protocol

from mlxkv.parsers import harmony
from mlxkv.parsing import SYNTAXES
from mlxkv.tokenizer import Tokenizer


class Gate(Protocol):
    """Watches for the end of reasoning.

    Attributes:
        inside: every token may come but the end tokens.
        openers: tokens that begin reasoning here, and may come besides those of the grammar.
    """

    inside: bool

    @property
    def openers(self) -> frozenset[int]: ...

    def take(self, token: int) -> bool:
        """Whether a token belongs to the reasoning, its markers included."""
        ...


class MarkedGate:
    """Reasoning between two tokens, at the very beginning or not at all.

    Args:
        opens: the token that begins it; None where it cannot begin any more.
        closes: the token that ends it.
        inside: the prompt has begun it.
    """

    def __init__(self, opens: int | None, closes: int, inside: bool):
        self._opens = None if inside else opens
        self._closes = closes
        self.inside = inside

    @property
    def openers(self) -> frozenset[int]:
        return frozenset() if self._opens is None else frozenset({self._opens})

    def take(self, token: int) -> bool:
        taken = self.inside or token == self._opens
        self.inside = taken and token != self._closes
        self._opens = None
        return taken


class HarmonyGate:
    """Everything up to the text of the message on the channel `final`.

    Args:
        tokenizer: the model's.
        channel: the token before a channel's name.
        message: the token before a message's text.
    """

    def __init__(self, tokenizer: Tokenizer, channel: int, message: int):
        self._tokenizer = tokenizer
        self._channel, self._message = channel, message
        self._header: list[int] | None = None
        self.inside = True

    @property
    def openers(self) -> frozenset[int]:
        return frozenset()

    def take(self, token: int) -> bool:
        if not self.inside:
            return False
        if token == self._channel:
            self._header = []
        elif token == self._message:
            name = self._tokenizer.decode(self._header or [])
            self.inside, self._header = not name.strip().startswith("final"), None
        elif self._header is not None:
            self._header.append(token)
        return True


def gate_of(tokenizer: Tokenizer, name: str, prompt: str) -> Gate | None:
    """The gate of an answer; None where the model has no reasoning, or marks it by no tokens.

    Args:
        tokenizer: the model's.
        name: of its format, see `parsing.format_of`.
        prompt: what it answers to.
    """
    if name == "harmony":
        channel, message = (tokenizer.id_of(t) for t in (harmony.CHANNEL, harmony.MESSAGE))
        if channel is None or message is None:
            return None
        return HarmonyGate(tokenizer, channel, message)
    syntax = SYNTAXES.get(name)
    if syntax is None or syntax.think is None:
        return None
    opens, closes = (tokenizer.id_of(marker) for marker in syntax.think)
    if closes is None:
        return None
    end = prompt.rstrip()
    label = syntax.think[0] + "thought" if syntax.labelled else syntax.think[0]
    inside = end.endswith((syntax.think[0], label))
    return MarkedGate(None if end.endswith(syntax.think[1]) else opens, closes, inside)
