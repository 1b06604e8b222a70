"""What POST /v1/responses takes, and the engine's request that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mlxkv.engine.messages import Ask
from mlxkv.errors import UsageError
from mlxkv.server.fields import Limit, NoEffect, Part, TopLogprobs, seconds
from mlxkv.server.model_names import LocalModel
from mlxkv.server.openai.fields import (
    Conversing,
    Effort,
    GrammarFormat,
    JsonObjectFormat,
    RegexFormat,
    Sampling,
    SchemaOf,
    TextFormat,
    format_grammar,
    reasoning_of,
)
from mlxkv.server.openai.response_items import Item, item_messages
from mlxkv.server.openai.response_tools import AnyTool, callees
from mlxkv.server.requests import build_request
from mlxkv.server.tools import Name, tool_options

LOGPROBS = "message.output_text.logprobs"


class NamedTool(Part):
    """A tool by its name."""

    type: Literal["function", "custom"]
    name: Name


class AllowedChoice(Part):
    """Only these tools may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class NamedSchema(SchemaOf):
    """JSON that follows a schema."""

    type: Literal["json_schema"]


TextFormats = Annotated[
    TextFormat | JsonObjectFormat | NamedSchema | RegexFormat | GrammarFormat,
    Field(discriminator="type"),
]


class TextOptions(Part):
    """How the answer looks."""

    format: TextFormats | None = None
    verbosity: Annotated[str | None, NoEffect()] = None


class ReasoningOptions(Part):
    """How much the model thinks. Summaries are not made: all of the reasoning comes."""

    effort: Effort | None = None
    summary: Annotated[str | None, NoEffect()] = None
    generate_summary: Annotated[str | None, NoEffect()] = None


class ResponseStreamOptions(Part):
    """What a stream has besides the response."""

    include_obfuscation: Annotated[bool | None, NoEffect()] = None


class ResponseRequest(Sampling, Conversing):
    """Items to answer."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Limit = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[AnyTool], Field(max_length=512)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedChoice | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[str] | None = None
    store: bool | None = Field(None, description="Kept for an hour, in memory; true if left out.")
    background: bool | None = Field(
        None, description="Answered without a connection, also after the server starts again."
    )
    previous_response_id: str | None = None
    conversation: None = Field(None, description="Send the items instead.")

    @property
    def wants_logprobs(self) -> bool:
        """Whether messages have log-probabilities."""
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    def choice(self) -> tuple[str, list[str] | None]:
        """The mode of `tool_choice`, and the names of the tools that it allows; None for all."""
        match self.tool_choice:
            case NamedTool():
                return "required", [self.tool_choice.name]
            case AllowedChoice():
                return self.tool_choice.mode, [tool.name for tool in self.tool_choice.tools]
        return self.tool_choice or "auto", None

    @property
    def is_parallel(self) -> bool:
        """Whether an answer may have several calls: a tool that is named is called once."""
        is_named = isinstance(self.tool_choice, NamedTool)
        return self.parallel_tool_calls is not False and not is_named

    def check(self) -> None:
        """Raises UsageError: fields that contradict each other."""
        if self.background and self.store is False:
            raise UsageError("background needs store: true: its answer is fetched later")

    def ask(self, model: LocalModel, owner: str, items: Sequence[Any]) -> Ask:
        """What the engine is asked.

        Args:
            model: to which.
            owner: whose request it is.
            items: the whole conversation.

        Raises:
            UsageError: fields that contradict each other.
        """
        self.check()
        mode, named = self.choice()
        n_given = 1 if isinstance(self.input, str) else len(self.input)
        messages = item_messages(items, self.instructions, len(items) - n_given)
        if all(message["role"] == "system" for message in messages):
            raise UsageError("input has no message to answer")
        last = messages[-1]
        request = build_request(
            messages,
            max_tokens=self.max_output_tokens,
            think=reasoning_of(self.think, self.reasoning and self.reasoning.effort),
            go_on=self.go_on(last["role"] == "assistant" and not last.get("tool_calls")),
            truncate=True if self.truncation == "auto" else None,
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            template_options=self.chat_template_kwargs or None,
            **tool_options(
                [each.function for each in callees(self.tools or ())],
                mode,
                named,
                parallel=self.is_parallel,
                content=format_grammar(self.text and self.text.format),
            ),
            **self.sampling_options(),
        )
        return model.ask(request, owner, seconds(self.keep_alive))
