"""Kinds of request that a server must survive. Each is harmless for the libraries beneath it.

Sizes are a little past mlxkv's own bounds: what is tried is that those bounds hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

MIB = 1 << 20
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, OLLAMA = "/v1/messages", "/api/chat"


@dataclass(slots=True)
class Target:
    """A server as an attacker sees it.

    Args:
        url: of it.
        model: as it names it.
        key: the attacker's own; valid.
        random: of sizes and choices.
        seen: how often each status came, 0 where the server closed without one.
    """

    url: str
    model: str
    key: str
    random: random.Random
    seen: dict[int, int] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None and parts.port is not None
        return parts.hostname, parts.port

    def see(self, status: int) -> None:
        self.seen[status] = self.seen.get(status, 0) + 1

    async def post(self, path: str, body: Any, limit_s: float = 60, **headers: str) -> None:
        """Send JSON, or bytes as they are; read the whole answer and forget it."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        async with self._client() as client:
            try:
                async with asyncio.timeout(limit_s):
                    response = await client.post(path, content=data, headers={**sent, **headers})
                self.see(response.status_code)
            except (httpx.HTTPError, TimeoutError):
                self.see(0)

    async def begin(self, path: str, body: Any, pieces: int) -> None:
        """Read so many pieces of a stream, and go."""
        headers = {"Authorization": f"Bearer {self.key}"}
        async with self._client() as client:
            try:
                async with client.stream("POST", path, json=body, headers=headers) as response:
                    self.see(response.status_code)
                    async for _ in response.aiter_lines():
                        pieces -= 1
                        if pieces <= 0:
                            return
            except httpx.HTTPError:
                self.see(0)

    @contextlib.asynccontextmanager
    async def socket(self) -> AsyncIterator[asyncio.StreamWriter | None]:
        """A bare connection; None where the server takes none."""
        try:
            reader, writer = await asyncio.open_connection(*self.address)
        except OSError:
            self.see(0)
            yield None
            return
        try:
            yield writer
            with contextlib.suppress(OSError, TimeoutError):
                answer = await asyncio.wait_for(reader.read(64), 0.1)
                words = answer.split(b" ", 2)
                self.see(int(words[1]) if len(words) > 1 and words[1].isdigit() else 0)
        finally:
            writer.transport.abort()

    async def write(self, writer: asyncio.StreamWriter | None, data: bytes) -> bool:
        """Whether the server still takes what is sent."""
        if writer is None or writer.is_closing():
            return False
        try:
            writer.write(data)
            await asyncio.wait_for(writer.drain(), 5)
        except (OSError, TimeoutError):
            return False
        return True

    def head(self, path: str, length: int | None) -> bytes:
        """Of a POST; without a length its body comes in chunks."""
        size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", size]
        lines += [f"Authorization: Bearer {self.key}", "Content-Type: application/json", "", ""]
        return "\r\n".join(lines).encode()

    def chat(self, text: str = "Hello", **more: Any) -> dict[str, Any]:
        """Body of a chat."""
        messages = [{"role": "user", "content": text}]
        return {"model": self.model, "messages": messages, "max_tokens": 8, **more}

    def _client(self) -> httpx.AsyncClient:
        # Nothing is encrypted, and reading certificates takes longer than most attacks.
        return httpx.AsyncClient(base_url=self.url, timeout=None, trust_env=False, verify=False)


Kind = Callable[[Target], Awaitable[None]]


async def together(n: int, attack: Kind, target: Target) -> None:
    """The same n times at once."""
    await asyncio.gather(*(attack(target) for _ in range(n)))


