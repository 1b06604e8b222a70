"""Conversations to prompts: fitted to the chat template, and with text apart from control."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlxkv.chat.chat_template import ChatTemplate, Message, check_messages
from mlxkv.chat.control import Controls
from mlxkv.chat.conversation import Fitted, fitted
from mlxkv.chat.prompt_writer import Begun
from mlxkv.chat.rendered import Rendered
from mlxkv.chat.template_probe import REASONING
from mlxkv.chat.tool_prompt import style_of
from mlxkv.errors import UsageError


class TemplateWriter:
    """Renders conversations with a chat template. See `PromptWriter`.

    Args:
        template: its chat template.
        controls: its control tokens.
        owner: whose prompts it writes.
    """

    def __init__(self, template: ChatTemplate, controls: Controls, owner: str = ""):
        self._template = template
        self._controls = controls
        self._owner = owner

    def for_owner(self, owner: str) -> TemplateWriter:
        """See `PromptWriter`."""
        return TemplateWriter(self._template, self._controls, owner)

    def recorder(self, prompt: Rendered) -> None:
        """See `PromptWriter`."""
        return

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
        """See `PromptWriter`."""
        check_messages(messages)
        given = self._controls.mark(messages, tools, documents)
        mark, (messages, tools, documents) = given
        fit = self._fitted(messages, tools)
        text = self._template.render(fit.messages, tools=fit.tools, documents=documents, **options)
        for insertion in fit.insertions:
            text = insertion.into(text)
        return replace(self._controls.unmark(text, mark), owner=self._owner)

    def begin(self, messages: Sequence[Message], **options: Any) -> Begun:
        """See `PromptWriter`."""
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
    name = next((name for name in REASONING if message.get(name)), None)
    return None if name is None else {**message, name: message[name] + mark}


def _n_common(a: str, b: str) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
