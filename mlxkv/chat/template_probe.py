"""What a chat template takes, found out by rendering small conversations.

A template is a program: it may refuse a message, or leave a text out without a word. Each question
below renders a conversation of made-up words once, when it is first asked, and looks for the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from mlxkv.errors import MlxkvError

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which reasoning is passed; templates read the first, GPT-OSS's reads the second."""

Message = Mapping[str, Any]


class Renders(Protocol):
    """Renders conversations: a chat template, or what stands around one."""

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """See `ChatTemplate.render`."""
        ...


_TOOL = "probe_tool"
_PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "string"}}}
_WORDS = tuple(f"probe{i}word" for i in range(8))
_SYSTEM, _USER, _SECOND, _THIRD, _ANSWER, _RESULT, _VALUE, _OTHER = _WORDS


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _call(value: str = _VALUE, call_id: str = "probe0001", name: str = _TOOL) -> dict[str, Any]:
    function = {"name": name, "arguments": {"probe_key": value}}
    return {"id": call_id, "type": "function", "function": function}


def _calls(*calls: Mapping[str, Any], text: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": list(calls), **more}


def _result(text: str = _RESULT, call_id: str = "probe0001") -> dict[str, Any]:
    return {"role": "tool", "name": _TOOL, "tool_call_id": call_id, "content": text}


_ASKED = _said("user", _USER)


class Takes:
    """What one template takes, with tools or without.

    Args:
        template: the model's.
        with_tools: whether tools are given: another template may be in use then.
    """

    def __init__(self, template: Renders, *, with_tools: bool):
        self._template = template
        self._tools = None
        if with_tools:
            function = {"name": _TOOL, "description": "Probe.", "parameters": _PARAMETERS}
            self._tools = [{"type": "function", "function": function}]

    @cached_property
    def system(self) -> bool:
        """A system message at the head."""
        return self._shows([_said("system", _SYSTEM), _ASKED], _SYSTEM, _USER)

    @cached_property
    def system_before_answers(self) -> bool:
        """A system message at the head where the last message is an answer."""
        messages = [_said("system", _SYSTEM), _ASKED, _said("assistant", _ANSWER)]
        return self._shows(messages, _SYSTEM, _USER, _ANSWER)

    @cached_property
    def system_alone(self) -> bool:
        """A system message and nothing else."""
        return self._shows([_said("system", _SYSTEM)], _SYSTEM)

    @cached_property
    def systems(self) -> bool:
        """Two system messages at the head."""
        head = [_said("system", _SYSTEM), _said("system", _OTHER)]
        return self._shows([*head, _ASKED], _SYSTEM, _OTHER, _USER)

    @cached_property
    def late_system(self) -> bool:
        """A system message behind others, at any place."""
        late, answer = _said("system", _SYSTEM), _said("assistant", _ANSWER)
        again = _said("user", _SECOND)
        return (
            self._shows([_ASKED, late], _USER, _SYSTEM)
            and self._shows([_ASKED, late, answer, again], _USER, _SYSTEM, _ANSWER, _SECOND)
            and self._shows([_ASKED, answer, late, again], _USER, _ANSWER, _SYSTEM, _SECOND)
        )

    @cached_property
    def users(self) -> bool:
        """Several user messages in a row."""
        two = [_ASKED, _said("user", _SECOND)]
        more = [*two, _said("assistant", _ANSWER), _said("user", _THIRD)]
        return self._shows(two, _USER, _SECOND) and self._shows(
            more, _USER, _SECOND, _ANSWER, _THIRD
        )

    @cached_property
    def assistants(self) -> bool:
        """Several answers in a row."""
        two = [_said("assistant", _ANSWER), _said("assistant", _OTHER)]
        return self._shows([_ASKED, *two, _said("user", _SECOND)], _USER, _ANSWER, _OTHER, _SECOND)

    @cached_property
    def assistant_first(self) -> bool:
        """An answer before any user message."""
        messages = [_said("assistant", _ANSWER), _ASKED]
        head = [_said("system", _SYSTEM)] if self.system else []
        called = self._render(self._fit([_calls(_call()), _result(), _ASKED])) or ""
        return (
            self._shows(messages, _ANSWER, _USER)
            and self._shows([*head, *messages], _ANSWER, _USER)
            and (not self.calls or _VALUE in called)
        )

    @cached_property
    def parts(self) -> bool:
        """Content as a list of texts."""
        part = {"type": "text", "text": _USER}
        text = self._render([{"role": "user", "content": [part]}])
        return text is not None and _USER in text and text == self._render([_ASKED])

    @cached_property
    def tools(self) -> bool:
        """Tools: it tells the model of them."""
        return self._tools is not None and _TOOL in (self._render([_ASKED]) or "")

    @cached_property
    def calls(self) -> bool:
        """Calls in an answer, and a message with the result."""
        return self._call_shows(mapping=True) or self._call_shows(mapping=False)

    @cached_property
    def mapped_arguments(self) -> bool:
        """Arguments as an object; else they have to be JSON in a text."""
        return self._call_shows(mapping=True)

    @cached_property
    def any_id(self) -> bool:
        """Ids of calls of any form; else of nine letters and digits."""
        long = "call_0123456789abcdefghijklmn"
        messages = [_ASKED, _calls(_call(call_id=long)), _result(call_id=long)]
        return self._render(self._fit(messages)) is not None

    @cached_property
    def user_after_tool(self) -> bool:
        """A user message behind a result."""
        messages = [_ASKED, _calls(_call()), _result(), _said("user", _SECOND)]
        answered = [*messages, _said("assistant", _ANSWER)]
        return self._shows(self._fit(messages), _RESULT, _SECOND) and self._shows(
            self._fit(answered), _RESULT, _SECOND, _ANSWER
        )

    @cached_property
    def text_beside_calls(self) -> bool:
        """Text in an answer that calls."""
        return self._beside()

    @cached_property
    def reasoning_beside_calls(self) -> bool:
        """Text and reasoning in an answer that calls; the reasoning need not be shown."""
        return self._beside(reasoning_content=_OTHER)

    @cached_property
    def text_before_calls(self) -> bool:
        """Text in an answer of its own, before the one that calls."""
        return self.assistants and self._keeps([_said("assistant", _ANSWER), _calls(_call())])

    @cached_property
    def parallel_calls(self) -> bool:
        """Several calls in one answer."""
        calls = _calls(_call(), _call(_OTHER, "probe0002"))
        messages = [_ASKED, calls, _result(), _result(_THIRD, "probe0002")]
        text = self._render(self._fit(messages)) or ""
        return all(word in text for word in (_VALUE, _OTHER, _RESULT, _THIRD))

    @cached_property
    def bare_tools(self) -> bool:
        """A tool without a description."""
        return self._takes_tool({"name": _TOOL, "parameters": _PARAMETERS})

    @cached_property
    def tools_without_parameters(self) -> bool:
        """A tool that says nothing of its parameters."""
        return self._takes_tool({"name": _TOOL, "description": "Probe."})

    @cached_property
    def frame_of_calls(self) -> str | None:
        """What stands between the opening of an answer and the name of its first call.

        None where a call does not stand where an answer's text would.
        """
        text = self._render([_ASKED, _said("assistant", _ANSWER)])
        call = self._render(self._fit([_ASKED, _calls(_call(name=_OTHER)), _result()]))
        if text is None or call is None:
            return None
        opening, found, _ = text.partition(_ANSWER)
        before, named, _ = call.partition(_OTHER)
        if not found or not named or not before.startswith(opening):
            return None
        return before[len(opening) :]

    def _call_shows(self, *, mapping: bool) -> bool:
        messages = [_ASKED, _calls(_call()), _result()]
        text = self._render(messages if mapping else _with_texts(messages)) or ""
        return all(word in text for word in (_TOOL, _VALUE, _RESULT))

    def _fit(self, messages: Sequence[Message]) -> Sequence[Message]:
        return messages if self.mapped_arguments else _with_texts(messages)

    def _beside(self, **more: Any) -> bool:
        return self._keeps([_calls(_call(), text=_ANSWER, **more)])

    def _keeps(self, calling: Sequence[Message]) -> bool:
        """Whether text and call of an answer stay, also when the turn is over."""
        messages = [_ASKED, *calling, _result()]
        over = [*messages, _said("assistant", _SECOND), _said("user", _THIRD)]
        texts = [self._render(self._fit(each)) or "" for each in (messages, over)]
        return all(word in text for word in (_ANSWER, _VALUE) for text in texts)

    def _takes_tool(self, function: Mapping[str, Any]) -> bool:
        tools = [{"type": "function", "function": function}]
        return _TOOL in (self._render([_ASKED], tools) or "")

    def _shows(self, messages: Sequence[Message], *words: str) -> bool:
        """Whether a conversation is rendered with these words, in this order."""
        text, at = self._render(messages), 0
        for word in words:
            at = -1 if text is None else text.find(word, at)
            if at < 0:
                return False
        return True

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str | None:
        try:
            return self._template.render(messages, tools=tools or self._tools)
        except MlxkvError:
            return None


def _with_texts(messages: Sequence[Message]) -> list[Message]:
    """The probe's calls with their arguments as JSON."""
    found = []
    for message in messages:
        if calls := message.get("tool_calls"):
            written = []
            for call in calls:
                value = call["function"]["arguments"]["probe_key"]
                function = {**call["function"], "arguments": f'{{"probe_key": "{value}"}}'}
                written.append({**call, "function": function})
            message = {**message, "tool_calls": written}
        found.append(message)
    return found