async def half_heads(target: Target) -> None:
    """A hundred requests that stop within their head, for some seconds."""

    async def one(target: Target) -> None:
        async with target.socket() as writer:
            await target.write(writer, b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
            await asyncio.sleep(8)

    await together(100, one, target)


async def idle_connections(target: Target) -> None:
    """A hundred connections on which nothing is said."""

    async def one(target: Target) -> None:
        async with target.socket():
            await asyncio.sleep(8)

    await together(100, one, target)


async def slow_bodies(target: Target) -> None:
    """Twenty bodies of which a byte comes at a time."""

    async def one(target: Target) -> None:
        async with target.socket() as writer:
            going = await target.write(writer, target.head(CHAT, 10_000))
            for _ in range(16):
                going = going and await target.write(writer, b" ")
                await asyncio.sleep(0.5)

    await together(20, one, target)


async def endless_bodies(target: Target) -> None:
    """Eight bodies in chunks that do not end, of up to 32 MiB."""

    async def one(target: Target) -> None:
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        async with target.socket() as writer:
            going = await target.write(writer, target.head(CHAT, None))
            for _ in range(512):
                going = going and await target.write(writer, chunk)

    await together(8, one, target)


async def broken_http(target: Target) -> None:
    """What is no HTTP."""
    for data in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 50, b"PRI * "):
        async with target.socket() as writer:
            await target.write(writer, data)


async def huge_heads(target: Target) -> None:
    """A header of 256 KiB."""
    async with target.socket() as writer:
        lines = b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * (1 << 18)
        await target.write(writer, lines + b"\r\n\r\n")


async def reset_uploads(target: Target) -> None:
    """Bodies that break off in their middle."""

    async def one(target: Target) -> None:
        async with target.socket() as writer:
            await target.write(writer, target.head(MESSAGES, MIB) + b'{"model": "' + b"a" * 9_000)

    await together(20, one, target)


