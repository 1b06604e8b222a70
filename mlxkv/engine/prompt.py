"""From messages, text or ids to the tokens that are run, and what of them is kept at the head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlxkv.errors import TemplateError, UsageError
from mlxkv.generation.session import n_shared
from mlxkv.prefix.layout import unpacked

if TYPE_CHECKING:
    from mlxkv.llm.llm import LLM, Prompt
    from mlxkv.saved_kv.manifest import NamedKV


_PROBES = ("A", "7 z")
"""Two messages that begin differently: what comes before both belongs to no message."""


_SYSTEM_ROLES = ("system", "developer")


def with_saved(saved: NamedKV | None, messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Messages behind the saved ones; a system message of theirs goes below the saved one.

    Raises:
        UsageError: the saved prompt is a text and no conversation.
    """
    if saved is None:
        return list(messages)
    if saved.messages is None:
        raise UsageError(f"{saved.name} holds a text and no messages: give a text, or use --raw")
    head, rest = [dict(message) for message in saved.messages], [dict(m) for m in messages]
    if head[0]["role"] == "system" and rest and rest[0].get("role") == "system":
        head[0]["content"] = f"{head[0]['content']}\n\n{rest.pop(0)['content']}"
    return head + rest


def encode(llm: LLM, text: str, saved: NamedKV | None) -> list[int]:
    """Token ids of a rendered conversation; those of the saved text are the saved ones."""
    if saved is None or not text.startswith(saved.text):
        return llm.encode_text(text)
    return [*unpacked(saved.tokens), *llm.encode_text(text[len(saved.text) :])]


def behind(llm: LLM, saved: NamedKV | None, prompt: Prompt) -> list[int]:
    """Token ids of a text, or of ids, behind what was saved."""
    if saved is None:
        return llm.encode(prompt)
    if isinstance(prompt, str):
        return [*unpacked(saved.tokens), *llm.encode_text(prompt)]
    return [*unpacked(saved.tokens), *llm.encode(prompt)]


@dataclass(frozen=True, slots=True)
class Head:
    """What a prompt begins with, as far as a context that is full must not lose it.

    Args:
        saved: KV that it goes on from.
        messages: those that were rendered; none for a text.
        options: what the chat template got besides.
    """

    saved: NamedKV | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def n_tokens(self, llm: LLM, tokens: Sequence[int]) -> int:
        """Leading tokens of the prompt that are saved KV, its system prompt, or its first token
        where every text begins with that one."""
        n = int(tokens[0] == llm.tokenizer.bos_token_id)
        if self.saved is not None:
            n = max(n, n_shared(tokens, unpacked(self.saved.tokens)))
        return max(n, self._n_system(llm, tokens))

    def _n_system(self, llm: LLM, tokens: Sequence[int]) -> int:
        """What the prompt shares with every other one of the same system messages."""
        if not self.messages:
            return 0
        system = itertools.takewhile(lambda m: m.get("role") in _SYSTEM_ROLES, self.messages)
        head = list(system)
        probes = [[*head, {"role": "user", "content": probe}] for probe in _PROBES]
        try:
            texts = [llm.render(probe, **self.options) for probe in probes]
        except TemplateError:  # it wants more than one message
            return 0
        return min(n_shared(tokens, encode(llm, text, self.saved)) for text in texts)
