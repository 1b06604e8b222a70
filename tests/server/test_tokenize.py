"""POST /tokenize: what a prompt is for the model."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.fake_engine import MODEL, FakeEngine, serving

HI = [{"role": "user", "content": "hi"}]


class Tokenizing(FakeEngine):
    """Gives the ids that it is told to, and remembers the request."""

    async def tokenize(self, ask):
        self.asks.append(ask)
        return [5, 6, 7]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Tokenizing, str]]:
    engine = Tokenizing()
    with serving(engine) as url:
        yield engine, url


@pytest.mark.parametrize(("body", "prompt"), [({"prompt": "a b"}, "a b"), ({"messages": HI}, HI)])
def test_a_prompts_ids_are_told_and_counted(server, body, prompt):
    engine, url = server
    answer = httpx.post(f"{url}/tokenize", json={"model": MODEL, **body})
    assert answer.json() == {"count": 3, "tokens": [5, 6, 7]}
    assert engine.last.request.prompt == prompt


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": HI}])
def test_a_body_that_is_not_one_prompt_is_refused(server, body):
    _, url = server
    answer = httpx.post(f"{url}/tokenize", json={"model": MODEL, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
