"""OpenAI's responses in the background, through OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from mlxkv.engine.messages import Ask, PutAway, Sleeping
from mlxkv.generation.outputs import Chunk
from mlxkv.parsers.events import ToolCall
from tests.support.fake_engine import MODEL, FakeEngine, Script, says, serving, stats
from tests.support.openai_server import OpenAIServer

CALL = ToolCall("<call>", "weather", {"place": "Rome"}, "call00001")


def calls(ask: Any) -> list[Any]:
    last = Chunk("", None, "stop", stats(), tool_calls=(CALL,))
    return [Chunk("", 1, reasoning="let me"), Chunk("I look", 2), 0.05, last]


class Server(OpenAIServer):
    """With the requests of these tests."""

    def begin(self, script: Script, **options: Any) -> Any:
        self.engine.script = script
        body = {"model": MODEL, "input": "hi", "background": True, **options}
        return self.client.responses.create(**body)

    def ended(self, response_id: str) -> Any:
        while (found := self.client.responses.retrieve(response_id)).status in (
            "queued",
            "in_progress",
        ):
            pass
        return found


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as made:
        yield made


def test_it_is_answered_without_a_connection(server):
    begun = server.begin(says("Hello", " world"))
    assert begun.status == "queued" and begun.background and begun.output == []
    found = server.ended(begun.id)
    assert found.status == "completed" and found.output_text == "Hello world"
    assert found.usage.output_tokens == 2
    (ask,) = server.engine.asks
    assert ask.label == begun.id and ask.durable and ask.note()["body"]["background"] is True


def test_a_stream_begins_behind_any_event(server):
    whole = list(server.begin(calls, stream=True))
    response_id = whole[0].response.id
    for after in (0, 3, len(whole) - 2):
        rest = server.client.responses.retrieve(response_id, stream=True, starting_after=after)
        assert list(rest) == whole[after + 1 :]
    assert list(server.client.responses.retrieve(response_id, stream=True)) == whole
    assert [event.sequence_number for event in whole] == list(range(len(whole)))


def test_its_client_may_go(server):
    stream = server.begin(calls, stream=True)
    begun = next(stream)
    stream.close()
    assert server.ended(begun.response.id).output[-1].call_id == CALL.id


def test_it_can_be_cancelled_and_forgotten(server):
    begun = server.begin(lambda ask: [Chunk("a", 1), 2.0])
    assert server.client.responses.cancel(begun.id).status == "cancelled"
    assert server.engine.answers[-1].cancelled.is_set()
    server.client.responses.delete(begun.id)
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(begun.id)


def test_what_fails_says_so(server):
    begun = server.begin(lambda ask: [Chunk("a", 1), ValueError("x")])
    assert server.ended(begun.id).status == "failed"
    events = server.client.responses.retrieve(begun.id, stream=True)
    assert [event.type for event in events][-1] == "response.failed"


def test_another_stream_is_refused_by_name(server):
    server.engine.script = says("ok")
    made = server.client.responses.create(model=MODEL, input="hi")
    with pytest.raises(openai.BadRequestError, match="background"):
        server.client.responses.retrieve(made.id, stream=True)
    bad = httpx.get(f"{server.url}/v1/responses/{made.id}?stream=true&starting_after=-1")
    assert bad.status_code in (400, 422)


class Slept(FakeEngine):
    """An engine whose one answer was put away."""

    def __init__(self) -> None:
        super().__init__()
        self.ask: Ask | None = None

    def asleep(self, label: str = "") -> list[Sleeping]:
        if self.ask is None or label not in ("", self.ask.label) or self.ask.note is None:
            return []
        return [Sleeping(self.ask.owner, "m", self.ask.label, 1, self.ask.note(), self.ask)]


def test_one_that_slept_goes_on_behind_the_events_that_were_told():
    engine = Slept()
    client = {"api_key": "none", "max_retries": 0}
    body: Any = {"model": MODEL, "input": "hi", "background": True, "stream": True}
    with serving(engine) as url, openai.OpenAI(base_url=f"{url}/v1", **client) as first:
        engine.script = calls
        whole = list(first.responses.create(**body))
        engine.script = lambda ask: [*calls(ask)[:2], PutAway()]
        begun = list(first.responses.create(**body))
    assert begun[-1].type == "error" and begun[-1].code == "server_stopping"
    engine.ask, engine.script = engine.asks[-1], calls
    n = begun[-2].sequence_number
    with serving(engine) as url, openai.OpenAI(base_url=f"{url}/v1", **client) as second:
        got = second.responses.retrieve(engine.ask.label, stream=True, starting_after=n)
        rest = list(got)
    found = [*begun[:-1], *rest]
    assert [each.type for each in found] == [each.type for each in whole]
    assert [each.sequence_number for each in found] == list(range(len(whole)))
    ids = {each.item_id for each in found if hasattr(each, "item_id")}
    done = rest[-1].response
    assert ids <= {item.id for item in done.output} and done.id == begun[0].response.id
    assert done.created_at == begun[0].response.created_at
