"""GPT-OSS's prompts: what stands in for the checkpoint's template, and the writer around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from mlxkv.chat.chat_template import ChatTemplate, Message
from mlxkv.chat.gpt_oss.harmony import HarmonyPrompt, begun_answer, write_prompt
from mlxkv.chat.prompt_writer import Begun
from mlxkv.chat.rendered import Rendered
from mlxkv.chat.replies import Recorder, Replies
from mlxkv.errors import UsageError

_VARIABLES = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "conversation_start_date"),
        *("knowledge_cutoff", "model_identity", "reasoning_effort"),
    }
)


class HarmonyTemplate(ChatTemplate):
    """Renders like a chat template, and knows of no earlier replies.

    Args:
        source: the checkpoint's own template, which is not used.
        name_of_file: where that came from, for errors.
    """

    is_harmony = True

    def __init__(self, source: str = "", *, name_of_file: str = "harmony"):
        super().__init__(source, name_of_file=name_of_file)

    @cached_property
    def variables(self) -> frozenset[str]:
        return _VARIABLES

    def _write(self, variables: Mapping[str, Any]) -> str:
        return write_prompt(variables, Replies(), "").text


class HarmonyWriter:
    """Renders conversations for GPT-OSS. See `PromptWriter`.

    The format has a place for every role, call and result, so no conversation is fitted to it.

    Args:
        template: the model's.
        replies: what the model wrote where it called tools.
        owner: whose of them its prompts hold.
    """

    def __init__(self, template: ChatTemplate, replies: Replies, owner: str = ""):
        self._template = template
        self._replies = replies
        self._owner = owner

    def for_owner(self, owner: str) -> HarmonyWriter:
        """See `PromptWriter`."""
        return HarmonyWriter(self._template, self._replies, owner)

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The text alone; see `write`."""
        return self.write(messages, **options).text

    def write(self, messages: Sequence[Message], **options: Any) -> HarmonyPrompt:
        """See `PromptWriter`."""
        variables = self._template.checked(messages, options)
        return write_prompt(variables, self._replies, self._owner)

    def begin(self, messages: Sequence[Message], **options: Any) -> Begun:
        """See `PromptWriter`."""
        if len(messages) < 2:
            raise UsageError("an answer that has begun needs a message before it")
        variables = self._template.checked(messages, options)
        last = variables["messages"].pop()
        opened = write_prompt(variables, self._replies, self._owner)
        parts, text = begun_answer(last)
        rendered = Rendered.of([*opened.segments(), *parts], self._owner)
        return Begun(rendered, len(opened.text), text)

    def recorder(self, prompt: Rendered) -> Recorder:
        """See `PromptWriter`."""
        made = prompt if isinstance(prompt, HarmonyPrompt) else HarmonyPrompt("")
        return Recorder(self._replies, self._owner, made.dropped, made.date)
