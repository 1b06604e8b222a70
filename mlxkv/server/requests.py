"""Build the engine's requests, for all three APIs."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlxkv.engine.messages import Ask
from mlxkv.errors import UsageError
from mlxkv.generation.request import Prompt, Request
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


def apply_rules(ask: Ask, config: ServerConfig) -> Ask:
    """Put a request under the server's rules: a length that it allows, the longest where none is
    given; and wishes met as far as a model can, unless the server is strict.

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
    return dataclasses.replace(ask, request=request)
