"""Requests of Anthropic's Messages API.

- `cache_control` changes nothing: prefixes are kept and found again by themselves.
- `thinking.budget_tokens` must leave room for an answer; models have no such limit.
- `thread`: none is kept. Anthropic's clients send the whole conversation where a thread that they
  continue is not found.
- `eager_input_streaming` of tools changes nothing: calls are shown when they are complete.
- Tools that Anthropic's server runs or defines, and the blocks that they made, are left out.

Without `thinking` the model decides, and its thinking is shown. `output_config.effort` sets the
`reasoning_effort` of its chat template.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mlxkv.sampling.grammar import Grammar
from mlxkv.sampling.params import PARAMETERS
from mlxkv.server.anthropic.blocks import Block, CacheControl, ContentBlock, TextBlock
from mlxkv.server.fields import (
    AdapterNames,
    Count,
    DrafterName,
    LeftOut,
    NoEffect,
    Part,
    Refused,
    StopTexts,
    sampled,
    type_of,
)
from mlxkv.server.tools import Function, Name, tool_options


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
        default=None, description="With tool_choice any or tool, calls follow the schema."
    )
    eager_input_streaming: Annotated[bool | None, NoEffect()] = None
    defer_loading: Annotated[bool | None, NoEffect()] = None
    input_examples: Annotated[list[Any] | None, NoEffect()] = None
    allowed_callers: Annotated[list[str] | None, NoEffect()] = None

    def function(self) -> Function:
        """The tool in OpenAI's form."""
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
    """auto: the model decides whether to call a tool; any: it must call one."""

    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Part):
    """This tool has to be called."""

    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class NoChoice(Part):
    """The model may not call tools."""

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
    """The model decides whether to think."""

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    """Effort and format of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(Part):
    """Data about the user. Without effect."""

    user_id: str | None = None


class NewThread(Part):
    """Asks a server to keep the conversation."""

    type: Literal["create"]


class OldThread(Part):
    """Continues a conversation that a server keeps."""

    type: Literal["continue"]
    previous_message_id: str


class CountRequest(Part):
    """A conversation whose tokens are counted."""

    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnyTool], Field(max_length=512)] | None = None
    tool_choice: (
        Annotated[AutoChoice | ToolChoice | NoChoice, Field(discriminator="type")] | None
    ) = None
    thinking: (
        Annotated[ThinkingOn | ThinkingOff | ThinkingAdaptive, Field(discriminator="type")] | None
    ) = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="More variables of the model's chat template."
    )
    cache_control: Annotated[CacheControl | None, NoEffect()] = None
    speed: Literal["standard"] | None = None
    mcp_servers: Refused = None

    @property
    def parallel(self) -> bool:
        """Whether an answer may have several calls: a tool that is named is called once."""
        if isinstance(self.tool_choice, ToolChoice):
            return False
        return not getattr(self.tool_choice, "disable_parallel_tool_use", False)

    @property
    def shows_thinking(self) -> bool:
        """Whether the answer includes the model's thinking."""
        how = self.thinking
        return not isinstance(how, ThinkingOn | ThinkingAdaptive) or how.display != "omitted"

    @property
    def think(self) -> bool | str | None:
        """The value of `Request.think`."""
        effort = self.output_config.effort if self.output_config else None
        effort = "high" if effort in ("xhigh", "max") else effort
        match self.thinking:
            case ThinkingOff():
                return False
            case ThinkingOn():
                return effort or True
        return effort

    def tool_options(self) -> dict[str, Any]:
        """Keywords of `Request.of` for tools, the choice among them, and the format.

        Raises:
            UsageError: two tools of one name, or a required call of an unknown tool.
        """
        form = self.output_config.format if self.output_config else None
        content = Grammar("json_schema", json.dumps(form.schema_)) if form else None
        functions = [tool.function() for tool in self.tools or () if isinstance(tool, Tool)]
        mode, named = "auto", None
        match self.tool_choice:
            case AutoChoice(type="any"):
                mode = "required"
            case ToolChoice():
                mode, named = "required", [self.tool_choice.name]
            case NoChoice():
                mode = "none"
        return tool_options(functions, mode, named, parallel=self.parallel, content=content)


_SAMPLING = {name: name for name in PARAMETERS}


class MessagesRequest(CountRequest, sampled(_SAMPLING)):
    """A conversation to be answered."""

    max_tokens: Count
    draft: DrafterName | None = None
    adapter: AdapterNames | None = None
    stream: bool | None = None
    stop_sequences: StopTexts | None = None
    metadata: Annotated[Metadata | None, NoEffect()] = None
    service_tier: Literal["auto", "standard_only"] | None = None
    thread: Annotated[
        Annotated[NewThread | OldThread, Field(discriminator="type")] | None, NoEffect()
    ] = Field(None, description="No thread is kept: `continue` is a 404 thread_not_found.")

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> MessagesRequest:
        if isinstance(self.thinking, ThinkingOn) and self.thinking.budget_tokens >= self.max_tokens:
            raise ValueError("max_tokens must be more than thinking.budget_tokens")
        return self
