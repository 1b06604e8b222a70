"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Discriminator, Field, Tag

from mlxkv.engine.messages import Answer, Ask, Engine
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Chunk
from mlxkv.parsers.events import ToolCall
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import (
    LeftOut,
    Limit,
    NoEffect,
    Part,
    Refused,
    TopLogprobs,
    only,
    seconds,
    type_of,
)
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import LocalModel, present
from mlxkv.server.openai.fields import (
    Effort,
    ResponseFormat,
    Streamed,
    format_grammar,
    reasoning_of,
)
from mlxkv.server.openai.messages import ChatMessage, template_messages
from mlxkv.server.openai.respond import chat_logprobs, respond, several, usage
from mlxkv.server.requests import build_request
from mlxkv.server.results import (
    AnswerState,
    Collected,
    arguments_of,
    broken_calls,
    call_errors,
    new_id,
    shown_logprobs,
)
from mlxkv.server.tools import Function, Name, allowed_tools, tools_grammar


class FunctionTool(Part):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class OtherTool(LeftOut):
    """A tool that is no function."""

    type: str


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")],
    Discriminator(lambda tool: "function" if type_of(tool) == "function" else "other"),
]


class NameOf(Part):
    """A function's name."""

    name: Name


class NamedChoice(Part):
    """This function has to be called."""

    type: Literal["function"]
    function: NameOf


class NamedTool(Part):
    """One of the allowed tools."""

    type: Literal["function"]
    function: NameOf


class AllowedTools(Part):
    """Those tools that may be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedChoice(Part):
    """Only these tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(Streamed):
    """A conversation to be answered."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[AnyTool], Field(max_length=512)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    functions: Refused = None
    function_call: Annotated[Any, only("none", "auto")] = None
    store: Annotated[bool | None, NoEffect()] = None
    modalities: list[Literal["text"]] | None = None

    @property
    def n_answers(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    def choice(self) -> tuple[str, list[str] | None]:
        """The mode of `tool_choice`, and the only tools that it leaves, if it names some."""
        match self.tool_choice:
            case NamedChoice():
                return "required", [self.tool_choice.function.name]
            case AllowedChoice():
                allowed = self.tool_choice.allowed_tools
                return allowed.mode, [tool.function.name for tool in allowed.tools]
        return self.tool_choice or "auto", None

    def limit(self) -> int | None:
        """Length of the answer.

        Raises:
            UsageError: its two names say two things.
        """
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise UsageError("max_tokens and max_completion_tokens are one thing: give one")
        return max((n for n in given if n is not None), default=None)

    def ask(self, model: LocalModel, owner: str) -> Ask:
        """What the engine is asked; the same but for the seed, for all of `n`.

        Raises:
            UsageError: fields that do not go together.
        """
        mode, named = self.choice()
        functions = [tool.function for tool in self.tools or () if isinstance(tool, FunctionTool)]
        tools = allowed_tools(functions, mode, named)
        parallel = self.parallel_tool_calls is not False
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs: true")
        request = build_request(
            template_messages(self.messages),
            max_tokens=self.limit(),
            think=reasoning_of(self.think, self.reasoning_effort),
            tools=[tool.schema_of() for tool in tools] or None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            format=tools_grammar(tools, mode, parallel, format_grammar(self.response_format)),
            **self.sampling_options(),
        )
        return model.ask(request, owner, seconds(self.keep_alive))


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The route of chat completions."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        note(request, body)
        ask = body.ask(await present(engine, config, body.model), request.state.owner)
        asks = several(ask, body.n_answers)
        return await respond(request, engine, config, asks, ChatReply(body), body.stream)

    return routes


class ChatReply:
    """The response to one request.

    Args:
        body: the request.
    """

    def __init__(self, body: ChatRequest):
        self._body = body
        self._id, self._created = new_id("chatcmpl"), int(time.time())

    def _new(self) -> AnswerState:
        return AnswerState(parallel=self._body.parallel_tool_calls is not False)

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response in one piece."""
        collected = [Collected(self._new()) for _ in answers]
        async for i, chunk in sse.merge(answers):
            collected[i].add(chunk)
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(i, each) for i, each in enumerate(collected)],
            "usage": usage([each.progress for each in collected], len(answers)),
        }

    def _choice(self, index: int, answer: Collected) -> dict[str, Any]:
        text, reasoning = "".join(answer.text), "".join(answer.reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not answer.calls else None,
            "refusal": None,
        }
        if reasoning:
            message["reasoning_content"] = reasoning
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": arguments_of(call)},
                }
                for call in answer.calls
            ]
        if answer.errors:
            message["tool_call_errors"] = call_errors(answer.errors)
        logprobs = chat_logprobs(answer.logprobs) if self._body.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, **answer.progress.finish}

    async def events(self, answers: Sequence[Answer]) -> sse.Events:
        """The response as server-sent events."""
        progress = [self._new() for _ in answers]
        begun: set[int] = set()
        async for i, chunk in sse.merge(answers):
            if i not in begun:
                begun.add(i)
                yield self._event(i, {"role": "assistant", "content": ""})
            n_before = progress[i].n_calls
            calls = progress[i].take(chunk)
            logprobs = shown_logprobs(chunk) if self._body.logprobs else []
            for delta in _deltas(chunk, calls, n_before):
                yield self._event(i, delta, logprobs)
                logprobs = []
            if logprobs:
                yield self._event(i, {}, logprobs)
            if chunk.finish_reason is not None:
                yield self._event(i, {}, **progress[i].finish)
        if self._body.wants_usage:
            head = self._head("chat.completion.chunk")
            yield sse.event({**head, "choices": [], "usage": usage(progress, len(answers))})
        yield sse.DONE

    def _event(self, index: int, delta: dict[str, Any], logprobs: Any = (), **finish: Any) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(logprobs) if logprobs else None,
            "finish_reason": None,
            **finish,
        }
        null_usage = {"usage": None} if self._body.wants_usage else {}
        return sse.event({**self._head("chat.completion.chunk"), "choices": [choice], **null_usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._body.model,
        }


def _deltas(chunk: Chunk, calls: Sequence[ToolCall], index: int) -> list[dict[str, Any]]:
    """What a chunk adds: reasoning, text, calls by name, then their arguments.

    Args:
        chunk: a step of the answer.
        calls: those of it that the client gets.
        index: of the first of them.
    """
    deltas: list[dict[str, Any]] = []
    if chunk.reasoning:
        deltas.append({"reasoning_content": chunk.reasoning})
    if chunk.text:
        deltas.append({"content": chunk.text})
    for call in broken_calls(chunk):
        deltas.append({"content": call.text, "tool_call_errors": call_errors([call])})
    for i, call in enumerate(calls, index):
        named = {"name": call.name, "arguments": ""}
        head = {"index": i, "id": call.id, "type": "function", "function": named}
        deltas.append({"tool_calls": [head]})
        arguments = {"index": i, "function": {"arguments": arguments_of(call)}}
        deltas.append({"tool_calls": [arguments]})
    return deltas
