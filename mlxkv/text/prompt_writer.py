"""Conversations to rendered prompts: fitted to the chat template, and with text apart from control.

`ChatTemplate.render` is the template alone, as transformers runs it; this is what requests use.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.text.chat_template import ChatTemplate, Message, check_messages
from mlxkv.text.control import Controls
from mlxkv.text.conversation import Fitted, fitted
from mlxkv.text.rendered import Rendered
from mlxkv.text.tool_prompt import style_of

_REASONING = ("reasoning_content", "thinking", "reasoning")


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


class PromptWriter:
    """Renders conversations for one model.

    Args:
        template: its chat template.
        controls: its control tokens.
    """

    def __init__(self, template: ChatTemplate, controls: Controls):
        self._template = template
        self._controls = controls

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The text alone; see `write`."""
        return self.write(messages, **options).text

    def write(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Rendered:
        """The prompt of a conversation; arguments as for `ChatTemplate.render`.

        Raises:
            UsageError, TemplateError: as there.
        """
        check_messages(messages)
        given = self._controls.mark(messages, tools, documents)
        mark, (messages, tools, documents) = given
        fit = self._fitted(messages, tools)
        text = self._template.render(fit.messages, tools=fit.tools, documents=documents, **options)
        for insertion in fit.insertions:
            text = insertion.into(text)
        return self._controls.unmark(text, mark)

    def begin(self, messages: Sequence[Message], **options: Any) -> Begun:
        """The prompt of a conversation whose last message is a begun answer, left open at its end.

        Args:
            messages: see `is_begun`.
            **options: as for `write`.

        Raises:
            UsageError: the template does not show what was begun.
            TemplateError: see `ChatTemplate.render`.
        """
        *earlier, last = messages
        if not earlier:
            raise UsageError("an answer that has begun needs a message before it")
        opened = self.write(earlier, **options)
        mark = f"-begun-{secrets.token_hex(16)}"
        ended = _ended(last, mark)
        if ended is None:
            return Begun(opened, len(opened.text))
        whole = self.write([*earlier, ended], add_generation_prompt=False, **options)
        end = whole.text.rfind(mark)
        if end < 0:
            raise UsageError(
                "the last message is an answer that has begun, and this model's chat template "
                "leaves it out: end with a user message"
            )
        rendered = whole.before(end)
        content = last.get("content")
        text = content if isinstance(content, str) else ""
        return Begun(rendered, _n_common(opened.text, rendered.text), text)

    def _fitted(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> Fitted:
        template = self._template
        with_tools = tools is not None and bool(tools or template.tools_source)
        takes = template.takes_with_tools if with_tools else template.takes
        return fitted(messages, tools, takes, template.takes, style_of(template))


def _ended(message: Message, mark: str) -> Message | None:
    """A begun answer with a mark at the end of what there is of it; None if there is nothing."""
    content = message.get("content")
    if isinstance(content, str) and content:
        return {**message, "content": content + mark}
    if content:
        return {**message, "content": [*content, {"type": "text", "text": mark}]}
    name = next((name for name in _REASONING if message.get(name)), None)
    return None if name is None else {**message, name: message[name] + mark}


def _n_common(a: str, b: str) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
