"""Where in an answer its grammar begins: behind the reasoning.

What a model thinks is free; it cannot end the answer, so that what the user asked for comes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

from mlxkv.parsers import harmony
from mlxkv.parsers.formats import syntax_of
from mlxkv.text.tokenizer import Tokenizer

_BREAKS = ("\n", "\n\n", "Ċ", "ĊĊ", "<0x0A>")
"""One line break or two, as vocabularies write them."""


class Gate(Protocol):
    """Watches for the end of reasoning.

    Attributes:
        inside: every token may come but the end tokens.
        only_openers: reasoning has to begin now.
        openers: tokens that begin reasoning here, and may come besides those of the grammar.
    """

    inside: bool

    @property
    def only_openers(self) -> bool: ...

    @property
    def openers(self) -> frozenset[int]: ...

    def take(self, token: int) -> bool:
        """Whether a token belongs to the reasoning, its markers included."""
        ...

    def fork(self) -> Gate:
        """One at the same place, which goes on for itself."""
        ...


class MarkedGate:
    """Reasoning between two tokens, at the very beginning or not at all.

    A line break may come before it (GLM writes one), and then it has to begin: the break must not
    become a part of the answer.

    Args:
        opens: the token that begins it; None where it cannot begin any more.
        closes: the token that ends it.
        inside: the prompt has begun it.
        breaks: line breaks, which no answer begins with.
    """

    def __init__(
        self, opens: int | None, closes: int, inside: bool, breaks: frozenset[int] = frozenset()
    ):
        self._opens = None if inside else opens
        self._closes, self._breaks = closes, breaks
        self.inside = inside
        self.only_openers = False

    @property
    def openers(self) -> frozenset[int]:
        if self._opens is None:
            return frozenset()
        return frozenset({self._opens}) | (frozenset() if self.only_openers else self._breaks)

    def fork(self) -> MarkedGate:
        return copy.copy(self)

    def take(self, token: int) -> bool:
        if token in self.openers and token != self._opens:
            self.only_openers = True
            return True
        self.only_openers = False
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
        self.inside, self.only_openers = True, False

    @property
    def openers(self) -> frozenset[int]:
        return frozenset()

    def fork(self) -> HarmonyGate:
        twin = copy.copy(self)
        twin._header = None if self._header is None else list(self._header)
        return twin

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


def gate_of(
    tokenizer: Tokenizer, name: str, prompt: str, begins: Callable[[int], bool]
) -> Gate | None:
    """The gate of an answer; None where the model has no reasoning, or marks it by no tokens.

    Args:
        tokenizer: the model's.
        name: of its format, see `formats.format_of`.
        prompt: what it answers to.
        begins: whether an answer may begin with a token.
    """
    if name == "harmony":
        channel, message = (tokenizer.id_of(t) for t in (harmony.CHANNEL, harmony.MESSAGE))
        if channel is None or message is None:
            return None
        return HarmonyGate(tokenizer, channel, message)
    syntax = syntax_of(name)
    if syntax is None or syntax.think is None:
        return None
    opens, closes = (tokenizer.id_of(marker) for marker in syntax.think)
    if closes is None:
        return None
    end = prompt.rstrip()
    label = syntax.think[0] + "thought" if syntax.labelled else syntax.think[0]
    inside = end.endswith((syntax.think[0], label))
    found = {tokenizer.id_of(text) for text in _BREAKS}
    breaks = frozenset(token for token in found if token is not None and not begins(token))
    return MarkedGate(None if end.endswith(syntax.think[1]) else opens, closes, inside, breaks)
