"""Chat templates: messages to the prompt text that a model was trained on.

A template is jinja2 source from a checkpoint. It runs in a sandbox (`jinja_sandbox`, imported at
the first render) and renders as transformers' `apply_chat_template` does.

A rendered prompt holds its special tokens, the first one included: encode it with
`add_special_tokens=False`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from mlxkv.chat.template_probe import REASONING, Renders, Takes
from mlxkv.errors import MlxkvError, TemplateError, UsageError, one_line

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

PROTECTED = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
    "mask_token", "additional_special_tokens",
})  # fmt: skip
"""Variables that a request sets in other ways or not at all."""
_LISTS = ("tools", "documents")
"""Options that are lists of dicts."""


class ChatTemplate:
    """One model's chat template. Compiled at the first render, then reused.

    Args:
        source: jinja2 source.
        bos_token: the template's variable of that name; None leaves it undefined, as
            transformers does, so that `{{ bos_token }}` writes nothing.
        eos_token: the same for the end token.
        special_tokens: more such variables, by name ("pad_token", ...).
        tools_source: another template, used when tools are given.
        name_of_file: for errors.
    """

    is_harmony = False
    """Whether a renderer of our own for GPT-OSS stands in for it."""

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        tools_source: str | None = None,
        name_of_file: str = "the chat template",
    ):
        self.source = source
        self.tools_source = tools_source
        self.name_of_file = name_of_file
        tokens = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        self._special_tokens = {name: text for name, text in tokens.items() if text is not None}

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: dicts with at least a "role"; keys whose value is None are left out.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of functions that the model may call.
            documents: dicts for templates that quote documents.
            **extra: further variables that the template reads (`enable_thinking=False`).

        Raises:
            UsageError: messages, tools or documents of the wrong type, or no message.
            TemplateError: the template has an error, refuses the conversation (roles out of
                order), breaks out of the sandbox or passes its limits.
        """
        options = {"add_generation_prompt": add_generation_prompt, "tools": tools, **extra}
        return self._write(self.checked(messages, {**options, "documents": documents}))

    def checked(self, messages: Sequence[Message], options: Mapping[str, Any]) -> dict[str, Any]:
        """The variables of a render, copied; `options` are the other arguments of `render`.

        Raises:
            UsageError: messages, tools or documents of the wrong type, or no message.
        """
        try:
            lists = {name: _checked_dicts(options.get(name), name) for name in _LISTS}
            return {
                **self._special_tokens,
                "add_generation_prompt": True,
                **{name: _plain(x, name) for name, x in options.items() if name not in _LISTS},
                "messages": _checked_messages(messages),
                **lists,
            }
        except RecursionError:
            raise UsageError("a message or a tool nests too deeply") from None

    def _write(self, variables: Mapping[str, Any]) -> str:
        """The prompt of checked variables."""
        from mlxkv.chat.jinja import sandbox as jinja_sandbox

        # Like transformers: an empty list of tools still selects the template for tools.
        use_tools = variables["tools"] is not None and self.tools_source is not None
        template = self._tools_template if use_tools else self._template
        try:
            return jinja_sandbox.render(template, variables)
        except Exception as error:
            raise self._error(error) from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set itself.

        Raises:
            TemplateError: it cannot be read.
        """
        from jinja2 import meta

        from mlxkv.chat.jinja.sandbox import Environment

        names: set[str] = set()
        for source in (self.source, self.tools_source or ""):
            try:
                names |= meta.find_undeclared_variables(Environment().parse(source))
            except Exception as error:
                raise self._error(error) from error
        return frozenset(names)

    @cached_property
    def takes(self) -> Takes:
        """What conversations without tools it takes."""
        return Takes(self, with_tools=False)

    @cached_property
    def takes_with_tools(self) -> Takes:
        """What conversations with tools it takes."""
        return Takes(self, with_tools=True)

    @cached_property
    def _template(self) -> Template:
        return self._compile(self.source)

    @cached_property
    def _tools_template(self) -> Template:
        assert self.tools_source is not None
        return self._compile(self.tools_source)

    def _compile(self, source: str) -> Template:
        from mlxkv.chat.jinja.sandbox import Environment

        try:
            return Environment().from_string(source)
        except Exception as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> MlxkvError:
        """What a template raised, as one line that names the file."""
        from jinja2 import exceptions

        from mlxkv.chat.jinja.sandbox import LimitError

        if isinstance(error, MlxkvError):
            return error
        said = one_line(error)
        if isinstance(error, exceptions.TemplateSyntaxError):
            what = f"line {error.lineno}: syntax error: {said}"
        elif isinstance(error, LimitError):
            what = f"stopped: {said}"
        elif isinstance(error, exceptions.SecurityError):
            what = f"not allowed in a chat template: {said}"
        elif type(error) is exceptions.TemplateError:  # raise_exception
            what = f"the template refuses this conversation: {said}"
        elif isinstance(error, RecursionError):
            what = "stopped: it nests too deeply"
        else:
            what = f"the template failed on this conversation: {said}"
        return TemplateError(f"{self.name_of_file}: {what}")


def thinking_options(
    template: ChatTemplate, think: bool | str, has_reasoning: bool, best_effort: bool = False
) -> dict[str, Any]:
    """The variables that make a template ask for reasoning, or for none.

    Args:
        template: the model's.
        think: True, False, or how much: low, medium, high.
        has_reasoning: whether the model can reason at all.
        best_effort: do what the template's switches allow, and nothing where it has none.

    Raises:
        UsageError: the template reads no variable for that.
    """
    reads = template.variables
    switches = {name: bool(think) for name in ("enable_thinking", "thinking") if name in reads}
    if "reasoning_effort" in reads:
        if isinstance(think, str):
            return {**switches, "reasoning_effort": think}
        # There, without a switch of its own, the least effort is as near to none as it gets.
        return switches or ({} if think else {"reasoning_effort": "low"})
    if best_effort:
        return switches
    if isinstance(think, str):
        raise UsageError(
            f"cannot be {think!r}: this model's chat template reads no reasoning_effort; "
            f"allowed is {'on or off' if switches else 'only to leave it out'}",
            field="think",
        )
    if not switches and (think or has_reasoning):
        raise UsageError(
            "must be left out: this model's chat template has no switch for reasoning",
            field="think",
        )
    return switches


def append_only_suffix(
    template: Renders,
    messages: Sequence[Message],
    new_messages: Sequence[Message],
    *,
    answer: str | None = None,
    prompt: str | None = None,
    **options: Any,
) -> str | None:
    """The text that carries a cached conversation on to its next turn.

    The KV cache holds the prompt of `messages[:-1]` and then the answer as the model wrote it,
    without its end token. Appending the returned text gives the rendering of the whole
    conversation with `new_messages`, opening of the next answer included: it closes the answer's
    turn and adds what follows. White space in answers may differ from what the template would
    write (many trim it, or set reasoning off with empty lines): the model has seen its own, and
    it stays.

    Args:
        template: the model's.
        messages: the conversation so far; the last one is the assistant's answer.
        new_messages: what follows it, usually one user message.
        answer: the text in the cache, where it differs from `messages[-1]["content"]` (a parsed
            tool call, reasoning kept apart).
        prompt: the text in the cache before the answer; None if it is what the template renders
            now. White space may differ in it, as earlier calls of this function leave it.
        **options: as given to `render` for the cached prompt: tools, documents, extra variables.

    Returns:
        The text, or None when the new rendering does not begin with what is cached, because the
        template strips or rewrites earlier turns (reasoning, an old date): prefill it anew then.

    Raises:
        UsageError: no messages, or the last one is not the assistant's.
        TemplateError: see `ChatTemplate.render`.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise UsageError("the conversation so far must end with the assistant's answer")
    *earlier, last = messages
    if answer is None:
        answer = last.get("content")
    if not isinstance(answer, str):
        raise UsageError("the assistant's answer must be text")
    before = template.render(earlier, **options)
    if prompt is not None and "".join(prompt.split()) != "".join(before.split()):
        return None
    whole = template.render([*messages, *new_messages], **options)
    if not whole.startswith(before):
        return None
    if answer and whole.startswith(answer, len(before)):
        return whole[len(before) + len(answer) :]

    # The template may trim the answer. A mark in its place shows where the answer's turn goes on;
    # the answer itself must come out whole between the two.
    mark = f"answer-{secrets.token_hex(16)}"
    marked = template.render([*earlier, {**last, "content": mark}, *new_messages], **options)
    head, _, suffix = marked.partition(mark)
    if not head.startswith(before) or mark in suffix:
        return None
    end = len(whole) - len(suffix)
    if not suffix or end < len(before) or not whole.endswith(suffix):
        return None
    written = whole[len(before) : end]
    return suffix if "".join(written.split()) == "".join(answer.split()) else None


