"""Requests of Anthropic's Messages API.

Fields that are not here are refused. These are taken and change nothing:

- `cache_control`, everywhere: prefixes are kept and found again by themselves.
- `metadata`, `service_tier`, `speed` "standard": there is one user and one tier.
- `signature` of thinking, `citations` and `caller` of blocks that come back.
- `thinking.budget_tokens`, but that it must leave room for an answer: models have no such limit.
- `eager_input_streaming` of tools: calls are shown when they are complete.

Without `thinking` it is the model that decides; where it thinks, its thinking is shown.
`output_config.effort` is what its template calls `reasoning_effort`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mlxkv.sampling.grammar import Grammar
from mlxkv.sampling.params import PARAMETERS
from mlxkv.server.fields import Count, Refused, StopTexts, Strict, sampled
from mlxkv.server.tools import Function, Name, chosen_tools, tools_grammar


class CacheControl(Strict):
    """A mark for a cache that needs none."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Strict):
    """What all blocks may have."""

    cache_control: CacheControl | None = Field(default=None, description="Without effect.")


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: Refused = None


class ThinkingBlock(Block):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(default=None, description="Without effect.")


class ToolUseBlock(Block):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=256)]
    name: Name
    input: dict[str, Any]
    caller: dict[str, Any] | None = Field(default=None, description="Without effect.")


class OtherBlock(BaseModel):
    """Blocks that are refused: models here read text."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal[
        "image", "document", "search_result", "redacted_thinking", "server_tool_use",
        "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
        "container_upload", "tool_reference",
    ]  # fmt: skip

    @model_validator(mode="after")
    def _refuse(self) -> OtherBlock:
        raise ValueError(f"{self.type} blocks are not supported: models here read text")


class ToolResultBlock(Block):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock | OtherBlock, Field(discriminator="type")]] | None = (
        None
    )
    is_error: bool | None = None


ContentBlock = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock | OtherBlock,
    Field(discriminator="type"),
]


class Message(Strict):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class Tool(Block):
    """A function that the model may call; tools that a server runs are refused."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(
        default=None, description="Calls keep to the schema where tool_choice is any or tool."
    )
    eager_input_streaming: bool | None = Field(default=None, description="Without effect.")
    defer_loading: Refused = None
    input_examples: Refused = None
    allowed_callers: list[Literal["direct"]] | None = None

    def function(self) -> Function:
        """The same as a function of OpenAI's."""
        return Function(
            name=self.name,
            description=self.description,
            parameters=self.input_schema,
            strict=self.strict,
        )


class AutoChoice(Strict):
    """The model decides whether to call."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Strict):
    """Some tool has to be called."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Strict):
    """This tool has to be called."""

    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class NoChoice(Strict):
    """No tool may be called."""

    type: Literal["none"]


class ThinkingOn(Strict):
    """Think before the answer."""

    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=1024, le=2**31 - 1)]
    display: Literal["summarized", "omitted"] | None = None


class ThinkingOff(Strict):
    """Answer at once."""

    type: Literal["disabled"]


class ThinkingAdaptive(Strict):
    """As the model decides."""

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high"] | None = None
    format: JsonFormat | None = None


class Metadata(Strict):
    """About the user; without effect."""

    user_id: str | None = None


class CountRequest(Strict):
    """A conversation."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: (
        Annotated[AutoChoice | AnyChoice | ToolChoice | NoChoice, Field(discriminator="type")]
        | None
    ) = None
    thinking: (
        Annotated[ThinkingOn | ThinkingOff | ThinkingAdaptive, Field(discriminator="type")] | None
    ) = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(default=None, description="Without effect.")
    speed: Literal["standard"] | None = None
    container: None = None
    context_management: Refused = None
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
        return chosen_tools([tool.function() for tool in self.tools or ()], mode, None)

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
        allowed = chosen_tools(functions, mode, named)
        return tools_grammar(allowed, mode, self.parallel, content)


_SAMPLING = {name: name for name, parameter in PARAMETERS.items() if parameter.anthropic}


class MessagesRequest(CountRequest, sampled(_SAMPLING)):
    """A conversation to be answered."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: StopTexts | None = None
    metadata: Metadata | None = Field(default=None, description="Without effect.")
    service_tier: Literal["auto", "standard_only"] | None = None

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> MessagesRequest:
        if isinstance(self.thinking, ThinkingOn) and self.thinking.budget_tokens >= self.max_tokens:
            raise ValueError("max_tokens must be more than thinking.budget_tokens")
        return self
