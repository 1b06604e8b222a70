"""Requests of Anthropic's Messages API.

- `cache_control` changes nothing: prefixes are kept and found again by themselves.
- `thinking.budget_tokens` must leave room for an answer; models have no such limit.
- `eager_input_streaming` of tools changes nothing: calls are shown when they are complete.
- Tools that Anthropic's server runs or defines, and the blocks that they made, are left out.

Without `thinking` it is the model that decides; where it thinks, its thinking is shown.
`output_config.effort` is what its template calls `reasoning_effort`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mlxkv.sampling.grammar import Grammar
from mlxkv.sampling.params import PARAMETERS
from mlxkv.server.anthropic.blocks import Block, CacheControl, ContentBlock, TextBlock
from mlxkv.server.fields import Count, LeftOut, NoEffect, Part, Refused, StopTexts, sampled, type_of
from mlxkv.server.tools import Function, Name, allowed_tools, tools_grammar


class InputMessage(Part):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class ServerTool(LeftOut):
    """A tool that Anthropic's server runs or defines."""

    type: str


class Tool(Block):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(
        default=None, description="Calls keep to the schema where tool_choice is any or tool."
    )
    eager_input_streaming: Annotated[bool | None, NoEffect()] = None
    defer_loading: Annotated[bool | None, NoEffect()] = None
    input_examples: Annotated[list[Any] | None, NoEffect()] = None
    allowed_callers: Annotated[list[str] | None, NoEffect()] = None

    def function(self) -> Function:
        """The same as a function of OpenAI's."""
        return Function(
            name=self.name,
            description=self.description,
            parameters=self.input_schema,
            strict=self.strict,
        )


def _kind_of_tool(tool: Any) -> str:
    return "client" if type_of(tool) in (None, "custom") else "server"


AnyTool = Annotated[
    Annotated[Tool, Tag("client")] | Annotated[ServerTool, Tag("server")],
    Discriminator(_kind_of_tool),
]


class AutoChoice(Part):
    """The model decides whether to call."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Part):
    """Some tool has to be called."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Part):
    """This tool has to be called."""

    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class NoChoice(Part):
    """No tool may be called."""

    type: Literal["none"]


class ThinkingOn(Part):
    """Think before the answer."""

    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=1024, le=2**31 - 1)]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingOff(Part):
    """Answer at once."""

    type: Literal["disabled"]


class ThinkingAdaptive(Part):
    """As the model decides."""

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Part):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(Part):
    """About the user; without effect."""

    user_id: str | None = None


class CountRequest(Part):
    """A conversation."""

    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnyTool], Field(max_length=512)] | None = None
    tool_choice: (
        Annotated[AutoChoice | AnyChoice | ToolChoice | NoChoice, Field(discriminator="type")]
        | None
    ) = None
    thinking: (
        Annotated[ThinkingOn | ThinkingOff | ThinkingAdaptive, Field(discriminator="type")] | None
    ) = None
    output_config: OutputConfig | None = None
    cache_control: Annotated[CacheControl | None, NoEffect()] = None
    speed: Literal["standard"] | None = None
    mcp_servers: Refused = None

    @property
    def parallel(self) -> bool:
        """Whether several calls may come at a time."""
        choice = self.tool_choice
        if choice is None or isinstance(choice, NoChoice):
            return True
        return not choice.disable_parallel_tool_use

    @property
    def shows_thinking(self) -> bool:
        """Whether the client wants to see it."""
        how = self.thinking
        return not isinstance(how, ThinkingOn | ThinkingAdaptive) or how.display != "omitted"

    @property
    def think(self) -> bool | str | None:
        """As `Request` has it."""
        effort = self.output_config.effort if self.output_config else None
        effort = "high" if effort in ("xhigh", "max") else effort
        match self.thinking:
            case ThinkingOff():
                return False
            case ThinkingOn():
                return effort or True
        return effort

    def functions(self) -> list[Function]:
        """The tools that the model is told of.

        Raises:
            UsageError: two have one name.
        """
        mode = "none" if isinstance(self.tool_choice, NoChoice) else "auto"
        return allowed_tools(
            [tool.function() for tool in self.tools or () if isinstance(tool, Tool)], mode, None
        )

    def grammar(self) -> Grammar | None:
        """What the answer has to match.

        Raises:
            UsageError: a tool has to be called that there is not, or beside a format.
        """
        given = self.output_config.format if self.output_config else None
        content = Grammar("json_schema", json.dumps(given.schema_)) if given else None
        return self._calls(self.functions(), content)

    def _calls(self, functions: Sequence[Function], content: Grammar | None) -> Grammar | None:
        """The one place where a choice of tools becomes a grammar."""
        match self.tool_choice:
            case AnyChoice():
                mode, named = "required", None
            case ToolChoice():
                mode, named = "required", [self.tool_choice.name]
            case _:
                mode, named = "auto", None
        allowed = allowed_tools(functions, mode, named)
        return tools_grammar(allowed, mode, self.parallel, content)


_SAMPLING = {name: name for name in PARAMETERS}


class MessagesRequest(CountRequest, sampled(_SAMPLING)):
    """A conversation to be answered."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: StopTexts | None = None
    metadata: Annotated[Metadata | None, NoEffect()] = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> MessagesRequest:
        if isinstance(self.thinking, ThinkingOn) and self.thinking.budget_tokens >= self.max_tokens:
            raise ValueError("max_tokens must be more than thinking.budget_tokens")
        return self
