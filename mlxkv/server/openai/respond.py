"""What answers of OpenAI's APIs share: from asks to one response or a stream of events; usage and
log-probabilities."""

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
from mlxkv.server.errors import OPENAI, failure_of, openai_error
from mlxkv.server.requests import apply_rules
from mlxkv.server.results import AnswerState, details, finite


class Reply(Protocol):
    """How an API writes answers."""

    def events(self, answers: Sequence[Answer]) -> sse.Events: ...

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]: ...


def several(ask: Ask, n: int) -> list[Ask]:
    """The same, `n` times, each with random numbers of its own."""
    return [dataclasses.replace(ask, request=ask.request.nth(i)) for i in range(n)]


def submit_all(engine: Engine, config: ServerConfig, asks: Sequence[Ask]) -> list[Answer]:
    """The answers to all, or to none.

    Raises:
        UsageError: more answers or tokens than one request may ask for. Whatever the engine raises.
    """
    if len(asks) > config.max_choices:
        raise UsageError(
            f"one request may ask for {config.max_choices} answers; this one asks for {len(asks)}"
        )
    answers: list[Answer] = []
    try:
        for ask in asks:
            answers.append(engine.submit(apply_rules(ask, config)))
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise
    return answers


def error_event(error: BaseException) -> bytes:
    """The end of a stream that failed."""
    return sse.event(openai_error(failure_of(error, OPENAI))) + sse.DONE


async def respond(
    request: Request,
    engine: Engine,
    config: ServerConfig,
    asks: Sequence[Ask],
    reply: Reply,
    streams: bool | None,
    on_error: Callable[[BaseException], bytes] = error_event,
) -> Response:
    """The response with the answers, which are cancelled when the client disconnects.

    Args:
        request: whose client is watched.
        engine: gives the answers.
        config: timeouts, and limits of one request.
        asks: the requests to the engine.
        reply: writes the answers.
        streams: whether they are sent while they come.
        on_error: the end of a stream that failed.

    Raises:
        As `submit_all`.
    """
    answers = submit_all(engine, config, asks)
    if streams:
        events = reply.events(answers)
        return await sse.stream(request, events, config, on_error, answers=answers)
    return JSONResponse(await sse.unless_gone(request, reply.whole(answers), answers))


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The shape of chat completions and responses."""

    def shown(token: TokenLogprobs) -> dict[str, Any]:
        return {
            "token": token.text,
            "logprob": finite(token.logprob),
            "bytes": list(token.bytes),
        }

    content = [{**shown(each), "top_logprobs": [shown(top) for top in each.top]} for each in tokens]
    return {"content": content, "refusal": None}


def usage(answers: Sequence[AnswerState], n_each: int = 1) -> dict[str, Any]:
    """Tokens of a request.

    Args:
        answers: of all prompts.
        n_each: answers to one prompt, whose tokens count once.
    """
    prompts = [each.stats for each in answers[::n_each] if each.stats is not None]
    n_prompt = sum(stats.prompt_tokens for stats in prompts)
    n_answer = sum(each.stats.generated_tokens for each in answers if each.stats is not None)
    first = details(prompts[0] if prompts else None)
    if len(prompts) > 1:
        summed = {name: 0 for name in first if name != "miss"}
        for stats in prompts:
            summed = {name: n + details(stats)[name] for name, n in summed.items()}
        first = {**summed, "miss": next((d for p in prompts if (d := details(p)["miss"])), None)}
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": first,
        "completion_tokens_details": {
            "reasoning_tokens": sum(each.n_reasoning for each in answers)
        },
    }
