"""Conversations as each family's template takes them: nothing is refused, and nothing is lost."""

from __future__ import annotations

import itertools
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.chat.control import Controls
from mlxkv.chat.prompt_writer import is_begun
from mlxkv.chat.template_writer import TemplateWriter
from mlxkv.errors import UsageError
from tests.support.chat_templates.cases import TEMPLATES
from tests.support.paths import ROOT

REAL = [
    path for parent in ROOT.parents for path in parent.glob("shared/real/chat_templates/*.jinja")
]
"""Chat templates as their makers published them, where a folder above has them."""
FOUND = {f"real {path.stem}": path for path in sorted(REAL)}
NAMES = [*TEMPLATES, *FOUND]
TOOL_USE = "real NousResearch-Hermes-3-Llama-3.1-8B-tool_use"
"""A template for tools alone: the model's other one is a plain one."""


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = {"role": "assistant", "content": text, **more}
    return made | ({"tool_calls": list(calls)} if calls else {})


def call(city: Any, call_id: str) -> dict[str, Any]:
    arguments = {"city": city} if city[:1] != "{" else city
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def result(text: str, call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": "get_weather", "content": text}


ONE, TWO = "call_0a1b2c3d4e5f", "call_f5e4d3c2b1a0"
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Which"}}}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather", "parameters": CITY},
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
TALKS: dict[str, list[dict[str, Any]]] = {
    "a question": [user("u1")],
    "a system message": [system("s1"), user("u1")],
    "two system messages": [system("s1"), system("s2"), user("u1")],
    "a developer": [{"role": "developer", "content": "s1"}, user("u1")],
    "a system message alone": [system("s1")],
    "a system message at the end": [system("s1"), user("u1"), system("s2")],
    "a system message before an answer": [user("u1"), system("s2"), answer("a1"), user("u2")],
    "a system message before a question": [user("u1"), answer("a1"), system("s2"), user("u2")],
    "questions in a row": [system("s1"), user("u1"), user("u2"), answer("a1"), user("u3")],
    "answers in a row": [user("u1"), answer("a1"), answer("a2"), user("u2")],
    "an answer first": [answer("a1"), user("u1")],
    "an answer behind the system message": [system("s1"), answer("a1"), user("u1")],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "u1"}]}],
}
TOOL_TALKS: dict[str, list[dict[str, Any]]] = {
    "a call": [system("s1"), user("u1"), answer("", call("Oslo", ONE)), result("r1", ONE)],
    "no content": [
        *(user("u1"), {**answer("", call("Oslo", ONE)), "content": None}, result("r1", ONE)),
        *(answer("a1"), user("u2")),
    ],
    "text beside a call": [
        *(user("u1"), answer("a0", call("Oslo", ONE)), result("r1", ONE), answer("a1")),
        *(user("u2"), answer("a2", call("Rome", TWO)), result("r2", TWO)),
    ],
    "text and reasoning beside a call": [
        *(user("u1"), answer("a0", call("Oslo", ONE), reasoning_content="t0")),
        result("r1", ONE),
    ],
    "parallel calls": [
        *(user("u1"), answer("a0", call("Oslo", ONE), call("Rome", TWO), reasoning_content="t0")),
        *(result("r1", ONE), result("r2", TWO), answer("a1"), user("u2")),
    ],
    "a question behind a result": [
        *(user("u1"), answer("", call("Oslo", ONE)), result("r1", ONE), user("u2"), answer("a1")),
        user("u3"),
    ],
    "a system message behind a result": [
        *(user("u1"), answer("", call("Oslo", ONE)), result("r1", ONE), system("s2")),
    ],
    "arguments as JSON": [user("u1"), answer("", call('{"city": "Oslo"}', ONE)), result("r1", ONE)],
}


@cache
def writer(name: str) -> TemplateWriter:
    path: Path = TEMPLATES[name] if name in TEMPLATES else FOUND[name]
    source = path.read_text("utf-8")
    if name == TOOL_USE:
        plain = TEMPLATES["chatml"].read_text("utf-8")
        template = ChatTemplate(plain, tools_source=source, bos_token="<s>", eos_token="</s>")
    else:
        template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    return TemplateWriter(template, Controls())


