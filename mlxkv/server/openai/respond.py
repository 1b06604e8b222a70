"""Responses and streams of OpenAI's APIs, with usage and log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from mlxkv.engine.messages import Answer, Ask, Engine
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import TokenLogprobs
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.media.read import with_media
from mlxkv.server.model_names import LocalModel, present, with_named
from mlxkv.server.requests import apply_rules
from mlxkv.server.results import AnswerState, details, draft_details, logprob_fields


class Reply(Protocol):
    """How an API writes answers."""

    def events(self, answers: Sequence[Answer]) -> sse.Events: ...

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]: ...


class Asking(Protocol):
    """A request's fields."""

    model: str

    def ask(self, model: LocalModel, owner: str) -> Ask: ...


async def asked(request: Request, engine: Engine, config: ServerConfig, body: Asking) -> Ask:
    """The request to the engine, with its pictures and sound.

    Raises:
        ModelNotFound: there is no such model. Also what `body.ask` and `with_media` raise.
    """
    model = await present(engine, config, body.model)
    ask = await with_named(engine, config, model, body.ask(model, request.state.owner))
    return await with_media(request, engine, config, model, ask)


def several(ask: Ask, n: int) -> list[Ask]:
    """`n` requests with different seeds."""
    return [dataclasses.replace(ask, request=ask.request.nth(i)) for i in range(n)]


def submit_all(
    request: Request, engine: Engine, config: ServerConfig, asks: Sequence[Ask]
) -> list[Answer]:
    """Submit all requests, or none if one is refused.

    Raises:
        UsageError: more answers or tokens than one request may have. Also what the engine raises.
    """
    if len(asks) > config.max_choices:
        raise UsageError(
            f"a request may have {config.max_choices} answers at most; this one has {len(asks)}"
        )
    answers: list[Answer] = []
    try:
        for ask in asks:
            answers.append(engine.submit(apply_rules(ask, config, request)))
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise
    return answers


async def respond(
    request: Request,
    engine: Engine,
    config: ServerConfig,
    asks: Sequence[Ask],
    reply: Reply,
    streams: bool | None,
    on_error: Callable[[BaseException], bytes] = sse.openai_error_event,
) -> Response:
    """Answer requests; the answers are cancelled when the client disconnects.

    Args:
        request: the HTTP request.
        engine: answers.
        config: timeouts, and limits of one request.
        asks: the requests to the engine.
        reply: writes the answers in the API's shape.
        streams: whether to send events as they come.
        on_error: makes the last event of a stream that failed.

    Raises:
        As `submit_all`.
    """
    answers = submit_all(request, engine, config, asks)
    if streams:
        events = reply.events(answers)
        return await sse.stream(request, events, config, on_error, answers=answers)
    return JSONResponse(await sse.unless_gone(request, reply.whole(answers), answers))


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities in the shape of chat completions and responses."""
    return {"content": [logprob_fields(each) for each in tokens], "refusal": None}


def usage(answers: Sequence[AnswerState], n_each: int = 1) -> dict[str, Any]:
    """Token counts of a request; a prompt with `n_each` answers counts once."""
    prompts = [each.stats for each in answers[::n_each] if each.stats is not None]
    n_prompt = sum(stats.prompt_tokens for stats in prompts)
    n_answer = sum(each.stats.generated_tokens for each in answers if each.stats is not None)
    first = details(prompts[0] if prompts else None)
    if len(prompts) > 1:
        each = [details(stats) for stats in prompts]
        names = dict.fromkeys(name for one in each for name in one if name != "miss")
        summed = {name: sum(one.get(name, 0) for one in each) for name in names}
        first = {**summed, "miss": next((one["miss"] for one in each if one["miss"]), None)}
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": first,
        "completion_tokens_details": {
            "reasoning_tokens": sum(each.n_reasoning for each in answers),
            **draft_details(each.stats for each in answers),
        },
    }
