"""One client of a server with OpenAI's API: a request, its stream, and when each piece came."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

ANSWERED, HUNG_UP, FAILED = "answered", "hung up", "failed"


@dataclass(frozen=True, slots=True)
class Ask:
    """A request.

    Args:
        name: of what is asked.
        prompt: a text, or messages for the model's chat template.
        max_tokens: of the answer.
        options: further fields: temperature, seed, ...
    """

    name: str
    prompt: str | list[dict[str, str]]
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        """What is posted there."""
        return {
            "model": model,
            "messages" if self.is_chat else "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            **self.options,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True, slots=True)
class HangUp:
    """When a client goes without waiting for the end; None: not for that.

    Args:
        after_s: seconds behind the request, which may be within the prefill or before it.
        after_pieces: pieces of the answer.
    """

    after_s: float | None = None
    after_pieces: int | None = None


STAYS = HangUp()


@dataclass(slots=True)
class Answer:
    """What came of a request.

    Args:
        name: of the `Ask`.
        start_s: when it was sent, on `time.perf_counter`'s clock.
        outcome: `answered`, `hung up` or `failed`.
        text: all of it.
        finish_reason: as the server told it.
        piece_s: seconds from the request to each piece of text.
        total_s: to the end.
        usage: as the server told it.
        error: why it failed.
    """

    name: str
    start_s: float = 0.0
    outcome: str = FAILED
    text: str = ""
    finish_reason: str | None = None
    piece_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def n_tokens(self) -> int:
        """Of the answer, 0 where nobody told."""
        return self.usage.get("completion_tokens", 0)

    @property
    def prompt_tokens(self) -> int:
        return self.usage.get("prompt_tokens", 0)

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that were not restored."""
        details = self.usage.get("prompt_tokens_details") or {}
        return self.prompt_tokens - details.get("cached_tokens", 0)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between pieces of text."""
        return [b - a for a, b in zip(self.piece_s, self.piece_s[1:], strict=False)]

    def take(self, data: str) -> bool:
        """An event of the stream; whether it is the end.

        Raises:
            ValueError: the event is an error.
        """
        if data == "[DONE]":
            return True
        event = json.loads(data)
        if "error" in event:
            raise ValueError(f"an error in the stream: {event['error']}")
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if text:
                self.text += text
                self.piece_s.append(time.perf_counter() - self.start_s)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return False


async def ask(
    client: httpx.AsyncClient, model: str, asked: Ask, hang_up: HangUp = STAYS, limit_s: float = 600
) -> Answer:
    """Send a request and read its stream to the end, or until `hang_up`; never raises.

    Args:
        client: of the server.
        model: as the server names it.
        asked: the request.
        hang_up: when to go before the end.
        limit_s: after which the request has failed.
    """
    answer = Answer(asked.name, time.perf_counter())
    goes = hang_up.after_s is not None and hang_up.after_s < limit_s
    try:
        async with asyncio.timeout(hang_up.after_s if goes else limit_s):
            answer.outcome = await _read(client, model, asked, hang_up, answer)
    except TimeoutError:
        answer.outcome = HUNG_UP if goes else FAILED
        answer.error = "" if goes else f"no end within {limit_s:.0f} s"
    except (httpx.HTTPError, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.total_s = time.perf_counter() - answer.start_s
    return answer


async def _read(
    client: httpx.AsyncClient, model: str, asked: Ask, hang_up: HangUp, answer: Answer
) -> str:
    """The stream into `answer`; the outcome."""
    async with client.stream("POST", asked.path, json=asked.body(model)) as response:
        if response.status_code != 200:
            said = (await response.aread()).decode(errors="replace")
            raise ValueError(f"status {response.status_code}: {said[:300]}")
        async for line in response.aiter_lines():
            if line.startswith("data: ") and answer.take(line.removeprefix("data: ")):
                return ANSWERED
            if hang_up.after_pieces is not None and len(answer.piece_s) >= hang_up.after_pieces:
                return HUNG_UP
    raise ValueError("the stream broke off")


def new_client(url: str) -> httpx.AsyncClient:
    """A client of its own connection; limits of time are `ask`'s."""
    return httpx.AsyncClient(base_url=url, timeout=None, trust_env=False)


async def ask_all(
    url: str, model: str, asks: Sequence[Ask], limit_s: float
) -> tuple[float, list[Answer]]:
    """All at the same time, a client each; the seconds until the last ends."""
    clients = [new_client(url) for _ in asks]
    try:
        start = time.perf_counter()
        waiting = zip(clients, asks, strict=True)
        answers = await asyncio.gather(
            *(ask(client, model, asked, limit_s=limit_s) for client, asked in waiting)
        )
        return time.perf_counter() - start, list(answers)
    finally:
        for client in clients:
            await client.aclose()


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear between the two nearest; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
