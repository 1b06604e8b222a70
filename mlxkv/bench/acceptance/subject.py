"""The model that is checked: asking it, and what must hold of every answer."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from mlxkv.base import device
from mlxkv.bench.acceptance.report import Skip, brief, holds
from mlxkv.engine.prompt import prepare
from mlxkv.generation.outputs import Result, Stats
from mlxkv.generation.request import Request
from mlxkv.generation.session import n_shared
from mlxkv.kv.types import STEP
from mlxkv.llm.llm import LLM
from mlxkv.parsers.formats import format_of, format_with_tools, syntax_of

Messages = list[dict[str, Any]]
MAX_TOKENS = 48
"""Of most answers here, which are asked to be short."""
SMALLEST_CONTEXT = 4 * STEP
AGENT_TOKENS, CPU_AGENT_TOKENS = 6_000, 500
"""Length of a system prompt as agents have it. The CPU backend takes minutes for the longer one."""
NOT_WORTH_LOADING = 15
"""Tokens of a shared prefix that may be computed again, see docs/kv.md."""


class Subject:
    """A model under test.

    Attributes:
        mark: of this run. In a prompt it makes sure that no KV of an earlier run is found.
        agent_tokens: length of the system prompt of the tools' checks.
        other_bytes: of the process's arrays that are not the model's.
    """

    def __init__(self, llm: LLM, agent_tokens: int | None = None):
        self.llm, self.mark = llm, secrets.token_hex(3)
        if agent_tokens is None:
            agent_tokens = CPU_AGENT_TOKENS if device.on_cpu() else AGENT_TOKENS
        self.agent_tokens = min(agent_tokens, llm.context // 3)
        self.other_bytes = max(llm.stats().unexplained_bytes, 0)

    @property
    def kinds(self) -> frozenset[str]:
        """What the model takes beside text."""
        return self.llm.media.kinds

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return self.llm.tokenizer.chat_template is not None

    def needs_chat(self) -> None:
        """Raise Skip for a model without a chat template."""
        if not self.chats:
            raise Skip("no chat template: it is a base model")

    def needs_pages(self) -> None:
        """Raise Skip where no KV is kept between answers."""
        if self.llm.pages is None:
            raise Skip("KV is not kept between answers with these settings")

    def question(self, text: str) -> str | Messages:
        """A question as a conversation, or as text for a base model to continue."""
        return user(text) if self.chats else f"Question: {text}\nAnswer:"

    def tokens(self, prompt: str | Messages, **options: Any) -> list[int]:
        """A prompt's token ids; pictures and sound stand in it by their content."""
        return prepare(self.llm, Request.of(prompt, **options)).tokens

    def ask(self, prompt: str | Messages, **options: Any) -> Result:
        """The answer, greedily chosen unless an option says otherwise.

        Raises:
            Failed: its figures do not add up, or a marker of the template is in its text.
        """
        options = {"max_tokens": MAX_TOKENS, **options}
        made: Result = self.llm.generate(prompt, **options)
        stats, n = made.stats, options["max_tokens"]
        whole = stats.restored_tokens + stats.computed_tokens
        holds(whole == stats.prompt_tokens, f"{whole} of {stats.prompt_tokens} tokens counted")
        holds(stats.generated_tokens <= n, f"{stats.generated_tokens} tokens, of {n} at most")
        why = f": {made.error}" if made.error else ""
        holds(
            made.finish_reason in ("stop", "length"), f"it ended with {made.finish_reason!r}{why}"
        )
        if not isinstance(prompt, str):
            for marker in self._markers("tools" in options):
                found = marker in made.text or marker in (made.reasoning or "")
                holds(not found, f"{marker!r} is in the answer's text: {brief(made.text)!r}")
        return made

    def _markers(self, with_tools: bool) -> Iterator[str]:
        """Control tokens that are no text of an answer to messages."""
        tokenizer = self.llm.tokenizer
        name = format_with_tools(tokenizer) if with_tools else format_of(tokenizer)
        syntax, texts = syntax_of(name), []
        if syntax is not None:
            texts += syntax.think or ()
            texts += syntax.call[:1] if syntax.call and with_tools else ()
        ends = tokenizer.eos_token_ids
        yield from (t for i in ends if (t := tokenizer.decode([i], skip_special_tokens=False)))
        yield from (text for text in texts if text and tokenizer.id_of(text) is not None)

    def reuses(self, first: str | Messages, then: str | Messages, **options: Any) -> Result:
        """The second of two answers, to prompts that begin alike.

        Raises:
            Failed: what they share was computed again, or KV of an earlier prompt was taken for
                the first one's.
        """
        self.needs_pages()
        shaping = {key: value for key, value in options.items() if key != "max_tokens"}
        own, other = self.tokens(first, **shaping), self.tokens(then, **shaping)
        before = self.ask(first, **{**options, "max_tokens": 1}).stats
        holds(before.prompt_tokens == len(own), f"{before.prompt_tokens} tokens of {len(own)}")
        made = self.ask(then, **options)
        restored(made.stats, n_shared(own, other))
        return made


def restored(stats: Stats, n_tokens: int) -> None:
    """Raise Failed unless so many leading tokens of a prompt were restored, the last excepted."""
    expected = min(n_tokens, stats.prompt_tokens - 1)
    holds(expected > NOT_WORTH_LOADING, f"only {expected} tokens are shared with the first prompt")
    again = expected - stats.restored_tokens
    why = f", since it {stats.miss.reason} at token {stats.miss.token:,}" if stats.miss else ""
    holds(again <= NOT_WORTH_LOADING, f"{again:,} of {expected:,} were computed again{why}")
    holds(again >= 0, f"{stats.restored_tokens:,} were restored of {expected:,} that are shared")


def figures(stats: Stats) -> str:
    """A note on what of a prompt was restored."""
    return f"{stats.restored_tokens:,} of {stats.prompt_tokens:,} tokens restored"


def user(content: Any) -> Messages:
    """A conversation of one message."""
    return [{"role": "user", "content": content}]


def next_turn(messages: Messages, answer: str, content: Any) -> Messages:
    """A conversation with an answer and another message of the user."""
    return [*messages, {"role": "assistant", "content": answer}, *user(content)]


def paragraphs(subject: Subject, n_tokens: int) -> str:
    """Rules for an agent, of about that many tokens."""
    lines = [f"These are the rules of session {subject.mark}."]
    tokens = 0
    while tokens < n_tokens:
        i = len(lines)
        lines.append(
            f"Rule {i}: before step {i} of a task is taken, its plan is written to section {i} of "
            f"the log, with the files it touches and the reason for each of them."
        )
        tokens += len(subject.llm.encode_text(lines[-1]))
    return "\n".join(lines)


def parts(*content: Any) -> Sequence[dict[str, Any]]:
    """Content of texts and of (kind, source) pairs."""
    return [
        {"type": "text", "text": each}
        if isinstance(each, str)
        else {"type": each[0], each[0]: each[1]}
        for each in content
    ]
