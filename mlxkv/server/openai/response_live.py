"""Responses that need no connection: those in the background, and those that slept.

Their events are kept, so that a stream of them can begin behind any. After a restart the same
answer gives the same events: ids of items follow from the response's id.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mlxkv.engine.messages import Answer, Ask, Engine, PutAway, Sleeping
from mlxkv.server import sse
from mlxkv.server.openai.response_reply import ResponseReply
from mlxkv.server.openai.response_request import ResponseRequest
from mlxkv.server.openai.response_store import KEEP_S, MAX_BYTES, ResponseStore, items_of, plain


def labelled(ask: Ask, reply: ResponseReply, items: Sequence[Any]) -> Ask:
    """A request whose answer is found by the response's id while it sleeps."""
    body = reply.body

    def note() -> dict[str, Any]:
        said = body.model_dump(
            mode="json", by_alias=True, exclude_unset=True, exclude={"input"}, warnings=False
        )
        return {"created": reply.created, "body": said, "items": plain(items)}

    return dataclasses.replace(ask, label=reply.id, note=note, durable=bool(body.background))


class LiveResponse:
    """A response that is being answered, or was.

    Args:
        owner: whose it is.
        reply: writes it.
        answer: of the engine.
    """

    def __init__(self, owner: str, reply: ResponseReply, answer: Answer):
        self.owner, self._reply, self._answer = owner, reply, answer
        self._events: list[bytes] = []
        self._error: PutAway | None = None
        self._changed = asyncio.Condition()
        self._status = "queued"
        self.until: float | None = None
        self.n_bytes = 0
        self._task = asyncio.create_task(self._run())

    @property
    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        return self._reply.response(self._status)

    def failed(self, error: BaseException) -> bytes:
        """The last event of a stream that ends before the response."""
        return self._reply.failed(error)

    async def events(self, after: int = -1) -> sse.Events:
        """The events behind the one with this number; waits for those to come.

        Raises:
            PutAway: the server stops.
        """
        n = after + 1
        while True:
            async with self._changed:
                await self._changed.wait_for(partial(self._has, n))
                event = self._events[n] if n < len(self._events) else None
            if event is None:
                if self._error is not None:
                    raise self._error
                return
            yield event
            n += 1

    async def cancel(self) -> None:
        """End it; nothing where it has ended."""
        if self.until is None:
            self._status = "cancelled"
            self._answer.cancel()
            await asyncio.wait({self._task}, timeout=10)

    def _has(self, n: int) -> bool:
        """Whether there is an n-th event, or will be none."""
        return n < len(self._events) or self.until is not None

    async def _run(self) -> None:
        try:
            async for event in self._reply.events([self._answer]):
                if self._status == "cancelled":
                    break
                self._status = "in_progress"
                await self._add(event)
            if self._status != "cancelled":
                self._status = self._reply.status
        except PutAway as error:
            self._error, self._status = error, "queued"
        except Exception as error:
            self._status = "failed"
            await self._add(self._reply.failed(error))
        finally:
            self._answer.cancel()
            async with self._changed:
                self.until = time.monotonic() + KEEP_S
                self._changed.notify_all()

    async def _add(self, event: bytes) -> None:
        async with self._changed:
            self._events.append(event)
            self.n_bytes += len(event)
            self._changed.notify_all()


class LiveResponses:
    """Those of one server.

    Args:
        engine: answers them.
        store: takes those that have ended.
        max_bytes: of the events of all that have ended; the oldest go first.
    """

    def __init__(
        self,
        engine: Engine,
        store: ResponseStore,
        max_bytes: int = MAX_BYTES,
    ):
        self._engine, self._store, self._max_bytes = engine, store, max_bytes
        self._found: OrderedDict[str, LiveResponse] = OrderedDict()

    def follow(self, owner: str, reply: ResponseReply, answer: Answer) -> LiveResponse:
        """Keep the events of an answer from now on."""
        self._expire()
        found = self._found[reply.id] = LiveResponse(owner, reply, answer)
        return found

    async def get(self, owner: str, response_id: str) -> LiveResponse | None:
        """An owner's response, which goes on if it slept."""
        self._expire()
        found = self._found.get(response_id)
        if found is None:
            for sleeping in await asyncio.to_thread(self._engine.asleep, response_id):
                if response_id not in self._found and sleeping.owner == owner:
                    self._wake(sleeping)
            found = self._found.get(response_id)
        return found if found is not None and found.owner == owner else None

    async def forget(self, owner: str, response_id: str) -> bool:
        """Forget an owner's response, which ends; whether there was one."""
        found = await self.get(owner, response_id)
        if found is None:
            return False
        await found.cancel()
        self._found.pop(response_id, None)
        return True

    async def wake_all(self) -> None:
        """Go on with those in the background that were put away."""
        for sleeping in await asyncio.to_thread(self._engine.asleep):
            if sleeping.ask is not None and sleeping.ask.durable:
                self._wake(sleeping)

    def _wake(self, sleeping: Sleeping) -> None:
        ask, note = sleeping.ask, sleeping.note
        if ask is None:
            return
        try:
            raw = {**note["body"], "input": "-"}
            body = ResponseRequest.model_validate_json(json.dumps(raw))
            items, created = items_of(note["items"]), int(note["created"])
            keep: Callable[[dict[str, Any]], None] = partial(
                self._store.put, sleeping.owner, items, goes_on=ask.request.go_on
            )
            reply = ResponseReply(body, keep, sleeping.label, created)
            answer = self._engine.submit(ask)
        except (ValueError, KeyError, TypeError):  # of another version
            return
        self.follow(sleeping.owner, reply, answer)

    def _expire(self) -> None:
        now = time.monotonic()
        ended = [(name, each) for name, each in self._found.items() if each.until is not None]
        n_bytes = sum(each.n_bytes for _, each in ended)
        for name, each in ended:
            if (each.until or now) <= now or n_bytes > self._max_bytes:
                n_bytes -= each.n_bytes
                del self._found[name]
