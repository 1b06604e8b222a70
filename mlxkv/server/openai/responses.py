"""POST /v1/responses.

Nothing is stored: `store: true`, `previous_response_id`, `conversation` and `background` are
refused, and every response says `store: false`. A conversation is sent as its items, and its KV is
found by their tokens. `include` may name reasoning and log-probabilities; reasoning comes in the
clear, as the content of its item.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from mlxkv.engine.messages import Answer, Ask, Engine
from mlxkv.errors import UsageError
from mlxkv.sampling.grammar import Grammar
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.errors import RESPONSES, failure_of
from mlxkv.server.fields import Limit, Strict, TopLogprobs, seconds
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import LocalModel, present
from mlxkv.server.openai.fields import (
    Effort,
    GrammarFormat,
    JsonObjectFormat,
    RegexFormat,
    Sampling,
    SchemaOf,
    TextFormat,
    format_grammar,
    json_schema_grammar,
    reasoning_of,
)
from mlxkv.server.openai.respond import respond, usage
from mlxkv.server.openai.response_items import Item, item_messages
from mlxkv.server.openai.response_output import Event, Output, new_id
from mlxkv.server.requests import requested
from mlxkv.server.results import Progress
from mlxkv.server.tools import Function, Name, chosen_tools, tools_grammar

LOGPROBS = "message.output_text.logprobs"


class FunctionTool(Function):
    """A tool: a function; OpenAI's own tools are refused."""

    type: Literal["function"]


class NamedTool(Strict):
    """A function by its name."""

    type: Literal["function"]
    name: Name


class AllowedChoice(Strict):
    """Only these tools may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class NamedSchema(SchemaOf):
    """JSON of a schema."""

    type: Literal["json_schema"]


TextFormats = Annotated[
    TextFormat | JsonObjectFormat | NamedSchema | RegexFormat | GrammarFormat,
    Field(discriminator="type"),
]


class TextOptions(Strict):
    """How the answer looks."""

    format: TextFormats | None = None
    verbosity: Literal["medium"] | None = Field(None, description="There is no other.")


class ReasoningOptions(Strict):
    """How much the model thinks. Summaries are not made: all of the reasoning comes."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(Strict):
    """What a stream holds besides."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Sampling):
    """Items to be answered."""

    model: str
    input: Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Limit = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=512)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = (
        None
    )
    store: Literal[False] | None = Field(None, description="Responses are not stored.")
    background: Literal[False] | None = None
    previous_response_id: None = Field(None, description="Send the items instead.")
    conversation: None = Field(None, description="Send the items instead.")

    @property
    def wants_logprobs(self) -> bool:
        """Whether messages show their log-probabilities."""
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    def choice(self) -> tuple[str, list[str] | None]:
        """The mode of `tool_choice`, and the only tools that it leaves, if it names some."""
        match self.tool_choice:
            case NamedTool():
                return "required", [self.tool_choice.name]
            case AllowedChoice():
                return self.tool_choice.mode, [tool.name for tool in self.tool_choice.tools]
        return self.tool_choice or "auto", None

    def ask(self, model: LocalModel, owner: str) -> Ask:
        """What the engine is asked.

        Raises:
            UsageError: fields that do not go together.
        """
        mode, named = self.choice()
        tools = chosen_tools(self.tools or (), mode, named)
        messages = item_messages(self.input, self.instructions)
        if all(message["role"] == "system" for message in messages):
            raise UsageError("input holds no message to answer")
        parallel = self.parallel_tool_calls is not False
        request = requested(
            messages,
            max_tokens=self.max_output_tokens,
            think=reasoning_of(self.think, self.reasoning and self.reasoning.effort),
            tools=[tool.schema_of() for tool in tools] or None,
            truncate=True if self.truncation == "auto" else None,
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            format=tools_grammar(tools, mode, parallel, self._grammar()),
            **self.sampling_options(),
        )
        return model.ask(request, owner, seconds(self.keep_alive))

    def _grammar(self) -> Grammar | None:
        given = self.text and self.text.format
        if isinstance(given, NamedSchema):
            return json_schema_grammar(given)
        return format_grammar(given)


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The route of responses."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.post("/v1/responses")
    async def responses(request: Request, body: ResponseRequest) -> Response:
        """Answer items with items."""
        ask = body.ask(await present(engine, config, body.model), request.state.owner)
        reply = ResponseReply(body)
        return await respond(request, engine, config, [ask], reply, body.stream, reply.failed)

    return routes


class ResponseReply:
    """The response to one request.

    Args:
        body: the request.
    """

    def __init__(self, body: ResponseRequest):
        self._body = body
        self._id, self._created = new_id("resp"), int(time.time())
        self._output = Output(
            Progress(parallel=body.parallel_tool_calls is not False), body.wants_logprobs
        )
        self._n_events = 0

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response in one piece."""
        async for _, chunk in sse.merged(answers):
            self._output.take(chunk)
        self._output.close(self._ended())
        return self._response(self._ended())

    async def events(self, answers: Sequence[Answer]) -> sse.Events:
        """The response as server-sent events."""
        begun = False
        async for _, chunk in sse.merged(answers):
            if not begun:
                begun = True
                for kind in ("created", "in_progress"):
                    yield self._lifecycle(kind, self._response("in_progress"))
            for event in self._output.take(chunk):
                yield self._event(event)
        status = self._ended()
        for event in self._output.close(status):
            yield self._event(event)
        yield self._lifecycle(status, self._response(status))

    def failed(self, error: BaseException) -> bytes:
        """The end of a stream that failed."""
        failure = failure_of(error, RESPONSES)
        code = failure.code or ("server_error" if failure.status >= 500 else "invalid_prompt")
        said = {"code": code, "message": failure.message}
        return self._lifecycle("failed", {**self._response("failed"), "error": said})

    def _event(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": self._n_events}
        self._n_events += 1
        return sse.event(numbered, event["type"])

    def _lifecycle(self, kind: str, response: dict[str, Any]) -> bytes:
        return self._event({"type": f"response.{kind}", "response": response})

    def _ended(self) -> str:
        return "incomplete" if self._output.progress.finish_reason == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        body, progress = self._body, self._output.progress
        incomplete = None
        if status == "incomplete":
            why = progress.finish.get("finish_details", {})
            incomplete = {"reason": "max_output_tokens", **why}
        shown = body.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": list(self._output.items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": shown.get("temperature"),
            "text": shown.get("text") or {"format": {"type": "text"}},
            "tool_choice": shown.get("tool_choice", "auto"),
            "tools": shown.get("tools", []),
            "top_p": shown.get("top_p"),
            "truncation": body.truncation or "disabled",
            "usage": None if status in ("in_progress", "failed") else _usage(progress),
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _usage(progress: Progress) -> dict[str, Any]:
    """Tokens under the names of responses."""
    used = usage([progress])
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": used["prompt_tokens_details"],
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": used["completion_tokens_details"],
        "total_tokens": used["total_tokens"],
    }
