"""GPT-OSS's format, written: a conversation as openai-harmony 0.0.8 renders it.

    <|start|>system<|message|>...<|end|><|start|>developer<|message|># Instructions ...<|end|>
    <|start|>user<|message|>...<|end|><|start|>assistant<|channel|>analysis<|message|>...<|end|>
    <|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{...}<|call|>
    <|start|>functions.f to=assistant<|channel|>commentary<|message|>...<|end|><|start|>assistant

It stands in for the checkpoint's own template, see `harmony_writer`. System messages at the head
are the developer's instructions, later ones stay where they are. Text beside a call is `commentary`
for the user. Once an answer is complete, the reasoning before the first one is left out.

A reply that this model itself wrote goes in as it was written, see `replies`; as long as its tools
run, what was left out of its prompt stays left out, and the date is still that of the first one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mlxkv.chat.gpt_oss.harmony_tokens import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from mlxkv.chat.gpt_oss.harmony_tools import namespace
from mlxkv.chat.rendered import Rendered, Segment
from mlxkv.chat.replies import Replies, Reply, call_key
from mlxkv.errors import TemplateError

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
CUTOFF = "2024-06"
_OPENING = START + "assistant"
_FUNCTIONS = "functions."
_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class _Message:
    """One message of the format, or a reply as it was written.

    Args:
        author: role or name of a tool.
        text: of it.
        channel: None for those that have none.
        recipient: a tool, or the assistant.
        kind: content type.
        own: parts of a reply as it was written, which stand in for all of that.
        plain: the messages of that reply, for where it cannot stay as it was.
    """

    author: str
    text: str = ""
    channel: str | None = None
    recipient: str | None = None
    kind: str | None = None
    own: tuple[Segment, ...] = ()
    plain: tuple[_Message, ...] = ()

    def parts(self) -> Iterator[Segment]:
        """What is written of it."""
        yield _control(START)
        if self.own:
            yield from (Segment("assistant"), *self.own)
            return
        yield Segment(self.author + (f" to={self.recipient}" if self.recipient else ""))
        if self.channel is not None:
            yield from (_control(CHANNEL), Segment(self.channel))
        if self.kind is not None:
            constrained = self.kind.startswith(CONSTRAIN)
            yield from (Segment(" "), _control(CONSTRAIN if constrained else ""))
            yield Segment(self.kind.removeprefix(CONSTRAIN))
        yield from (_control(MESSAGE), Segment(self.text))
        calls = self.author == "assistant" and self.recipient
        yield _control(CALL if calls else END)


@dataclass(frozen=True, slots=True)
class HarmonyPrompt(Rendered):
    """A rendered conversation.

    Args:
        dropped: whether reasoning was left out of it.
        date: that it names.
    """

    dropped: bool = False
    date: str = ""


def write_prompt(variables: Mapping[str, Any], replies: Replies, owner: str) -> HarmonyPrompt:
    """The prompt of a conversation.

    Args:
        variables: of a chat template, checked.
        replies: what the model itself wrote.
        owner: of the prompt; it holds no other owner's replies.

    Raises:
        TemplateError: the format has no place for a message or a tool.
    """
    try:
        return _prompt(variables, replies, owner)
    except RecursionError:
        raise _refusal("it nests too deeply") from None


def _prompt(variables: Mapping[str, Any], replies: Replies, owner: str) -> HarmonyPrompt:
    tools = [_function(tool) for tool in variables["tools"] or ()]
    messages, head = list(variables["messages"]), []
    while messages and messages[0]["role"] in _SYSTEM_ROLES:
        head.append(_text(messages.pop(0)))
    talk = _Talk(replies, owner, {tool["name"] for tool in tools})
    for message in messages:
        talk.add(message)
    kept, dropped = talk.kept()
    date = variables.get("conversation_start_date") or talk.date or _today()
    found = [_Message("system", _system(variables, date, bool(tools)))]
    found += _developer("\n\n".join(text for text in head if text), tools)
    parts = [part for message in found + kept for part in message.parts()]
    if variables["add_generation_prompt"]:
        parts += [_control(START), Segment("assistant")]
    made = Rendered.of(parts)
    return HarmonyPrompt(made.text, made.plain, made.known, owner, dropped, date)


def begun_answer(message: Mapping[str, Any]) -> tuple[list[Segment], str]:
    """What follows the prompt where an answer has begun, and the text for the user in it.

    Text goes on in the channel `final`, behind its reasoning. Reasoning without text goes on.
    """
    reasoning, text = _text(message, "reasoning_content"), _text(message)
    parts = []
    if reasoning:
        parts += [_control(CHANNEL), Segment("analysis"), _control(MESSAGE), Segment(reasoning)]
    if reasoning and text:
        parts += [_control(END), _control(START), Segment("assistant")]
    if text:
        parts += [_control(CHANNEL), Segment("final"), _control(MESSAGE), Segment(text)]
    return parts, text


class _Talk:
    """Messages behind the head, one after the other.

    Args:
        replies: what the model itself wrote.
        owner: of the prompt.
        functions: names of the tools.

    Attributes:
        date: on which it began, as far as that is known.
    """

    def __init__(self, replies: Replies, owner: str, functions: set[str]):
        self.date = ""
        self._replies, self._owner, self._functions = replies, owner, functions
        self._found: list[_Message] = []
        # Ids and names of the calls that have no result yet.
        self._waiting: list[tuple[str, str]] = []
        self._own: Reply | None = None

    def add(self, message: Mapping[str, Any]) -> None:
        """The next message."""
        role, text = message["role"], _text(message)
        if role in _SYSTEM_ROLES:
            self._found += _developer(text, ())
        elif role == "user":
            self._found.append(_Message("user", text))
        elif role == "tool":
            self._result(message, text)
        elif role == "assistant":
            self._assistant(message, text)
        else:
            raise _refusal(f"there is no role {role!r}")

    def kept(self) -> tuple[list[_Message], bool]:
        """All messages but the reasoning before the first answer; whether any was to be dropped.

        It is dropped where the assistant's last message is an answer too. openai-harmony brings it
        back while tools run behind that one; we do not, where the prompts before had it dropped.
        """
        channels = [message.channel for message in self._found]
        if "final" not in channels:
            return self._found, False
        spoken = [message for message in self._found if message.author == "assistant"]
        if spoken[-1].channel != "final" and not (self._own is not None and self._own.dropped):
            return self._found, False
        first = channels.index("final")
        head = [each for message in self._found[:first] for each in message.plain or (message,)]
        head = [message for message in head if message.channel != "analysis"]
        return head + self._found[first:], True

    def _assistant(self, message: Mapping[str, Any], text: str) -> None:
        reasoning = _text(message, "reasoning_content")
        calls = [_call_of(call) for call in message.get("tool_calls") or ()]
        made = [_Message("assistant", reasoning, "analysis")] if reasoning else []
        if text or not (calls or reasoning):
            made.append(_Message("assistant", text, "commentary" if calls else "final"))
        made += [self._call(name, arguments) for _, name, arguments in calls]
        self._waiting += [(call_id, name) for call_id, name, _ in calls]
        keys = [call_key(name, arguments) for _, name, arguments in calls]
        reply = None
        if calls:
            reply = self._replies.find(self._owner, calls[-1][0], text, reasoning, keys)
        if reply is not None:
            made = [_Message("assistant", own=_reply_parts(reply), plain=tuple(made))]
            self._own, self.date = reply, self.date or reply.date
        elif not calls and text:
            self._own = None
        self._found += made

    def _call(self, name: str, arguments: Any) -> _Message:
        """A call as the model once wrote this one; else as harmony does."""
        is_builtin = self._is_builtin(name)
        channel = "analysis" if is_builtin else "commentary"
        written = self._replies.call_text(self._owner, call_key(name, arguments))
        if written is not None:
            return _Message("assistant", channel=channel, own=tuple(_call_parts(written)))
        is_code = isinstance(arguments, Mapping) and list(arguments) == ["code"]
        if name == "python" and is_builtin and is_code:
            return _Message("assistant", str(arguments["code"]), channel, name, "code")
        recipient = name if is_builtin else _FUNCTIONS + name
        text = arguments if isinstance(arguments, str) else _json(arguments)
        return _Message("assistant", text, channel, recipient, CONSTRAIN + "json")

    def _result(self, message: Mapping[str, Any], text: str) -> None:
        call_id, name = message.get("tool_call_id"), message.get("name")
        named = [call for call in self._waiting if call_id in (None, call[0])]
        if call_id is None and name is not None:
            named = [call for call in named if call[1] == name]
        if named:
            self._waiting.remove(named[0])
            name = named[0][1]
        if not isinstance(name, str) or not name:
            raise _refusal("there is a tool's result without a call")
        name = name.removeprefix(_FUNCTIONS)
        is_builtin = self._is_builtin(name)
        author = name if is_builtin else _FUNCTIONS + name
        channel = "analysis" if is_builtin else "commentary"
        self._found.append(_Message(author, text, channel, "assistant"))

    def _is_builtin(self, name: str) -> bool:
        """Whether a tool is one that the format has of itself."""
        return name not in self._functions and (name == "python" or name.startswith("browser."))


def _text(message: Mapping[str, Any], key: str = "content") -> str:
    """A message's text, or the texts of its parts with a line break between them."""
    content = message.get(key) or ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part["text"] for part in parts if isinstance(part, dict) and "text" in part]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise _refusal("it takes text alone")
    return "\n".join(texts)


