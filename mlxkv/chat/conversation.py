"""Fit a conversation to what its chat template takes, so that nothing of it is lost.

A conversation that the template takes is left as it is. Else, in this order (docs/conversations.md
has the rules for users):

- a tool gets what the template needs of it; tools that it does not know are told of in text, see
  `tool_prompt`, and calls and results are text then, too;
- a system message that cannot stay where it is goes into the user message behind it, or becomes
  one;
- messages of one role in a row are joined;
- calls get arguments and ids in the form that the template reads; several at once become one after
  the other, each with its result.

Each rule looks at a message and its neighbours alone: what a turn was rendered to stays the
beginning of the next turn's text, as far as the template allows.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxkv.chat import tool_prompt
from mlxkv.chat.template_probe import REASONING, Takes
from mlxkv.chat.tool_prompt import Style
from mlxkv.errors import TemplateError

BETWEEN = "\n\n"
"""Between the texts of messages that were joined."""

_Dict = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Insertion:
    """Text of an answer that its template would drop: it goes before the answer's first call.

    Args:
        mark: stands before the name of that call.
        frame: what the template writes between the answer's opening and that name.
        text: what to put between the opening and the frame.
    """

    mark: str
    frame: str
    text: str

    def into(self, rendered: str) -> str:
        """The rendered text with it in its place.

        Raises:
            TemplateError: the call was written in another way than it was in the probe.
        """
        before, mark, behind = rendered.partition(self.mark)
        if not mark or not before.endswith(self.frame):
            raise TemplateError("the chat template takes no text in an answer that calls a tool")
        head = before.removesuffix(self.frame)
        gap = "\n" if head.endswith("\n") and not self.text.endswith("\n") else ""
        return f"{head}{self.text}{gap}{self.frame}{behind}"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation that a template takes.

    Args:
        messages: as the template gets them.
        tools: the same; None where it is told of them in text, or there are none.
        insertions: what is put into its text afterwards.
    """

    messages: list[_Dict]
    tools: list[_Dict] | None = None
    insertions: tuple[Insertion, ...] = field(default=())


def fitted(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    takes: Takes,
    bare: Takes,
    style: Style,
) -> Fitted:
    """Fit messages and tools to a template.

    Args:
        messages: dicts with a role each.
        tools: JSON schemas of functions.
        takes: what the template takes, with tools if there are any.
        bare: what it takes without tools.
        style: how a model without tools of its own is told of them.
    """
    made = [_plain_message(message, takes) for message in messages]
    known = None if tools is None else [_tool(tool, takes) for tool in tools]
    if known and not takes.tools:
        made = _led_by_system(made, tool_prompt.told(known, style))
        takes, known = bare, None
        made = _calls_as_text(made, style)
    elif _has_calls(made) and not takes.calls:
        made = _calls_as_text(made, style)
    made = _in_turns(_systems(made, takes), takes)
    insertions: list[Insertion] = []
    if _has_calls(made):
        made = [_readable_calls(message, takes) for message in made]
        made = list(_one_by_one(made)) if not takes.parallel_calls else made
        made = [each for m in made for each in _text_of_call(m, takes, insertions)]
    return Fitted(made, known, tuple(insertions))


def _plain_message(message: Mapping[str, Any], takes: Takes) -> _Dict:
    """A message without nulls, its role and content in the form that every template knows."""
    made = {key: value for key, value in message.items() if value is not None}
    if made["role"] == "developer":
        made["role"] = "system"
    content = made.get("content")
    if isinstance(content, list | tuple) and _texts(content) is not None and not takes.parts:
        made["content"] = "\n".join(_texts(content) or ())
    if content is None:
        made["content"] = ""
    return made


def _texts(parts: Sequence[Any]) -> list[str] | None:
    """The texts of content in parts, None if one part is something else."""
    found = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    return texts if len(texts) == len(parts) else None


def _tool(tool: Mapping[str, Any], takes: Takes) -> _Dict:
    made = dict(tool)
    function = made.get("function")
    if isinstance(function, Mapping) and takes.tools:
        needed: _Dict = {}
        if function.get("description") is None and not takes.bare_tools:
            needed["description"] = ""
        if function.get("parameters") is None and not takes.tools_without_parameters:
            needed["parameters"] = {"type": "object", "properties": {}}
        if needed:
            made["function"] = {**function, **needed}
    return made


