"""The model that is checked: asking it, and what must hold of every answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxkv.bench.acceptance.report import Skip, holds
from mlxkv.generation.outputs import Result
from mlxkv.kv.types import STEP
from mlxkv.llm.llm import LLM

Messages = list[dict[str, Any]]
MAX_TOKENS = 48
"""Of most answers here, which are asked to be short."""
SMALLEST_CONTEXT = 2 * STEP


class Subject:
    """A model under test.

    Attributes:
        agent_tokens: length of the system prompt of the tools' checks, as agents have it.
    """

    def __init__(self, llm: LLM, agent_tokens: int = 6_000):
        self.llm = llm
        self.agent_tokens = min(agent_tokens, llm.context // 3)

    @property
    def kinds(self) -> frozenset[str]:
        """What the model takes beside text."""
        return self.llm.model.media_kinds

    def needs_chat(self) -> None:
        """Raise Skip for a model without a chat template."""
        if self.llm.tokenizer.chat_template is None:
            raise Skip("no chat template: it is a base model")

    def needs_pages(self) -> None:
        """Raise Skip where no KV is kept between answers."""
        if self.llm.pages is None:
            raise Skip("KV is not kept between answers with these settings")

    def ask(self, prompt: str | Messages, **options: Any) -> Result:
        """The answer, greedily chosen unless an option says otherwise.

        Raises:
            Failed: its figures do not add up, or a marker of the template is in its text.
        """
        if not isinstance(prompt, str):
            self.needs_chat()
        options = {"max_tokens": MAX_TOKENS, **options}
        made: Result = self.llm.generate(prompt, **options)
        stats = made.stats
        whole = stats.restored_tokens + stats.computed_tokens
        holds(whole == stats.prompt_tokens, f"{whole} of {stats.prompt_tokens} tokens counted")
        n = options["max_tokens"]
        holds(stats.generated_tokens <= n, f"{stats.generated_tokens} tokens, of {n} at most")
        holds(made.finish_reason in ("stop", "length"), f"it ended with {made.finish_reason!r}")
        markers = self.llm.tokenizer.eos_token_ids
        for token in markers:
            text = self.llm.tokenizer.decode([token], skip_special_tokens=False)
            holds(not text.strip() or text not in made.text, f"{text!r} is in the answer's text")
        return made

    def reused(self, prompt: str | Messages, but: int = STEP, **options: Any) -> str:
        """Ask again what was asked before; a note on what was computed of it.

        Args:
            but: tokens that may be computed.

        Raises:
            Failed: more was computed.
        """
        self.needs_pages()
        stats = self.ask(prompt, **{**options, "max_tokens": 1}).stats
        holds(
            stats.restored_tokens > 0 and stats.computed_tokens <= but,
            f"{stats.computed_tokens:,} of {stats.prompt_tokens:,} tokens were computed again",
        )
        return f"{stats.restored_tokens:,} of {stats.prompt_tokens:,} tokens restored"


def user(content: Any) -> Messages:
    """A conversation of one message."""
    return [{"role": "user", "content": content}]


def paragraphs(subject: Subject, n_tokens: int) -> str:
    """Rules for an agent, of about that many tokens."""
    lines: list[str] = []
    tokens = 0
    while tokens < n_tokens:
        i = len(lines) + 1
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
