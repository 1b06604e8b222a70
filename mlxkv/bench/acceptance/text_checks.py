"""Chat and history, reasoning, and structured output."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from typing import Any

from mlxkv.bench.acceptance.report import Skip, Wrong, brief, holds, said
from mlxkv.bench.acceptance.subject import (
    NOT_WORTH_LOADING,
    Subject,
    figures,
    next_turn,
    user,
)
from mlxkv.engine.prompt import template_options
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import join_parts
from mlxkv.generation.request import Request
from mlxkv.parsers.formats import thinks

THOUGHT_TOKENS = 512
CAPITAL = "What is the capital of France? Answer in one word."
SUM = "What is 17 + 25?"


def answers(subject: Subject) -> str:
    """A question is answered."""
    made = subject.ask(subject.question(CAPITAL))
    said(made.text, ["Paris"])
    return brief(made.text)


def remembers(subject: Subject) -> str:
    """A second turn knows the first, and computes only what is new."""
    subject.needs_chat()
    talk = subject.llm.conversation(f"You are brief. (Session {subject.mark}.)")
    question = "What is my name?"
    first = list(talk.send("My name is Ada. Greet me.", max_tokens=24))[-1].stats
    held = talk.kv_tokens
    chunks = list(talk.send(question, max_tokens=24))
    stats = chunks[-1].stats
    assert first is not None and stats is not None
    n_new = len(subject.llm.encode_text(question))
    n = stats.prompt_tokens
    holds(n >= first.prompt_tokens + n_new, f"a prompt of {n} tokens has not the first turn in it")
    if talk.append_only:
        computed, new = stats.computed_tokens, max(n - held, 1)
        most = new + NOT_WORTH_LOADING
        holds(computed <= most, f"{computed} tokens were computed for {new} new ones")
    said(join_parts(chunks)[0], ["Ada"])
    return figures(stats)


def chat_reuse(subject: Subject) -> str:
    """A conversation that begins like another one restores its KV."""
    text = f"This is request {subject.mark}. Name one "
    first, then = subject.question(f"{text}river."), subject.question(f"{text}mountain.")
    return figures(subject.reuses(first, then, max_tokens=1).stats)


def _options(subject: Subject, think: bool) -> dict[str, Any] | None:
    """The template's variables for reasoning or none; None where it has no switch."""
    subject.needs_chat()
    try:
        return template_options(subject.llm, Request.of(user(SUM), think=think))
    except UsageError:
        return None


def _thinking(subject: Subject) -> dict[str, Any]:
    """Options of a request that wants reasoning; none for a model that always reasons."""
    if _options(subject, True) is not None:
        return {"think": True}
    if thinks(subject.llm.tokenizer):
        return {}
    raise Skip("the model does not reason, as far as its chat template tells")


def thinks_on(subject: Subject) -> str:
    """With reasoning on, it comes apart from the answer."""
    options = _thinking(subject)
    made = subject.ask(user(SUM), max_tokens=THOUGHT_TOKENS, **options)
    if not made.reasoning:
        raise Wrong(f"no reasoning; the answer is {brief(made.text)!r}")
    if made.finish_reason == "length":
        raise Wrong(f"the reasoning did not end within {THOUGHT_TOKENS} tokens")
    said(made.text, ["42"])
    return f"{len(made.reasoning):,} characters of reasoning, then {brief(made.text)!r}"


def thinks_off(subject: Subject) -> str:
    """With reasoning off, the prompt says so, and the answer is not taken for reasoning."""
    off = _options(subject, False)
    if off is None or _options(subject, True) is None:
        raise Skip("the chat template has no switch for reasoning")
    prompts = [
        subject.llm.render(user(SUM), **(_options(subject, on) or {})) for on in (True, False)
    ]
    holds(prompts[0] != prompts[1], "the prompt is the same with reasoning on and off")
    made = subject.ask(user(SUM), think=False, max_tokens=THOUGHT_TOKENS)
    if made.reasoning:
        raw = subject.llm.tokenizer.decode(made.tokens, skip_special_tokens=False).lstrip()
        start = made.reasoning.lstrip()[:16]
        holds(not raw.startswith(start), f"the answer was read as reasoning: {start!r}")
        if "reasoning_effort" not in off:
            raise Wrong(f"it reasoned all the same: {brief(made.reasoning)!r}")
    said(made.text, ["42"])
    return brief(made.text)


