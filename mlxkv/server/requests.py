"""Build the engine's requests, for all three APIs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastapi import Request as HTTPRequest

from mlxkv.engine.messages import Ask
from mlxkv.errors import UsageError
from mlxkv.generation.request import Prompt, Request
from mlxkv.server.agents.counters import without_counters
from mlxkv.server.config import ServerConfig


def build_request(prompt: Prompt, **options: Any) -> Request:
    """A request whose unset sampling parameters are the model's recommended ones.

    Args:
        prompt: a text, chat messages, or token ids.
        **options: keywords of `Request.of`; None for a field that was not sent.

    Raises:
        UsageError: a value out of its range.
    """
    return Request.of(prompt, recommended=True, **options)


def apply_rules(ask: Ask, config: ServerConfig, http: HTTPRequest) -> Ask:
    """Put a request under the server's rules: a length that it allows, the longest where none is
    given; and unless the server is strict, wishes met as far as a model can, and a prompt without
    the lines that agents change each time.

    Args:
        ask: the request.
        config: the server's.
        http: the HTTP request that it came with.

    Raises:
        UsageError: the request's `max_tokens` is larger.
    """
    given = ask.request.max_tokens
    limit = config.max_tokens
    if limit is not None and given is not None and given > limit:
        raise UsageError(f"an answer may have {limit:,} tokens here; {given:,} are asked for")
    prompt = ask.request.prompt if config.strict else _without_counters(ask.request.prompt, http)
    request = dataclasses.replace(
        ask.request, prompt=prompt, max_tokens=given or limit, best_effort=not config.strict
    )
    return dataclasses.replace(ask, request=request)


def _without_counters(prompt: Prompt, http: HTTPRequest) -> Prompt:
    """`without_counters` of messages, named in the response; other prompts as they are."""
    if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping):
        return prompt
    kept, names = without_counters(prompt)  # pyright: ignore[reportArgumentType]
    http.app.state.ignored.name(http, names)
    return kept
