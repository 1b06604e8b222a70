"""Responses of the last hour, in memory: `store`, `previous_response_id` and `item_reference`.

A response is its owner's alone. What all take is bounded: the oldest of the owner that has most go
first, so that no owner makes those of another go.
"""

from __future__ import annotations

import json
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from mlxkv.errors import UsageError
from mlxkv.server.openai.response_items import Item, ItemReference, gone_on

KEEP_S = 3600.0
MAX_BYTES = 64 << 20

_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[Item])


def plain(items: Sequence[Any]) -> list[Any]:
    """Items as JSON; the inverse of `items_of`."""
    return _ITEMS.dump_python(
        list(items), mode="json", by_alias=True, exclude_unset=True, warnings=False
    )


def items_of(raw: Sequence[Any]) -> list[Any]:
    """Items from JSON.

    Raises:
        ValueError: they are none.
    """
    return _ITEMS.validate_json(json.dumps(raw))


@dataclass(frozen=True, slots=True)
class Stored:
    """One response.

    Args:
        owner: whose it is.
        response: as the client got it.
        answer: its items, as references name them.
        items: the whole conversation, its answer included.
        until: when it is forgotten, in seconds of the clock.
        n_bytes: what it counts for.
    """

    owner: str
    response: dict[str, Any]
    answer: list[Any]
    items: list[Any]
    until: float
    n_bytes: int


class ResponseStore:
    """Responses by id, and items by id.

    Args:
        clock: seconds that only grow.
        max_bytes: of all responses, as JSON.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_bytes: int = MAX_BYTES):
        self._clock, self._max_bytes = clock, max_bytes
        self._responses: OrderedDict[str, Stored] = OrderedDict()
        self._n_bytes = 0

    def put(
        self,
        owner: str,
        items: Sequence[Any],
        response: dict[str, Any],
        goes_on: bool = False,
    ) -> None:
        """Keep a response and the conversation that it ends.

        Args:
            owner: whose it is.
            items: the conversation before it.
            response: as the client got it.
            goes_on: whether its answer goes on from the last item.
        """
        self._expire()
        answer = _ITEMS.validate_python(response["output"])
        whole = gone_on(items, answer) if goes_on else [*items, *answer]
        n_bytes = len(_ITEMS.dump_json(whole, warnings=False))
        if n_bytes > self._max_bytes:
            return
        until = self._clock() + KEEP_S
        self._responses[response["id"]] = Stored(owner, response, answer, whole, until, n_bytes)
        self._n_bytes += n_bytes
        while self._n_bytes > self._max_bytes:
            self._drop(self._next_to_go())

    def get(self, owner: str, response_id: str) -> Stored | None:
        """A response of an owner's, if it is still there."""
        self._expire()
        found = self._responses.get(response_id)
        return found if found is not None and found.owner == owner else None

    def delete(self, owner: str, response_id: str) -> bool:
        """Forget a response; whether there was one."""
        if self.get(owner, response_id) is None:
            return False
        self._drop(response_id)
        return True

    def conversation(
        self, owner: str, previous: str | None, items: str | Sequence[Any]
    ) -> list[Any]:
        """A request's items behind those of the response that it goes on from.

        Args:
            owner: whose request it is.
            previous: id of that response; None for a new conversation.
            items: of the request; references stand for stored items.

        Raises:
            UsageError: a response or an item that is not here (any more).
        """
        given = (
            _ITEMS.validate_python([{"role": "user", "content": items}])
            if isinstance(items, str)
            else items
        )
        before: list[Any] = []
        if previous is not None:
            stored = self.get(owner, previous)
            if stored is None:
                raise UsageError(
                    f"previous_response_id: {previous[:80]!r} is not known; responses are kept in "
                    f"memory for an hour, and with store: false not at all: send the items"
                )
            before = stored.items
        return [*before, *(self._referred(owner, item) for item in given)]

    def _referred(self, owner: str, item: Any) -> Any:
        if not isinstance(item, ItemReference):
            return item
        self._expire()
        for stored in reversed(self._responses.values()):
            if stored.owner == owner:
                for known in (*stored.answer, *stored.items):
                    if getattr(known, "id", None) == item.id:
                        return known
        raise UsageError(
            f"input: the item {item.id[:80]!r} is not known; items are kept in memory for an hour, "
            f"and with store: false not at all: send the item"
        )

    def _next_to_go(self) -> str:
        """The oldest response of the owner that holds most bytes."""
        held: Counter[str] = Counter()
        for stored in self._responses.values():
            held[stored.owner] += stored.n_bytes
        most = max(held, key=lambda owner: held[owner])
        return next(key for key, stored in self._responses.items() if stored.owner == most)

    def _expire(self) -> None:
        now = self._clock()
        while self._responses and next(iter(self._responses.values())).until <= now:
            self._drop(next(iter(self._responses)))

    def _drop(self, response_id: str) -> None:
        self._n_bytes -= self._responses.pop(response_id).n_bytes