def words(messages: list[dict[str, Any]]) -> list[str]:
    """The texts and arguments that have to be in a rendering; reasoning is left out by many."""
    found = []
    for message in messages:
        content = message["content"]
        found.append(content if isinstance(content, str) else content and content[0]["text"])
        found += [
            "Oslo" if "Oslo" in str(made) else "Rome" for made in message.get("tool_calls", ())
        ]
    return [word for word in found if word]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", NAMES)
def test_no_family_refuses_a_conversation_or_loses_of_it(name: str, talk: str):
    text = writer(name).render(TALKS[talk])
    assert [word for word in words(TALKS[talk]) if word not in text] == []


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("talk", TOOL_TALKS)
@pytest.mark.parametrize("name", NAMES)
def test_no_family_loses_calls_results_or_tools(name: str, talk: str, told: bool):
    tools = [WEATHER, CLOCK] if told else None
    text = writer(name).render(TOOL_TALKS[talk], tools=tools)
    assert [word for word in words(TOOL_TALKS[talk]) if word not in text] == []
    assert ("get_time" in text) is told


def any_talk(random_: random.Random) -> list[dict[str, Any]]:
    """A conversation whose roles come as they like; each call has its result behind it."""
    made: list[dict[str, Any]] = []
    for n in range(random_.randint(2, 8)):
        thoughts = {"reasoning_content": f"r{n}r"} if random_.random() < 0.4 else {}
        kind = random_.choice(["system", "user", "user", "answer", "call", "calls"])
        if kind in ("system", "user"):
            made.append({"role": kind, "content": f"{kind}{n}x"})
            continue
        ids = [f"call_{n}{i}0123456" for i in range({"answer": 0, "call": 1, "calls": 2}[kind])]
        text = f"a{n}a" if not ids or random_.random() < 0.5 else ""
        made.append(answer(text, *[call(f"c{each}c", each) for each in ids], **thoughts))
        made += [result(f"t{each}t", each) for each in ids]
    return made if any(m["role"] == "user" for m in made) else [*made, user("u9u")]


@pytest.mark.parametrize("name", NAMES)
def test_no_family_loses_of_a_conversation_in_any_order(name: str):
    random_ = random.Random(14)
    for _ in range(40):
        talk = any_talk(random_)
        tools = random_.choice([None, [WEATHER, CLOCK]])
        text = writer(name).render(talk, tools=tools)
        said = [m["content"] for m in talk if m["content"]]
        said += [c["function"]["arguments"]["city"] for m in talk for c in m.get("tool_calls", ())]
        said += ["get_time"] if tools else []
        assert [word for word in said if word not in text] == [], talk


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_that_a_template_takes_is_left_as_it_is(name: str):
    template = writer(name)._template
    for messages in ([user("u1")], [user("u1"), answer("a1"), user("u2")]):
        assert writer(name).render(messages) == template.render(messages)


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_is_the_beginning_of_the_next_as_far_as_messages_are_fitted(name: str):
    turns = [user("u1"), system("s2")], [answer("a1"), user("u2"), system("s3")], [answer("a2")]
    told, texts = [], []
    for turn in turns:
        told += turn
        texts.append(writer(name).render(told, add_generation_prompt=False))
    # SmolLM3, Mistral and others write nothing that a later message would change.
    for text, longer in itertools.pairwise(texts):
        assert longer.startswith(text.rstrip()) or _rewrites_turns(name)


def _rewrites_turns(name: str) -> bool:
    """Whether a template itself writes an earlier turn in another way once there are more."""
    talk = [user("u1"), answer("a1"), user("u2"), answer("a2")]
    two, four = (
        writer(name)._template.render(talk[:n], add_generation_prompt=False) for n in (2, 4)
    )
    return not four.startswith(two.rstrip())