def thinks_reuse(subject: Subject) -> str:
    """A turn behind an answer with reasoning restores what the template keeps of it."""
    options = _thinking(subject)
    first = user(f"This is request {subject.mark}. {SUM}")
    return figures(subject.reuses(first, next_turn(first, "42", "And 17 + 26?"), **options).stats)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Berlin", "Paris", "Rome"]},
        "is_capital": {"type": "boolean"},
        "rivers": {"type": "array", "items": {"enum": ["Seine", "Spree"]}, "maxItems": 2},
        "founded": {"type": "integer", "minimum": 1, "maximum": 2000},
    },
    "required": ["city", "is_capital", "rivers", "founded"],
    "additionalProperties": False,
}
SCHEMA_TOKENS = 200
DESCRIBE = "Describe the capital of France as a JSON object."


def schema(subject: Subject) -> str:
    """An answer matches a JSON schema."""
    made = subject.ask(subject.question(DESCRIBE), format=SCHEMA, max_tokens=SCHEMA_TOKENS)
    if made.finish_reason == "length":
        holds(_begins(made.text), f"it does not match the schema: {brief(made.text)!r}")
        raise Wrong(f"the object did not end within {SCHEMA_TOKENS} tokens")
    value: Any = None
    with contextlib.suppress(ValueError):
        value = json.loads(made.text)
    holds(_matches(value), f"it does not match the schema: {brief(made.text)!r}")
    said(value["city"], ["Paris"])
    return brief(made.text)


def _matches(value: Any) -> bool:
    properties = SCHEMA["properties"]
    if not isinstance(value, dict) or value.keys() != properties.keys():
        return False
    rivers, founded = value["rivers"], value["founded"]
    return (
        value["city"] in properties["city"]["enum"]
        and isinstance(value["is_capital"], bool)
        and isinstance(rivers, list)
        and len(rivers) <= 2
        and all(river in properties["rivers"]["items"]["enum"] for river in rivers)
        and type(founded) is int
        and 1 <= founded <= 2000
    )


def _begins(text: str) -> bool:
    """Whether text is the beginning of an object of the schema: white space may go on for long."""
    text = re.sub(r"\s+", "", text)
    rivers = [r for n in range(3) for r in itertools.product(("Seine", "Spree"), repeat=n)]
    for city, is_capital, some in itertools.product(
        SCHEMA["properties"]["city"]["enum"], (True, False), rivers
    ):
        value = {"city": city, "is_capital": is_capital, "rivers": some}
        head = json.dumps(value, separators=(",", ":"))[:-1] + ',"founded":'
        if head.startswith(text) or re.fullmatch(re.escape(head) + r"\d{1,4}", text):
            return True
    return False


def pattern(subject: Subject) -> str:
    """An answer matches a regular expression."""
    date = re.compile(r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]")
    question = subject.question("On which day did humans first walk on the Moon?")
    made = subject.ask(question, format=date)
    holds(date.fullmatch(made.text), f"it does not match: {brief(made.text)!r}")
    said(made.text, ["1969"])
    return made.text


def schema_reuse(subject: Subject) -> str:
    """A format does not cost the prefix."""
    text = f"This is request {subject.mark}. Describe the capital of "
    prompts = (subject.question(f"{text}{name} as JSON.") for name in ("France", "Italy"))
    return figures(subject.reuses(*prompts, format=SCHEMA, max_tokens=1).stats)