def _has_calls(messages: Sequence[_Dict]) -> bool:
    return any(m["role"] == "tool" or m.get("tool_calls") for m in messages)


def _led_by_system(messages: list[_Dict], text: str) -> list[_Dict]:
    """The messages with a text at the end of their first system message."""
    if messages and messages[0]["role"] == "system":
        return [_joined(messages[0], {"role": "system", "content": text}), *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _calls_as_text(messages: Sequence[_Dict], style: Style) -> list[_Dict]:
    """Calls and results as ordinary text; results in a row are one user message."""
    made: list[_Dict] = []
    in_results = False
    for message in messages:
        if message["role"] != "tool":
            made.append(_call_as_text(message, style))
            in_results = False
            continue
        text = tool_prompt.result(_text_of(message["content"]))
        if in_results:
            made[-1] = {"role": "user", "content": f"{made[-1]['content']}\n{text}"}
        else:
            made.append({"role": "user", "content": text})
        in_results = True
    return made


def _call_as_text(message: _Dict, style: Style) -> _Dict:
    calls = message.get("tool_calls")
    if not calls:
        return message
    lines = [tool_prompt.call(_function(_parsed_call(call)), style) for call in calls]
    if text := _text_of(message["content"]):
        lines.insert(0, text)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(lines)}


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    texts = _texts(content) if isinstance(content, list | tuple) else None
    return "\n".join(texts) if texts is not None else json.dumps(content, ensure_ascii=False)


def _systems(messages: Sequence[_Dict], takes: Takes) -> list[_Dict]:
    """System messages where the template takes them; the others at a user's."""
    rest = list(messages)
    head: list[_Dict] = []
    while rest and rest[0]["role"] == "system":
        head.append(rest.pop(0))
    if len(head) > 1 and not takes.systems:
        head = [_all_joined(head)]
    if head and not _takes_head(rest, takes):
        rest, head = head + rest, []
    if not head and rest and rest[0]["role"] == "system":
        return _at_users(rest)
    late = any(message["role"] == "system" for message in rest)
    return head + (_at_users(rest) if late and not takes.late_system else rest)


def _takes_head(rest: Sequence[_Dict], takes: Takes) -> bool:
    if not rest:
        return takes.system_alone
    return takes.system and (rest[-1]["role"] != "assistant" or takes.system_before_answers)


def _at_users(messages: Sequence[_Dict]) -> list[_Dict]:
    """System messages in the user message right behind them, or as one of their own."""
    made: list[_Dict] = []
    waiting: _Dict | None = None
    for message in messages:
        if message["role"] == "system":
            said = {**message, "role": "user"}
            waiting = said if waiting is None else _joined(waiting, said)
            continue
        if waiting is not None:
            if message["role"] == "user":
                message = _joined(waiting, message)
            else:
                made.append(waiting)
            waiting = None
        made.append(message)
    return made if waiting is None else [*made, waiting]


def _readable_calls(message: _Dict, takes: Takes) -> _Dict:
    """A message whose calls have arguments and ids in the template's form."""
    made = message
    if calls := message.get("tool_calls"):
        made = {**message, "tool_calls": [_readable_call(call, takes) for call in calls]}
    if message["role"] == "tool" and not takes.any_id:
        made = {**made, "tool_call_id": _short_id(message.get("tool_call_id"))}
    return made


def _readable_call(call: Any, takes: Takes) -> Any:
    made = _parsed_call(call)
    if not isinstance(made, Mapping):
        return made
    function = _function(made)
    arguments = function.get("arguments")
    if not takes.mapped_arguments and arguments is not None and not isinstance(arguments, str):
        text = json.dumps(arguments, ensure_ascii=False)
        made = {**made, "function": {**function, "arguments": text}}
    return made if takes.any_id else {**made, "id": _short_id(made.get("id"))}


