"""Lines that change with every request are left out of prompts, over every API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mlxkv.server.agents.counters import BILLING, TOTAL_TOKENS, without_counters
from tests.support.fake_engine import MODEL, FakeEngine, serving

BILL = "x-anthropic-billing-header: cc_version=2.1.197.{0}; cc_entrypoint=cli; cch={0}00;"
LEFT = "<total_tokens>{0} tokens left</total_tokens>"
PATHS = ("/v1/messages", "/v1/chat/completions", "/v1/responses", "/api/chat")


def system(text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}, {"role": "user", "content": "hi"}]


def texts(messages: Any) -> list[str]:
    return [message["content"] for message in messages]


@pytest.mark.parametrize(
    ("role", "text", "kept"),
    [
        ("system", BILL.format(1) + "\n\nYou help.\n\nAlways.", "You help.\n\nAlways."),
        ("system", "You help.\n" + BILL.format(1) + "\n\nAlways.", "You help.\n\nAlways."),
        ("system", "You help.\n\n" + BILL.format(1), "You help."),
        ("user", "Go on.\n\n" + LEFT.format("187423"), "Go on."),
        ("user", LEFT.format("187,423") + "\nGo on.", "Go on."),
        ("user", f"One\n{LEFT.format(1)}\nTwo\n{LEFT.format(2)}\nThree", "One\nTwo\nThree"),
        ("user", f"One\n\n{LEFT.format(1)}\n{LEFT.format(2)}\nTwo", "One\n\nTwo"),
        ("tool", "a.py\nb.py\n\n" + LEFT.format(5), "a.py\nb.py"),
    ],
)
def test_a_text_is_as_if_the_line_had_never_been_in_it(role, text, kept):
    messages = [{"role": "user", "content": "x"}, {"role": role, "content": text}]
    found, names = without_counters(messages)
    assert texts(found) == ["x", kept]
    assert names == [BILLING if BILL[:9] in text else TOTAL_TOKENS]


@pytest.mark.parametrize(
    ("role", "text"),
    [
        ("user", BILL.format(1)),
        ("system", "x-anthropic-billing-header: is what the client sends"),
        ("system", "The line x-anthropic-billing-header: cch=1 is left out"),
        ("user", "What does " + LEFT.format(1) + " mean?"),
        ("tool", "12\t" + LEFT.format(1)),
        ("user", "<total_tokens>many tokens left</total_tokens>"),
        ("assistant", "It was:\n" + LEFT.format(1)),
    ],
)
def test_other_texts_stay_as_they_are(role, text):
    messages = [{"role": "user", "content": "x"}, {"role": role, "content": text}]
    assert without_counters(messages) == (messages, [])


def test_a_message_of_such_a_line_alone_is_left_out():
    call = {"role": "tool", "content": "a.py", "tool_call_id": "1"}
    found, _ = without_counters(
        [*system("x"), call, *({"role": r, "content": LEFT.format(9)} for r in ("user", "system"))]
    )
    assert found == [*system("x"), call]


def test_a_conversation_keeps_something_to_answer():
    only = [{"role": "user", "content": LEFT.format(9)}]
    assert without_counters(only) == (only, [])


@pytest.fixture(scope="module", params=[False, True], ids=["lenient", "strict"])
def server(request) -> Iterator[tuple[FakeEngine, str, bool]]:
    engine = FakeEngine()
    with serving(engine, strict=request.param) as url:
        yield engine, url, request.param


def body(path: str, n: int) -> dict[str, Any]:
    """A request of an agent, or of a proxy that translates it."""
    head, last = f"{BILL.format(n)}\n\nYou help.", f"hi\n\n{LEFT.format(n)}"
    user = [{"role": "user", "content": last}]
    told = [{"role": "system", "content": head}, *user]
    fields: dict[str, Any] = {
        "/v1/messages": {
            "system": [{"type": "text", "text": t} for t in (BILL.format(n), "You help.")],
            "messages": user,
            "max_tokens": 8,
        },
        "/v1/responses": {"instructions": head, "input": user},
    }.get(path, {"messages": told})
    return {"model": MODEL, "stream": False, **fields}


@pytest.mark.parametrize("path", PATHS)
def test_every_api_leaves_them_out_and_says_so(server, path):
    engine, url, strict = server
    prompts, named = [], None
    for n in (1, 2):
        response = httpx.post(url + path, json=body(path, n))
        assert response.status_code == 200, response.text
        named = response.headers.get("mlxkv-ignored")
        prompts.append(texts(engine.last.request.prompt))
    if strict:
        assert prompts[0] != prompts[1] and named is None
    else:
        assert prompts == [["You help.", "hi"]] * 2
        assert named == f"{BILLING}, {TOTAL_TOKENS}"


@pytest.mark.parametrize(
    "text", [LEFT.format(1) + "\n", "<total_tokens>" + "1 " * 99, BILL[:27], " "]
)
def test_the_time_for_a_text_grows_with_its_length(text):
    long = text * ((1 << 20) // len(text))
    started = time.process_time()
    without_counters(system(long))
    assert time.process_time() - started < 5


def test_texts_beside_a_picture_lose_them_too():
    picture = {"type": "image", "image": b"x"}
    left = {"type": "text", "text": LEFT.format(5)}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "Go.\n" + LEFT.format(5)}]},
        {"role": "tool", "content": [picture, left]},
    ]
    kept, names = without_counters(messages)
    go = {"type": "text", "text": "Go."}
    assert [message["content"] for message in kept] == [[picture, go], [picture]]
    assert names == [TOTAL_TOKENS]
    assert without_counters(kept) == (kept, [])
