"""Put the bytes of a request's pictures and sound in the place of what the request has.

This is the one way for all three APIs. What a model cannot read is refused by its field; what a
tool gave is left out of the prompt instead, with a note in its place, and named (`ignored`): an
agent cannot choose what its tools give.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request as HTTPRequest
from starlette.exceptions import HTTPException

from mlxkv.engine.messages import Ask, Engine
from mlxkv.errors import shortened
from mlxkv.generation.request import is_messages
from mlxkv.media.limits import MAX_FILES, MAX_PICTURE_BYTES, MAX_SOUND_BYTES
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.media.abilities import Abilities, abilities_of
from mlxkv.server.media.content import Given, given_in, media_in, merged, refused
from mlxkv.server.media.hosts import FetchError
from mlxkv.server.media.remote import AT_A_TIME, MAX_URLS, Remote, TooLarge
from mlxkv.server.media.sources import decoded, scheme_of
from mlxkv.server.model_names import LocalModel
from mlxkv.server.threads import run_in_threadpool

KINDS = {"image": ("pictures", MAX_PICTURE_BYTES), "audio": ("sound", MAX_SOUND_BYTES)}
"""Kind -> what it is called, and the bytes of a file."""
_LARGE_CHARS = 64 << 10
"""Texts of this length are decoded outside the event loop."""


async def with_media(
    http: HTTPRequest,
    engine: Engine,
    config: ServerConfig,
    model: LocalModel,
    ask: Ask,
    between: str = "\n",
) -> Ask:
    """A request whose pictures and sound are read.

    Args:
        http: the HTTP request that it came with.
        engine: has the models in memory.
        config: which servers URLs may name.
        model: that is asked.
        ask: has `Given` in its messages.
        between: separates a note from the texts around it.

    Raises:
        RequestValidationError: one that the model or the server does not take.
        HTTPException: too many or too large ones.
    """
    messages = ask.request.prompt
    given = list(media_in(messages)) if is_messages(messages) else []  # pyright: ignore
    if not given:
        return ask
    if len(given) > MAX_FILES:
        raise HTTPException(413, f"the request has more than {MAX_FILES} pictures and recordings")
    able = await abilities_of(engine, model)
    notes = [each for each in given if each.kind not in able.kinds and each.is_result]
    http.app.state.ignored.name(http, [each.field for each in notes])
    wanted = [each for each in given if each.kind in able.kinds or not each.is_result]
    _check(wanted, able, model)
    n_urls = len({each.data for each in wanted if scheme_of(each.data) in ("http", "https")})
    if n_urls > MAX_URLS:
        raise HTTPException(413, f"the request has {n_urls} URLs to fetch; {MAX_URLS} are allowed")
    files = await sse.unless_gone(http, _files(wanted, http.app.state.remote, config))
    made = [_message(message, files, able, between) for message in messages]  # pyright: ignore
    return dataclasses.replace(ask, request=dataclasses.replace(ask.request, prompt=made))


def _check(given: Sequence[Given], able: Abilities, model: LocalModel) -> None:
    for each in given:
        if each.kind not in able.kinds:
            name = shortened(model.name)
            raise refused(each.place, f"model {name!r} takes no {KINDS[each.kind][0]}")


async def _files(
    given: Sequence[Given], remote: Remote, config: ServerConfig
) -> dict[tuple[str, str], bytes]:
    """The bytes of each, by kind and what stands in the request; each URL is fetched once."""
    files: dict[tuple[str, str], bytes] = {}
    turn = asyncio.Semaphore(AT_A_TIME)
    n_left = config.max_body_bytes

    async def read(each: Given) -> None:
        nonlocal n_left
        async with turn:
            if scheme_of(each.data) in ("data", ""):
                data = await _decoded(each)
            else:
                data = await _fetched(each, remote, n_left)
                n_left -= len(data)
        if len(data) > KINDS[each.kind][1] or n_left < 0:
            raise too_large(each, min(KINDS[each.kind][1], config.max_body_bytes))
        files[each.kind, each.data] = data

    try:
        async with asyncio.TaskGroup() as group:
            for each in {(each.kind, each.data): each for each in reversed(given)}.values():
                group.create_task(read(each))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return files


async def _decoded(each: Given) -> bytes:
    if each.is_url and not scheme_of(each.data):
        raise refused(each.place, "must be a data URL (data:image/png;base64,...), or an https URL")
    try:
        if len(each.data) < _LARGE_CHARS:
            return decoded(each.data)
        return await run_in_threadpool(decoded, each.data)
    except ValueError as error:
        raise refused(each.place, str(error)) from None


async def _fetched(each: Given, remote: Remote, n_left: int) -> bytes:
    try:
        return await remote.fetch(each.data, each.kind, min(KINDS[each.kind][1], n_left))
    except TooLarge as error:
        raise HTTPException(413, f"{each.name}: {error}") from None
    except FetchError as error:
        raise refused(each.place, str(error)) from None


def too_large(each: Given, limit: int) -> HTTPException:
    """The error of a file that is larger than allowed."""
    return HTTPException(413, f"{each.name}: larger than {limit:,} bytes")


def _message(
    message: Mapping[str, Any],
    files: Mapping[tuple[str, str], bytes],
    able: Abilities,
    between: str,
) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": merged([_part(part, files, able) for part in content], between)}


NOTES = {
    "image": "[image left out: this model reads text only]",
    "audio": "[sound left out: this model does not hear]",
}
"""What stands for a tool's picture or sound that a model cannot read."""


def _part(
    part: dict[str, Any], files: Mapping[tuple[str, str], bytes], able: Abilities
) -> dict[str, Any]:
    each = given_in(part)
    if each is None:
        return part
    if each.kind not in able.kinds:
        return {"type": "text", "text": NOTES[each.kind]}
    made = {"type": each.kind, each.kind: files[each.kind, each.data], "name": each.name}
    budget = able.budget(each.detail) if each.kind == "image" else None
    return made if budget is None else {**made, "budget": budget}