def check_messages(messages: Sequence[Message]) -> None:
    """Raise UsageError unless these are messages that `ChatTemplate.render` takes."""
    _checked_messages(messages)


def _checked_messages(messages: Sequence[Message]) -> list[Any]:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise UsageError(f"messages must be a list of dicts; got {type(messages).__name__}")
    if not messages:
        raise UsageError("a conversation needs at least one message")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f'message {i + 1} must be a dict with a "role"; got {short(message)}')
        plain = _plain({k: v for k, v in message.items() if v is not None}, f"message {i + 1}")
        checked.append(_with_reasoning(plain))
    return checked


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates look for."""
    given = [message[name] for name in REASONING if name in message]
    if not given:
        return message
    return {"thinking": given[0], **message, "reasoning_content": given[0]}


def _checked_dicts(items: Sequence[Mapping[str, Any]] | None, name: str) -> list[Any] | None:
    if items is None:
        return None
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Sequence):
        raise UsageError(f"{name} must be a list of dicts; got {type(items).__name__}")
    for item in items:
        if not isinstance(item, Mapping):
            raise UsageError(f"{name} must be a list of dicts; got {short(item)} in it")
    return _plain(items, name)


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON's types alone: a template gets no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    # A subclass (an enum, a NumPy scalar) is reduced to its plain value, whatever its str() says.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise UsageError(
        f"{where}: a chat template takes text, numbers, lists and dicts; got {short(value)}"
    )
