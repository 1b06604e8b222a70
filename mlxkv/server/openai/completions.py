"""POST /v1/completions: continue a text.

`suffix` and `best_of` are refused unless their value means "off". With `echo` the prompt comes
before the answer, and with `logprobs` its tokens before the answer's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, field_validator

from mlxkv.engine.messages import Answer, Ask, Engine
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Chunk, TokenLogprobs
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import TopLogprobs, Whole, seconds
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import LocalModel, present, with_named
from mlxkv.server.openai.fields import ResponseFormat, Streamed, format_grammar
from mlxkv.server.openai.respond import respond, several, usage
from mlxkv.server.requests import build_request
from mlxkv.server.results import AnswerState, finite, new_id

_Limit = Annotated[Whole | None, BeforeValidator(lambda value: None if value == -1 else value)]
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
    max_tokens: _Limit = Field(
        None,
        description="Left out or -1, the answer may be as long as the context allows; 0 only with "
        "echo.",
    )
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: bool | None = Field(None, description="The prompt comes before the answer.")
    suffix: None = Field(None, description="Not supported.")
    logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = Field(None, description="As in chat completions.")

    @field_validator("prompt", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == [] or (isinstance(value, list) and value[0] == []):
            raise ValueError("the prompt is empty")
        return value

    @field_validator("suffix", "best_of", mode="before")
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

    def _prompt_logprobs(self, prompt: str | list[int]) -> int | None:
        """How many likeliest tokens the prompt's have; of token ids they tell the text as well."""
        if not self.echo or (self.logprobs is None and isinstance(prompt, str)):
            return None
        return self.logprobs or 0

    def asks(self, model: LocalModel, owner: str) -> list[Ask]:
        """The requests to the engine: `n` for the first prompt, then for the next.

        Raises:
            UsageError: an empty prompt, or too many prompts.
        """
        if not all(self.prompts):
            raise UsageError("the prompt is empty")
        if self.max_tokens == 0 and not self.echo:
            raise UsageError("max_tokens must be at least 1; 0 needs echo: true")
        n = self.n or 1
        if len(self.prompts) * n > 1024:
            raise UsageError("too many prompts")
        keep_alive_s = seconds(self.keep_alive)
        asks: list[Ask] = []
        for prompt in self.prompts:
            request = build_request(
                prompt,
                max_tokens=1 if self.max_tokens == 0 else self.max_tokens,
                logprobs=self.logprobs,
                prompt_logprobs=self._prompt_logprobs(prompt),
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
        model = await present(engine, config, body.model)
        asks = body.asks(model, request.state.owner)
        asks = [await with_named(engine, config, model, ask) for ask in asks]
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
        written = [self._written(i, answers) for i in range(len(answers))]
        async for i, chunk in sse.merge(answers):
            progress[i].take(chunk)
            written[i].add(chunk)
        choices = [
            {**each.taken(i), **state.finish}
            for i, (each, state) in enumerate(zip(written, progress, strict=True))
        ]
        return {**self._head, "choices": choices, "usage": self._usage(progress)}

    async def events(self, answers: Sequence[Answer]) -> sse.Events:
        """The response as server-sent events."""
        progress = [AnswerState() for _ in answers]
        written = [self._written(i, answers) for i in range(len(answers))]
        async for i, chunk in sse.merge(answers):
            progress[i].take(chunk)
            written[i].add(chunk)
            ended = progress[i].finish if chunk.finish_reason is not None else {}
            if not (written[i] or ended):
                continue
            choice = {**written[i].taken(i), **ended}
            yield sse.event({**self._head, "choices": [choice], **self._body.usage_of(progress[i])})
        if self._body.wants_usage:
            yield sse.event({**self._head, "choices": [], "usage": self._usage(progress)})
        yield sse.DONE

    def _written(self, i: int, answers: Sequence[Answer]) -> _Written:
        prompts = self._body.prompts
        return _Written(self._body, prompts[i * len(prompts) // len(answers)])

    def _usage(self, progress: Sequence[AnswerState]) -> dict[str, Any]:
        used = usage(progress, self._body.n or 1)
        if self._body.max_tokens == 0:
            used |= {"completion_tokens": 0, "total_tokens": used["prompt_tokens"]}
        return used


class _Written:
    """What is to be written of one answer, its echoed prompt too.

    Args:
        body: the request.
        prompt: the answer's.
    """

    def __init__(self, body: CompletionRequest, prompt: str | list[int]):
        self._body, self._prompt = body, prompt
        self._text, self._tokens = "", list[TokenLogprobs]()
        self._offset, self._is_begun = 0, False

    def __bool__(self) -> bool:
        return bool(self._text or self._tokens)

    def add(self, chunk: Chunk) -> None:
        """The answer's next chunk."""
        if self._body.echo and not self._is_begun:
            self._echo(chunk.prompt_logprobs or ())
        self._is_begun = True
        if self._body.max_tokens != 0:
            self._text += all_text(chunk)
            self._tokens += [chunk.logprobs] if chunk.logprobs else []

    def _echo(self, tokens: Sequence[TokenLogprobs]) -> None:
        text = b"".join(token.bytes for token in tokens).decode(errors="replace")
        if isinstance(self._prompt, str):
            # Tokens before the text, and a blank that the tokenizer puts there, are not of it.
            self._offset = min(0, len(self._prompt) - len(text)) if tokens else 0
            text = self._prompt
        self._text = text
        self._tokens = list(tokens) if self._body.logprobs is not None else []

    def taken(self, index: int) -> dict[str, Any]:
        """The choice of what was added since the last time."""
        logprobs = None
        if self._body.logprobs is not None and self._tokens:
            logprobs = _logprobs(self._tokens, self._offset)
            self._offset += sum(len(token.text) for token in self._tokens)
        choice = {"text": self._text, "index": index, "logprobs": logprobs, "finish_reason": None}
        self._text, self._tokens = "", []
        return choice


def all_text(chunk: Chunk) -> str:
    """A chunk's reasoning, text and calls as text: a completion has no other kinds."""
    return (chunk.reasoning or "") + chunk.text + "".join(call.text for call in chunk.tool_calls)


def _logprobs(tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
    """Log-probabilities of tokens that follow `offset` characters, as completions show them."""
    offsets = []
    for token in tokens:
        offsets.append(max(offset, 0))
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [
            None if each.logprob is None else {top.text: finite(top.logprob) for top in each.top}
            for each in tokens
        ],
        "text_offset": offsets,
    }
