"""POST /v1/responses, and what is kept of them for an hour (`response_store`).

`conversation` and `background` are refused. Reasoning comes in the clear, as the content of its
item, whatever `include` names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from mlxkv.engine.messages import Answer, Ask, Engine
from mlxkv.errors import UsageError
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.errors import RESPONSES, failure_of
from mlxkv.server.fields import Limit, NoEffect, Part, TopLogprobs, seconds
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import LocalModel, present
from mlxkv.server.openai.fields import (
    Effort,
    GoesOn,
    GrammarFormat,
    JsonObjectFormat,
    RegexFormat,
    Sampling,
    SchemaOf,
    TextFormat,
    format_grammar,
    reasoning_of,
)
from mlxkv.server.openai.respond import respond, usage
from mlxkv.server.openai.response_items import Item, item_messages
from mlxkv.server.openai.response_output import Event, Output, new_id
from mlxkv.server.openai.response_store import ResponseStore
from mlxkv.server.openai.response_tools import AnyTool, callees
from mlxkv.server.requests import build_request
from mlxkv.server.results import AnswerState
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


class ResponseRequest(Sampling, GoesOn):
    """Items to answer."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Limit = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[AnyTool], Field(max_length=512)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="More variables of the model's chat template."
    )
    truncation: Literal["auto", "disabled"] | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[str] | None = None
    store: bool | None = Field(None, description="Kept for an hour, in memory; true if left out.")
    background: Literal[False] | None = None
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

    def ask(self, model: LocalModel, owner: str, items: Sequence[Any]) -> Ask:
        """What the engine is asked.

        Args:
            model: to which.
            owner: whose request it is.
            items: the whole conversation.

        Raises:
            UsageError: fields that contradict each other.
        """
        mode, named = self.choice()
        messages = item_messages(items, self.instructions)
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


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The route for responses."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])
    store = ResponseStore()

    @routes.post("/v1/responses")
    async def responses(request: Request, body: ResponseRequest) -> Response:
        """Answer items with items."""
        note(request, body)
        owner = request.state.owner
        items = store.conversation(owner, body.previous_response_id, body.input)
        ask = body.ask(await present(engine, config, body.model), owner, items)
        put = partial(store.put, owner, items, goes_on=ask.request.go_on)
        keep = put if body.store is not False else None
        reply = ResponseReply(body, keep)
        return await respond(request, engine, config, [ask], reply, body.stream, reply.failed)

    @routes.get("/v1/responses/{response_id}")
    async def stored(request: Request, response_id: str) -> Response:
        """A response of the last hour."""
        found = store.get(request.state.owner, response_id)
        if found is None:
            raise HTTPException(404, f"no response with the id {response_id[:80]!r}")
        return JSONResponse(found.response)

    @routes.delete("/v1/responses/{response_id}")
    async def forget(request: Request, response_id: str) -> Response:
        """Forget a response."""
        if not store.delete(request.state.owner, response_id):
            raise HTTPException(404, f"no response with the id {response_id[:80]!r}")
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    return routes


class ResponseReply:
    """The response to one request.

    Args:
        body: the request.
        keep: takes the response at its end; None where it is not to be stored.
    """

    def __init__(self, body: ResponseRequest, keep: Callable[[dict[str, Any]], None] | None):
        self._body, self._keep = body, keep
        self._id, self._created = new_id("resp"), int(time.time())
        self._output = Output(
            AnswerState(parallel=body.is_parallel),
            body.wants_logprobs,
            {callee.function.name: callee for callee in callees(body.tools or ())},
        )
        self._n_events = 0

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response in one piece."""
        async for _, chunk in sse.merge(answers):
            self._output.take(chunk)
        self._output.close(self._ended())
        return self._kept(self._response(self._ended()))

    async def events(self, answers: Sequence[Answer]) -> sse.Events:
        """The response as server-sent events."""
        begun = False
        async for _, chunk in sse.merge(answers):
            if not begun:
                begun = True
                for kind in ("created", "in_progress"):
                    yield self._lifecycle(kind, self._response("in_progress"))
            for event in self._output.take(chunk):
                yield self._event(event)
        status = self._ended()
        for event in self._output.close(status):
            yield self._event(event)
        yield self._lifecycle(status, self._kept(self._response(status)))

    def _kept(self, response: dict[str, Any]) -> dict[str, Any]:
        if self._keep is not None:
            self._keep(response)
        return response

    def failed(self, error: BaseException) -> bytes:
        """The last event of a stream that failed."""
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
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": self._keep is not None,
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


def _usage(progress: AnswerState) -> dict[str, Any]:
    """Token counts under the Responses API's names."""
    used = usage([progress])
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": used["prompt_tokens_details"],
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": used["completion_tokens_details"],
        "total_tokens": used["total_tokens"],
    }