def _parsed_call(call: Any) -> Any:
    """A call whose arguments are an object, if they are the JSON of one."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return call
    if not isinstance(value, dict):
        return call
    return {**call, "function": {**call["function"], "arguments": value}}


def _function(call: Any) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return function if isinstance(function, Mapping) else {}


def _short_id(call_id: Any) -> str:
    """An id of nine letters and digits: the same for the same id."""
    if isinstance(call_id, str) and re.fullmatch("[A-Za-z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(str(call_id or "").encode("utf-8", "replace")).hexdigest()[:9]


def _one_by_one(messages: Sequence[_Dict]) -> Iterator[_Dict]:
    """Each call in an answer of its own, its result behind it."""
    i = 0
    while i < len(messages):
        message = messages[i]
        calls = message.get("tool_calls") or ()
        i += 1
        if len(calls) < 2:
            yield message
            continue
        results = []
        while i < len(messages) and messages[i]["role"] == "tool":
            results.append(messages[i])
            i += 1
        yield from _split(message, calls, results)


def _split(message: _Dict, calls: Sequence[Any], results: list[_Dict]) -> Iterator[_Dict]:
    """A message of several calls, and the results behind it, in pairs."""
    known = {_id(call) for call in calls}
    head = message
    for call in calls:
        yield {**head, "tool_calls": [call]}
        head = {"role": "assistant", "content": ""}
        mine = [r for r in results if r.get("tool_call_id") == _id(call)]
        mine = mine or [r for r in results if r.get("tool_call_id") not in known][:1]
        for result in mine:
            results.remove(result)
            yield result
    yield from results


def _id(call: Any) -> Any:
    return call.get("id") if isinstance(call, Mapping) else None


def _text_of_call(message: _Dict, takes: Takes, insertions: list[Insertion]) -> list[_Dict]:
    """An answer that calls, its text at a place where the template does not drop it."""
    calls, content = message.get("tool_calls"), message["content"]
    if not calls or not content:
        return [message]
    thoughts = next((message[name] for name in REASONING if message.get(name)), None)
    if takes.reasoning_beside_calls if thoughts else takes.text_beside_calls:
        return [message]
    text, silent = _text_of(content), {**message, "content": ""}
    if takes.frame_of_calls is not None:
        mark = f"text-{secrets.token_hex(8)}-"
        insertions.append(Insertion(mark, takes.frame_of_calls, text))
        function = _function(calls[0])
        named = {**function, "name": mark + str(function.get("name", ""))}
        return [{**silent, "tool_calls": [{**calls[0], "function": named}, *calls[1:]]}]
    if takes.text_before_calls:
        return [{"role": "assistant", "content": content}, silent]
    rest = {key: value for key, value in silent.items() if key not in REASONING}
    return [{**rest, "reasoning_content": _both(thoughts, text)}]


def _in_turns(messages: Sequence[_Dict], takes: Takes) -> list[_Dict]:
    """Messages of one role in a row joined, and a user's first, where the template wants that."""
    made: list[_Dict] = []
    for message in messages:
        role, last = message["role"], made[-1] if made else {"role": ""}
        if role == "assistant" and last["role"] in ("", "system") and not takes.assistant_first:
            made.append({"role": "user", "content": ""})
        joins = role == last["role"] and (
            (role == "user" and not takes.users) or (role == "assistant" and not takes.assistants)
        )
        if joins or (role == "user" and last["role"] == "tool" and not takes.user_after_tool):
            made[-1] = _joined(last, message)
        else:
            made.append(message)
    return made


def _all_joined(messages: Sequence[_Dict]) -> _Dict:
    made = messages[0]
    for message in messages[1:]:
        made = _joined(made, message)
    return made


def _joined(first: _Dict, second: _Dict) -> _Dict:
    """Two messages as one of the first one's role."""
    made = {**first, "content": _both(first.get("content"), second.get("content"))}
    for name in REASONING:
        if second.get(name):
            made[name] = _both(first.get(name), second[name])
    if calls := [*first.get("tool_calls", ()), *second.get("tool_calls", ())]:
        made["tool_calls"] = calls
    return made


def _both(first: Any, second: Any) -> Any:
    if not first or not second:
        return first or second or ""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}{BETWEEN}{second}"
    return [*_parts(first), {"type": "text", "text": BETWEEN}, *_parts(second)]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
