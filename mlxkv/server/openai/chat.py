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
from mlxkv.server.model_names import LocalModel
from mlxkv.server.openai.fields import (
    Conversing,
    Effort,
    ResponseFormat,
    Streamed,
    format_grammar,
    reasoning_of,
)
from mlxkv.server.openai.messages import ChatMessage, template_messages
from mlxkv.server.openai.respond import asked, chat_logprobs, respond, several, usage
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
from mlxkv.server.tools import Function, Name, tool_options


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


class NamedTool(Part):
    """A tool by its function's name; as `tool_choice`, the tool that must be called."""

    type: Literal["function"]
    function: NameOf


class AllowedTools(Part):
    """The tools that may be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedChoice(Part):
    """Only these tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(Streamed, Conversing):
    """A conversation to answer."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[AnyTool], Field(max_length=512)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedChoice | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    functions: Refused = None
    function_call: Annotated[Any, only("none", "auto")] = None
    store: Annotated[bool | None, NoEffect()] = None
    modalities: list[Literal["text"]] | None = None

    def choice(self) -> tuple[str, list[str] | None]:
        """The mode of `tool_choice`, and the names of the tools that it allows; None for all."""
        match self.tool_choice:
            case NamedTool():
                return "required", [self.tool_choice.function.name]
            case AllowedChoice():
                allowed = self.tool_choice.allowed_tools
                return allowed.mode, [tool.function.name for tool in allowed.tools]
        return self.tool_choice or "auto", None

    @property
    def is_parallel(self) -> bool:
        """Whether an answer may have several calls: a tool that is named is called once."""
        is_named = isinstance(self.tool_choice, NamedTool)
        return self.parallel_tool_calls is not False and not is_named

    def limit(self) -> int | None:
        """Tokens of the answer at most.

        Raises:
            UsageError: the two names of the field have different values.
        """
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise UsageError("max_tokens and max_completion_tokens are one field: give one")
        return self.max_tokens or self.max_completion_tokens

    def ask(self, model: LocalModel, owner: str) -> Ask:
        """The request to the engine, for the first of `n` answers.

        Raises:
            UsageError: fields that contradict each other.
        """
        mode, named = self.choice()
        last = self.messages[-1]
        functions = [tool.function for tool in self.tools or () if isinstance(tool, FunctionTool)]
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs: true")
        request = build_request(
            template_messages(self.messages),
            max_tokens=self.limit(),
            think=reasoning_of(self.think, self.reasoning_effort),
            go_on=self.go_on(last.role == "assistant" and not last.tool_calls),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            template_options=self.chat_template_kwargs or None,
            **tool_options(
                functions,
                mode,
                named,
                parallel=self.is_parallel,
                content=format_grammar(self.response_format),
            ),
            **self.sampling_options(),
        )
        return model.ask(request, owner, seconds(self.keep_alive))


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The route for chat completions."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        note(request, body)
        asks = several(await asked(request, engine, config, body), body.n or 1)
        return await respond(request, engine, config, asks, ChatReply(body), body.stream)

    return routes


class ChatReply:
    """Writes the response to `body`."""

    def __init__(self, body: ChatRequest):
        self._body = body
        self._id, self._created = new_id("chatcmpl"), int(time.time())

    def _new(self) -> AnswerState:
        return AnswerState(parallel=self._body.is_parallel)

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
            n_before = progress[i].n_calls
            calls = progress[i].take(chunk)
            used = self._body.usage_of(progress[i])
            if i not in begun:
                begun.add(i)
                yield self._event(i, {"role": "assistant", "content": ""}, used)
            logprobs = shown_logprobs(chunk) if self._body.logprobs else []
            for delta in _deltas(chunk, calls, n_before):
                yield self._event(i, delta, used, logprobs)
                logprobs = []
            if logprobs:
                yield self._event(i, {}, used, logprobs)
            if chunk.finish_reason is not None:
                yield self._event(i, {}, used, **progress[i].finish)
        if self._body.wants_usage:
            head = self._head("chat.completion.chunk")
            yield sse.event({**head, "choices": [], "usage": usage(progress, len(answers))})
        yield sse.DONE

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        used: dict[str, Any],
        logprobs: Any = (),
        **finish: Any,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(logprobs) if logprobs else None,
            "finish_reason": None,
            **finish,
        }
        return sse.event({**self._head("chat.completion.chunk"), "choices": [choice], **used})

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created}
        return {**head, "model": self._body.model}


def _deltas(chunk: Chunk, calls: Sequence[ToolCall], index: int) -> list[dict[str, Any]]:
    """The deltas of a chunk: reasoning, text, then each call's name and its arguments.

    Args:
        chunk: a step of the answer.
        calls: its calls that the client gets.
        index: number of the first of them.
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