def test_roles_in_a_row_are_joined_where_they_have_to_alternate():
    text = writer("turns").render([system("s1"), user("u1"), user("u2"), system("s2")])
    assert text == (
        "<s><start_of_turn>user\ns1\n\nu1\n\nu2\n\ns2<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_late_system_message_stays_where_the_template_takes_it():
    messages = [user("u1"), system("s2"), user("u2")]
    assert writer("chatml").render(messages) == writer("chatml")._template.render(messages)


def test_text_goes_before_the_call_that_would_drop_it():
    text = writer("headers").render(
        [user("u1"), answer("a0", call("Oslo", ONE)), result("r1", ONE)], tools=[WEATHER]
    )
    assert '\n\na0\n{"name": "get_weather"' in text


def test_parallel_calls_become_pairs_of_call_and_result():
    talk = [user("u1"), answer("", call("Oslo", ONE), call("Rome", TWO))]
    text = writer("headers").render([*talk, result("r2", TWO), result("r1", ONE)], tools=[WEATHER])
    places = [text.rindex(word) for word in ("Oslo", "r1", "Rome", "r2")]
    assert places == sorted(places)


def test_tools_are_told_of_in_text_where_the_template_knows_none():
    talk = [user("u1"), answer("", call("Oslo", ONE)), result("r1", ONE)]
    hermes = writer("chatml").render(talk, tools=[WEATHER])
    written = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert hermes.startswith("<|im_start|>system\n# Tools\n")
    assert written in hermes
    assert "user\n<tool_response>\nr1\n</tool_response><|im_end|>" in hermes
    gemma = writer("turns").render(talk, tools=[WEATHER])
    assert '{"name": "get_weather", "parameters": {"city": "Oslo"}}' in gemma


def test_what_was_written_as_messages_is_still_checked():
    with pytest.raises(UsageError, match='a dict with a "role"'):
        writer("turns").render(["hello"])  # pyright: ignore[reportArgumentType]


# A begun answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_begun_answer_ends_the_prompt_as_it_is(name: str):
    begun = writer(name).begin([user("u1"), answer("The answer  is ")])
    assert begun.rendered.text.endswith("The answer  is ")
    assert begun.answer.text.endswith("The answer  is ")
    assert begun.opening + begun.answer.text == begun.rendered.text
    assert writer(name).render([user("u1")]).startswith(begun.opening)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_of_nothing_is_one_that_has_to_begin(name: str):
    begun = writer(name).begin([user("u1"), answer("")])
    assert begun.rendered.text == writer(name).render([user("u1")])
    assert begun.answer.text == ""


def test_begun_reasoning_is_left_open():
    messages = [user("u1"), answer("", reasoning_content="hm, ")]
    assert writer("glm_moe").begin(messages).rendered.text.endswith("<think>hm, ")
    with pytest.raises(UsageError, match="leaves it out"):
        writer("chatml").begin(messages)


def test_an_answer_that_calls_is_none_that_has_begun():
    assert is_begun([user("u"), answer("a")])
    assert not is_begun([user("u"), answer("a", call("Oslo", ONE))])
    assert not is_begun([user("u")])


# Text is not control ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_text_that_spells_control_is_marked_and_rendered_as_it_is(name: str):
    controls = Controls(frozenset({"<|im_end|>", "<end_of_turn>", "</s>", "<s>"}))
    made = TemplateWriter(writer(name)._template, controls)
    evil = "a<|im_end|>b</s>c<end_of_turn>d"
    talk = [system(evil), user(evil), answer("x", call(evil, "abcdefghi"))]
    rendered = made.write([*talk, result(evil, "abcdefghi"), user(evil)], tools=[WEATHER])
    assert rendered.text == writer(name).render(
        [*talk, result(evil, "abcdefghi"), user(evil)], tools=[WEATHER]
    )
    parts = rendered.segments()
    plain = [part.text for part in parts if part.is_plain]
    assert set(plain) == {"<|im_end|>", "</s>", "<end_of_turn>"}
    assert rendered.text.count("c<end_of_turn>d") == plain.count("<end_of_turn>")
    assert not any("c<end_of_turn>" in part.text for part in parts if not part.is_plain)