async def invalid_items(target: Target) -> None:
    """Four megabytes of messages of which none is one."""
    path = target.random.choice((CHAT, MESSAGES, OLLAMA, RESPONSES))
    field = "input" if path == RESPONSES else "messages"
    await target.post(path, {"model": target.model, "max_tokens": 1, field: [{}] * (4 * MIB // 4)})


async def wrong_types(target: Target) -> None:
    """A field of another type in each request."""
    values = ("x", -1, 1e400, [], {}, None, True, [[]], 2**70)
    names = ("messages", "tools", "max_tokens", "temperature", "stop", "response_format", "seed")
    for name in names:
        value = target.random.choice(values)
        data = json.dumps({**target.chat(), name: value}).encode()
        await target.post(CHAT, data)


async def deep_json(target: Target) -> None:
    """Brackets in brackets."""
    await target.post(CHAT, b'{"model": ' + b"[" * 400 + b"]" * 400 + b"}")


async def long_text(target: Target) -> None:
    """A text far past the context."""
    await target.post(COMPLETIONS, {"model": target.model, "prompt": "word " * MIB})


async def long_text_left(target: Target) -> None:
    """The same, from a client that does not wait."""
    with contextlib.suppress(TimeoutError):
        await target.post(CHAT, target.chat("some words " * (MIB // 2)), limit_s=0.3)


async def long_tokenize(target: Target) -> None:
    """Text to be counted."""
    await target.post("/tokenize", {"model": target.model, "prompt": "word " * (MIB // 2)})


async def many_messages(target: Target) -> None:
    """Twenty thousand short messages."""
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    await target.post(CHAT, {"model": target.model, "messages": pair * 10_000, "max_tokens": 1})


async def wide_tool(target: Target) -> None:
    """A tool with ten thousand parameters."""
    properties = {f"p{i}": {"type": "string"} for i in range(10_000)}
    function = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    tools = [{"type": "function", "function": function}]
    await target.post(CHAT, target.chat(tools=tools, tool_choice="required"))


async def chained_schema(target: Target) -> None:
    """References of which each names the next, past mlxkv's own bound."""
    n = 600
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    schema = {"$defs": {**chain, f"d{n}": {"type": "string"}}, "$ref": "#/$defs/d0"}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    await target.post(CHAT, target.chat(response_format=asked))


async def grammars(target: Target) -> None:
    """Schemas of some size, each another."""
    for _ in range(4):
        salt = target.random.randrange(10**6)
        properties = {f"k{salt}_{i}": {"type": "integer", "maximum": i + 7} for i in range(100)}
        schema = {"type": "object", "properties": properties}
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        await target.post(CHAT, target.chat(response_format=asked))


async def many_stops(target: Target) -> None:
    """Stop texts and biases by the thousand."""
    await target.post(CHAT, target.chat(stop=[f"stop {i}" for i in range(20_000)]))
    await target.post(CHAT, target.chat(logit_bias={str(i): 1 for i in range(20_000)}))


async def flood(target: Target) -> None:
    """Forty requests of one key at once."""

    async def one(target: Target) -> None:
        await target.post(CHAT, target.chat(f"Number {target.random.random()}"), limit_s=20)

    await together(40, one, target)


async def hang_ups(target: Target) -> None:
    """Streams that are left after some pieces."""

    async def one(target: Target) -> None:
        body = target.chat(stream=True, max_tokens=200)
        await target.begin(CHAT, body, target.random.randrange(1, 9))

    await together(6, one, target)


async def slow_readers(target: Target) -> None:
    """Streams of which nothing is read."""

    async def one(target: Target) -> None:
        body = json.dumps(target.chat(stream=True, max_tokens=200)).encode()
        async with target.socket() as writer:
            await target.write(writer, target.head(CHAT, len(body)) + body)
            await asyncio.sleep(8)

    await together(4, one, target)


async def unloads(target: Target) -> None:
    """`keep_alive: 0`, while others are answered."""
    await target.post("/api/generate", {"model": target.model, "keep_alive": 0})


async def wrong_keys(target: Target) -> None:
    """Keys that are none."""
    for i in range(20):
        await target.post(CHAT, target.chat(), Authorization=f"Bearer key-{i}")


async def odd_names(target: Target) -> None:
    """Models that do not exist, under names of files and hosts."""
    for name in ("../../etc/hosts", "/dev/null", "<b>x</b>", "a" * 5_000, "x\x00y", ""):
        await target.post(CHAT, {**target.chat(), "model": name})
    await target.post("/api/pull", {"model": "127.0.0.1:9/a/b", "stream": False})
    await target.post("/api/delete", {"model": "no-such-model"})


async def stored_responses(target: Target) -> None:
    """Answers that are to be kept, and ones that never were."""
    for _ in range(10):
        asked = {"model": target.model, "input": "Hello", "max_output_tokens": 16, "store": True}
        await target.post(RESPONSES, asked)
        await target.post(RESPONSES, {**asked, "previous_response_id": "resp_none"})


async def scored_prompts(target: Target) -> None:
    """Log-probabilities of a prompt."""
    asked = {"model": target.model, "prompt": "word " * 700, "echo": True, "logprobs": 5}
    await target.post(COMPLETIONS, {**asked, "max_tokens": 1})


async def odd_templates(target: Target) -> None:
    """Template variables of odd types."""
    for value in ([[]], {"a": {"b": 1}}, "x" * 100_000, -1, None):
        await target.post(CHAT, target.chat(chat_template_kwargs={"enable_thinking": value}))


KINDS: tuple[Kind, ...] = (
    *(half_heads, idle_connections, slow_bodies, endless_bodies, broken_http, huge_heads),
    *(reset_uploads, invalid_items, wrong_types, deep_json, long_text, long_text_left),
    *(long_tokenize, many_messages, wide_tool, chained_schema, grammars, many_stops, flood),
    *(hang_ups, slow_readers, unloads, wrong_keys, odd_names, stored_responses, scored_prompts),
    odd_templates,
)


def shuffled(rng: random.Random) -> Iterator[Kind]:
    """All kinds in random order, again and again."""
    while True:
        yield from rng.sample(KINDS, len(KINDS))
