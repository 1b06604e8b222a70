"""POST /v1/completions: what follows a text.

`echo`, `suffix` and `best_of` are refused, unless they ask for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, field_validator

from mlxkv.engine.messages import Answer, Ask, Engine
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Chunk, TokenLogprobs
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import Limit, TopLogprobs, Whole, seconds
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import LocalModel, present
from mlxkv.server.openai.fields import ResponseFormat, Streamed, format_grammar
from mlxkv.server.openai.respond import respond, several, usage
from mlxkv.server.requests import build_request
from mlxkv.server.results import AnswerState, finite, new_id

Tokens = Annotated[list[Whole], Field(min_length=1)]


class CompletionRequest(Streamed):
    """Texts to go on from."""

    model: str
    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Tokens], Field(min_length=1)]
    )
    max_tokens: Limit = Field(
        None, description="Left out or -1, the answer may be as long as the context allows."
    )
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = Field(None, description="Prompts are not echoed.")
    suffix: None = Field(None, description="Nothing is filled in before a suffix.")
    logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = Field(None, description="As in chat completions.")

    @field_validator("echo", "suffix", "best_of", mode="before")
    @classmethod
    def _not_supported(cls, value: Any, info: Any) -> Any:
        if value in (None, False, "") or (info.field_name == "best_of" and value == 1):
            return None
        raise ValueError("not supported")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [given]  # pyright: ignore[reportReturnType]
        return list(given)  # pyright: ignore[reportReturnType]

    def asks(self, model: LocalModel, owner: str) -> list[Ask]:
        """What the engine is asked: `n` answers to the first prompt, then to the next.

        Raises:
            UsageError: an empty prompt.
        """
        if not all(self.prompts):
            raise UsageError("the prompt is empty")
        n = self.n or 1
        if len(self.prompts) * n > 1024:
            raise UsageError("too many prompts")
        keep_alive_s = seconds(self.keep_alive)
        asks: list[Ask] = []
        for prompt in self.prompts:
            request = build_request(
                prompt,
                max_tokens=self.max_tokens,
                logprobs=self.logprobs,
                format=format_grammar(self.response_format),
                **self.sampling_options(),
            )
            asks += several(model.ask(request, owner, keep_alive_s), n)
        return asks


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The route of completions."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Go on from a text."""
        note(request, body)
        asks = body.asks(await present(engine, config, body.model), request.state.owner)
        return await respond(request, engine, config, asks, CompletionReply(body), body.stream)

    return routes


class CompletionReply:
    """The response to one request.

    Args:
        body: the request.
    """

    def __init__(self, body: CompletionRequest):
        self._body = body
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response in one piece."""
        progress = [AnswerState() for _ in answers]
        texts: list[list[str]] = [[] for _ in answers]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in answers]
        async for i, chunk in sse.merge(answers):
            progress[i].take(chunk)
            texts[i].append(all_text(chunk))
            logprobs[i] += [chunk.logprobs] if chunk.logprobs else []
        choices = [
            self._choice(i, "".join(texts[i]), logprobs[i], 0, **each.finish)
            for i, each in enumerate(progress)
        ]
        return {**self._head, "choices": choices, "usage": usage(progress, self._body.n or 1)}

    async def events(self, answers: Sequence[Answer]) -> sse.Events:
        """The response as server-sent events."""
        progress = [AnswerState() for _ in answers]
        offsets = [0] * len(answers)
        null_usage = {"usage": None} if self._body.wants_usage else {}
        async for i, chunk in sse.merge(answers):
            progress[i].take(chunk)
            logprobs, ended = [chunk.logprobs] if chunk.logprobs else [], {}
            if chunk.finish_reason is not None:
                ended = progress[i].finish
            if not (chunk.text or logprobs or ended):
                continue
            choice = self._choice(i, all_text(chunk), logprobs, offsets[i], **ended)
            offsets[i] += sum(len(each.text) for each in logprobs)
            yield sse.event({**self._head, "choices": [choice], **null_usage})
        if self._body.wants_usage:
            used = usage(progress, self._body.n or 1)
            yield sse.event({**self._head, "choices": [], "usage": used})
        yield sse.DONE

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenLogprobs], offset: int, **finish: Any
    ) -> dict[str, Any]:
        logprobs = _logprobs(tokens, offset) if self._body.logprobs is not None and tokens else None
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": None}
        return {**choice, **finish}


def all_text(chunk: Chunk) -> str:
    """What follows a text is all text."""
    return (chunk.reasoning or "") + chunk.text + "".join(call.text for call in chunk.tool_calls)


def _logprobs(tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
    """The shape of completions.

    Args:
        tokens: of the text.
        offset: characters of the text before them.
    """
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [{top.text: finite(top.logprob) for top in each.top} for each in tokens],
        "text_offset": offsets,
    }
