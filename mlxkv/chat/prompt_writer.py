"""What turns conversations into prompts, whatever a model's format is.

`ChatTemplate.render` is a checkpoint's template alone, as transformers runs it; requests use a
writer: `TemplateWriter` around that template, or `HarmonyWriter` for GPT-OSS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlxkv.chat.rendered import Rendered
from mlxkv.chat.replies import Recorder

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Begun:
    """A prompt that ends in a begun answer.

    Args:
        rendered: all of it.
        n_opening: characters up to where an answer would begin; behind them is what was begun.
        text: of the begun answer, what is for the user.
    """

    rendered: Rendered
    n_opening: int
    text: str = ""

    @property
    def opening(self) -> str:
        """The text before the begun answer."""
        return self.rendered.text[: self.n_opening]

    @property
    def answer(self) -> Rendered:
        """The begun answer, with what the template writes around its reasoning."""
        return self.rendered.behind(self.n_opening)


def is_begun(messages: Sequence[Message]) -> bool:
    """Whether the last message is an answer that can be gone on from: one that calls nothing."""
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and not last.get("tool_calls")


class PromptWriter(Protocol):
    """Renders conversations for one model."""

    def for_owner(self, owner: str) -> PromptWriter:
        """A writer of this owner's prompts, which may hold what the model itself wrote to it."""
        ...

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The text alone; see `write`."""
        ...

    def write(self, messages: Sequence[Message], **options: Any) -> Rendered:
        """The prompt of a conversation; arguments as for `ChatTemplate.render`.

        Raises:
            UsageError, TemplateError: as there.
        """
        ...

    def begin(self, messages: Sequence[Message], **options: Any) -> Begun:
        """The prompt of a conversation whose last message is a begun answer, left open at its end.

        Args:
            messages: see `is_begun`.
            **options: as for `write`.

        Raises:
            UsageError: the template does not show what was begun.
            TemplateError: see `ChatTemplate.render`.
        """
        ...

    def recorder(self, prompt: Rendered) -> Recorder | None:
        """What follows the answer to a prompt to keep it for later ones; None if nothing does."""
        ...
