"""From what an API was sent to the request that the engine takes; all three APIs meet here."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlxkv.engine.messages import Ask
from mlxkv.errors import UsageError
from mlxkv.generation.request import Prompt, Request
from mlxkv.server.config import ServerConfig


def requested(prompt: Prompt, **options: Any) -> Request:
    """A request; what it leaves open is what the model's maker recommends.

    Args:
        prompt: a text as it is, chat messages, or token ids.
        **options: as `Request.of` takes them; None for what was not sent.

    Raises:
        UsageError: a value out of its range.
    """
    return Request.of(prompt, recommended=True, **options)


def bounded(ask: Ask, config: ServerConfig) -> Ask:
    """The same with a length that the server allows; one that is left out is the longest.

    Raises:
        UsageError: it asks for more.
    """
    given = ask.request.max_tokens
    if config.max_tokens is None:
        return ask
    if given is not None and given > config.max_tokens:
        raise UsageError(
            f"an answer may have {config.max_tokens:,} tokens here; {given:,} are asked for"
        )
    request = dataclasses.replace(ask.request, max_tokens=given or config.max_tokens)
    return dataclasses.replace(ask, request=request)