def _refusal(why: str) -> TemplateError:
    return TemplateError(f"harmony: the format refuses this conversation: {why}")


def _control(text: str) -> Segment:
    return Segment(text, is_plain=False)


def _reply_parts(reply: Reply) -> tuple[Segment, ...]:
    """A reply that was written earlier, with the end that a call has."""
    written, tokens = _without_end(reply.written), reply.tokens
    if written != reply.written:
        tokens = tokens[:-1]
    return Segment(written, False, tokens), _control(CALL)


def _call_parts(written: str) -> Iterator[Segment]:
    """A call that was written earlier: its header, its arguments and its end."""
    header, marker, body = written.removeprefix(_OPENING).partition(MESSAGE)
    yield _control(header + marker)
    yield Segment(_without_end(body))
    yield _control(CALL)


def _without_end(written: str) -> str:
    """A message without the token that ended it, if one did."""
    end = next((end for end in (CALL, RETURN, END) if written.endswith(end)), "")
    return written.removesuffix(end)


def _today() -> str:
    return datetime.now().strftime("%Y-%m-%d")


def _system(variables: Mapping[str, Any], date: str, has_functions: bool) -> str:
    """What the format calls the system message: who the model is, and how it answers."""
    sections = [
        f"{variables.get('model_identity') or IDENTITY}\n"
        f"Knowledge cutoff: {variables.get('knowledge_cutoff') or CUTOFF}\nCurrent date: {date}",
        f"Reasoning: {variables.get('reasoning_effort') or 'medium'}",
    ]
    channels = (
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    if has_functions:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return "\n\n".join([*sections, channels])


def _developer(instructions: str, tools: Sequence[Mapping[str, Any]]) -> list[_Message]:
    """Instructions and functions; no message where there is neither."""
    sections = ["# Instructions", instructions] if instructions else []
    if tools:
        sections += ["# Tools", namespace("functions", tools)]
    return [_Message("developer", "\n\n".join(sections))] if sections else []


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _refusal("a tool needs a function with a name")
    return function


def _call_of(call: Any) -> tuple[str, str, Any]:
    """Id, name and arguments of a call."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _refusal("a call needs a function with a name")
    name = function["name"].removeprefix(_FUNCTIONS)
    arguments = function.get("arguments")
    return str(call.get("id") or ""), name, {} if arguments is None else arguments


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
