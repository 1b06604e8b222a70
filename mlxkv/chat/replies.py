"""Replies that called tools, as the model itself wrote them.

A client sends a reply back as reasoning, text and calls; how the model ordered a call's header,
what blanks its JSON has and which channel it used is lost by then. Kept here under the calls' ids,
the reply goes into the next prompt as the tokens that the KV cache holds. Reasoning that a client
left out of its history comes back with it: a model has to see its own while it works with tools.
An owner's replies (an API key's) come back in that owner's prompts alone.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MAX_TOKENS = 1_000_000
"""Of all replies that are kept; the least recently used go first."""


class Call(Protocol):
    """A call that the model made."""

    @property
    def text(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> Mapping[str, Any]: ...

    @property
    def id(self) -> str: ...

    @property
    def error(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model wrote, up to the end of a call.

    Args:
        written: all of it, markers included.
        tokens: its ids.
        call_text: its last call as it was written.
        content: what of it was text for the user.
        reasoning: what of it was not.
        calls: names and arguments of all of its calls, see `call_key`.
        dropped: whether earlier reasoning was left out of the prompt that it answers.
        date: of that prompt.
    """

    written: str
    tokens: Sequence[int]
    call_text: str
    content: str
    reasoning: str
    calls: tuple[str, ...]
    dropped: bool
    date: str

    def is_of(self, content: str, reasoning: str, calls: Sequence[str]) -> bool:
        """Whether a message that came back is this one; its reasoning may be missing.

        White space is not compared: an API may have put what it gave in parts together otherwise.
        """
        same = _bare(content) == _bare(self.content) and tuple(calls) == self.calls
        return same and _bare(reasoning) in ("", _bare(self.reasoning))


def call_key(name: str, arguments: Any) -> str:
    """A call without regard to how its JSON was written."""
    return json.dumps([name, _integral(arguments)], sort_keys=True)


def _integral(value: Any) -> Any:
    """JSON in which 1.0 is 1, as it is for clients in JavaScript."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _integral(item) for key, item in value.items()}
    return [_integral(item) for item in value] if isinstance(value, list) else value


def _bare(text: str) -> str:
    return "".join(text.split())


class Replies:
    """The latest replies of one model, each owner's apart. Safe from several threads."""

    def __init__(self, max_tokens: int = MAX_TOKENS):
        self._max_tokens = max_tokens
        self._n_tokens = 0
        # By owner and id; the ids by owner and call.
        self._by_id: OrderedDict[tuple[str, str], Reply] = OrderedDict()
        self._ids: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def keep(self, owner: str, call_id: str, reply: Reply) -> None:
        """Remember a reply under the id of its last call."""
        with self._lock:
            self._drop(owner, call_id)
            self._by_id[owner, call_id] = reply
            self._ids[owner, reply.calls[-1]] = call_id
            self._n_tokens += len(reply.tokens)
            while self._n_tokens > self._max_tokens:
                self._drop(*next(iter(self._by_id)))

    def find(
        self, owner: str, call_id: str, content: str, reasoning: str, calls: Sequence[str]
    ) -> Reply | None:
        """The reply that a message was.

        Some clients send no ids back: then one of the same words, reasoning included, will do.

        Args:
            owner: of the prompt.
            call_id: of its last call.
            content: text for the user.
            reasoning: what of it came back.
            calls: `call_key` of each.
        """
        with self._lock:
            reply = self._by_id.get((owner, call_id))
            if reply is not None and reply.is_of(content, reasoning, calls):
                self._by_id.move_to_end((owner, call_id))
                return reply
            reply = self._latest(owner, calls[-1])
            if reply is None or not reply.is_of(content, reasoning, calls):
                return None
            return reply if _bare(reasoning) == _bare(reply.reasoning) else None

    def call_text(self, owner: str, call: str) -> str | None:
        """How the model last wrote a call to an owner, given its `call_key`."""
        with self._lock:
            reply = self._latest(owner, call)
            return None if reply is None else reply.call_text

    def _latest(self, owner: str, call: str) -> Reply | None:
        call_id = self._ids.get((owner, call))
        return None if call_id is None else self._by_id[owner, call_id]

    def _drop(self, owner: str, call_id: str) -> None:
        if (reply := self._by_id.pop((owner, call_id), None)) is None:
            return
        self._n_tokens -= len(reply.tokens)
        if self._ids.get((owner, reply.calls[-1])) == call_id:
            del self._ids[owner, reply.calls[-1]]


class Recorder:
    """Follows one answer and keeps it at each of its calls.

    Args:
        replies: where to.
        owner: of the answer.
        dropped: see `Reply`.
        date: see `Reply`.
    """

    def __init__(self, replies: Replies, owner: str, dropped: bool, date: str):
        self._replies, self._owner = replies, owner
        self._dropped, self._date = dropped, date
        self._tokens = array("i")
        self._written: list[str] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[str] = []
        self._is_sound = True

    def add(
        self,
        token: int | None,
        written: str,
        content: str,
        reasoning: str | None,
        calls: Sequence[Call],
    ) -> None:
        """The next token, and what it added to the answer; None for what was held back."""
        if token is not None:
            self._tokens.append(token)
        self._written.append(written)
        self._content.append(content)
        self._reasoning.append(reasoning or "")
        self._is_sound = self._is_sound and all(call.error is None for call in calls)
        self._calls += [call_key(call.name, call.arguments) for call in calls]
        if calls and self._is_sound:
            reply = Reply(
                "".join(self._written),
                self._tokens[:],
                calls[-1].text,
                "".join(self._content),
                "".join(self._reasoning),
                tuple(self._calls),
                self._dropped,
                self._date,
            )
            self._replies.keep(self._owner, calls[-1].id, reply)
