"""Build the engine's requests, for all three APIs."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import Request as HTTPRequest

from mlxkv.engine.messages import Ask
from mlxkv.errors import UsageError
from mlxkv.generation.request import Prompt, Request, is_messages
from mlxkv.server.agents.clients import client_of
from mlxkv.server.agents.counters import without_counters
from mlxkv.server.agents.state import plan_history, split, with_blocks
from mlxkv.server.agents.state_memory import StateMemory
from mlxkv.server.config import ServerConfig


def whose_figures(http: HTTPRequest) -> str | None:
    """The owner whose figures a request may see: its own; None for all, where there is one key."""
    return http.state.owner if len(http.app.state.api_keys.keys) > 1 else None


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
    the lines that agents change each time. What they change in it is told behind what stays, if
    the server does so.

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
    request = dataclasses.replace(
        ask.request, max_tokens=given or limit, best_effort=not config.strict
    )
    if is_messages(request.prompt):
        request = request if config.strict else _without_counters(request, http)
        request = _with_state_behind(request, ask.owner, http.app.state.state_memory)
    return dataclasses.replace(ask, request=request, client=client_of(http))


def _without_counters(request: Request, http: HTTPRequest) -> Request:
    """Leave out lines that agents change each time, and name them in the response."""
    kept, names = without_counters(request.prompt)  # pyright: ignore[reportArgumentType]
    http.app.state.ignored.name(http, names)
    return dataclasses.replace(request, prompt=kept)


def _with_state_behind(request: Request, owner: str, memory: StateMemory | None) -> Request:
    """Tell what changes behind what stays, if the server does so; see `agents.state`."""
    if memory is None:
        return request
    conversation = split(owner, request.prompt)  # pyright: ignore[reportArgumentType]
    if conversation is None:
        return request
    history = plan_history(conversation, memory)
    memory.put(conversation.names[conversation.newest], history)
    n_chars = sum(len(piece.text) for piece in conversation.state)
    prompt = with_blocks(conversation, history)
    return dataclasses.replace(request, prompt=prompt, moved_chars=n_chars)
