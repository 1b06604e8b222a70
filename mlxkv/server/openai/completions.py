"""POST /v1/completions: continue a text.

`echo`, `suffix` and `best_of` are refused unless their value means "off".
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
    """One or more texts to continue."""

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
    suffix: None = Field(None, description="Not supported.")
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
        """The prompts as a list."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else list(self.prompt)  # pyright: ignore[reportReturnType]

    def asks(self, model: LocalModel, owner: str) -> list[Ask]:
        """The requests to the engine: `n` for the first prompt, then for the next.

        Raises:
            UsageError: an empty prompt, or too many prompts.
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
    """The route for completions."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        note(request, body)
        asks = body.asks(await present(engine, config, body.model), request.state.owner)
        return await respond(request, engine, config, asks, CompletionReply(body), body.stream)

    return routes


class CompletionReply:
    """Writes the response to `body`."""

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
        async for i, chunk in sse.merge(answers):
            progress[i].take(chunk)
            logprobs = [chunk.logprobs] if chunk.logprobs else []
            ended = progress[i].finish if chunk.finish_reason is not None else {}
            text = all_text(chunk)
            if not (text or logprobs or ended):
                continue
            choice = self._choice(i, text, logprobs, offsets[i], **ended)
            offsets[i] += sum(len(each.text) for each in logprobs)
            yield sse.event({**self._head, "choices": [choice], **self._body.usage_of(progress[i])})
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
    """A chunk's reasoning, text and calls as text: a completion has no other kinds."""
    return (chunk.reasoning or "") + chunk.text + "".join(call.text for call in chunk.tool_calls)


def _logprobs(tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
    """Log-probabilities of tokens that follow `offset` characters, as completions show them."""
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
