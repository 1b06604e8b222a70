"""A model's output, while it is written, as content, reasoning and tool calls.

    parser = parser_for(tokenizer, prompt=prompt, tools=tools)
    for token in tokens:
        for event in parser.add(words.add(token), token): ...
    for event in parser.finish(): ...

Which format a model writes is read off its chat template and its vocabulary. The `text` of all
events, joined, is the output, character for character; where it is cut makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxkv.chat.tool_prompt import style_of
from mlxkv.parsers.events import Content, Event, Markup, OutputParser, Reasoning, ToolCall

if TYPE_CHECKING:
    from mlxkv.parsers.syntax import Syntax
    from mlxkv.text.tokenizer import Tokenizer

__all__ = [
    "Content",
    "Event",
    "Markup",
    "OutputParser",
    "PlainParser",
    "Reasoning",
    "ToolCall",
    "format_of",
    "format_with_tools",
    "make_parser",
    "markers_of",
    "parser_for",
]

_THINK = ("<think>", "</think>")

# The first whose texts are all in the template is the model's.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("gemma4", ("<|channel>", "<channel|>")),
    ("functiongemma", ("<start_function_call>",)),
    ("glm", ("<tool_call>", "<arg_key>")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen_xml", ("<tool_call>", "<function=", "<parameter=")),
    ("hermes", ("<tool_call>",)),
    ("glm4", ("[gMASK]", "<|observation|>")),
    ("llama3", ("<|start_header_id|>", '"parameters"')),
    ("gemma3", ("<start_of_turn>",)),
    ("think", ("</think>",)),
)
# Without such a text in the template these tokens tell.
_VOCABULARY: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>", "<|call|>")),
    ("gemma4", ("<|channel>", "<channel|>")),
    ("think", _THINK),
)


class PlainParser:
    """All of it is content."""

    markers: frozenset[str] = frozenset()

    def add(self, text: str, token: int | None = None) -> list[Event]:
        """See `OutputParser.add`."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """See `OutputParser.finish`."""
        return []


def format_of(tokenizer: Tokenizer) -> str:
    """Name of the format in which a model writes: one of `SYNTAXES`, harmony or plain."""
    template = tokenizer.chat_template
    if template is None:
        return "plain"
    if template.is_harmony:
        return "harmony"
    source = template.source + (template.tools_source or "")
    # As templates quote it in a string of their own.
    source = source.replace('\\"', '"')
    for name, texts in _SIGNS:
        if all(text in source for text in texts):
            return name
    for name, tokens in _VOCABULARY:
        if all(tokenizer.id_of(token) is not None for token in tokens):
            return name
    return "plain"


def format_with_tools(tokenizer: Tokenizer) -> str:
    """Name of the format of a model that was told of tools.

    One whose chat template knows none is told of them in text, and calls in the form it was told.
    """
    name, template = format_of(tokenizer), tokenizer.chat_template
    if template is None or name not in ("plain", "think") or template.takes_with_tools.tools:
        return name
    return style_of(template)


def syntax_of(name: str) -> Syntax | None:
    """The markers of a format; None for harmony and plain, which are read without."""
    if name in ("harmony", "plain"):
        return None
    from mlxkv.parsers.syntaxes import SYNTAXES  # a plain answer loads none of them

    return SYNTAXES[name]


def call_opener(tokenizer: Tokenizer) -> int | None:
    """The token that begins a call and nothing else; None where the format has none."""
    syntax = syntax_of(format_with_tools(tokenizer))
    if syntax is None or syntax.call is None or syntax.call[0] == syntax.call[1]:
        return None
    return tokenizer.id_of(syntax.call[0])


def markers_of(name: str) -> frozenset[str]:
    """Texts of the tokens that mean something in a format, in calls too."""
    syntax = syntax_of(name)
    return _markers(name) if syntax is None else syntax.markers | syntax.inner


def _markers(name: str) -> frozenset[str]:
    """Those of them that are read outside of calls."""
    if (syntax := syntax_of(name)) is not None:
        return syntax.markers
    if name == "plain":
        return frozenset()
    from mlxkv.parsers.harmony import MARKERS

    return MARKERS


def make_parser(
    name: str,
    *,
    ids: Mapping[int, str] | None = None,
    prompt: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> OutputParser:
    """A parser for one answer.

    Args:
        name: what `format_of` gives.
        ids: id -> marker, for the markers that are tokens; None finds all of them by their text.
        prompt: what the model answers to: it may end in an opened block of reasoning.
        tools: what the model was told of.
    """
    if name == "plain":
        return PlainParser()
    from mlxkv.parsers.notations.tools import Tools

    syntax = syntax_of(name)
    if syntax is None:
        from mlxkv.parsers.harmony import START, HarmonyParser

        prompt = START if prompt is None else prompt
        return HarmonyParser(ids, prompt=prompt, functions=Tools(tools).names)
    from mlxkv.parsers.tagged import TaggedParser

    opened = closed = False
    if syntax.think is not None and prompt:
        # A question may hold the markers, too: only what is at the very end was opened for us.
        end = prompt.rstrip()
        label = syntax.think[0] + "thought" if syntax.labelled else syntax.think[0]
        opened, closed = end.endswith((syntax.think[0], label)), end.endswith(syntax.think[1])
    return TaggedParser(syntax, ids, Tools(tools), in_reasoning=opened, behind_reasoning=closed)


def parser_for(
    tokenizer: Tokenizer,
    *,
    prompt: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> OutputParser:
    """A parser for one answer of the model with this tokenizer; arguments as for `make_parser`.

    A marker that is a token of the vocabulary counts only as that token: feed the parser with the
    ids, and with the text of `tokenizer.stream(keep=parser.markers)`.
    """
    name = format_with_tools(tokenizer) if tools else format_of(tokenizer)
    markers = _markers(name)
    ids = {}
    if tokenizer.stream().is_live:  # else the text comes all at once, and no id with it
        ids = {i: marker for marker in markers if (i := tokenizer.id_of(marker)) is not None}
    return make_parser(name, ids=ids, prompt=prompt, tools=tools)


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether the model's format has a place for reasoning."""
    name = format_of(tokenizer)
    syntax = syntax_of(name)
    return name == "harmony" if syntax is None else syntax.think is not None
