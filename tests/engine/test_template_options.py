"""Variables of the chat template that a request sets."""

from __future__ import annotations

import pytest

import mlxkv
from mlxkv.chat.chat_template import PROTECTED
from mlxkv.errors import MlxkvError, UsageError
from mlxkv.generation.request import Request
from tests.support.command_line import TEMPLATE, chat_model

SWITCH = (
    TEMPLATE
    + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% for word in words or [] %}[{{ word }}]{% endfor %}{{ bos_token }}"
)
HI = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = chat_model(tmp_path_factory.mktemp("options") / "m", template=SWITCH)
    with mlxkv.load(path) as llm:
        yield llm


def n_prompt(llm, **options) -> int:
    return llm.chat(HI, max_tokens=1, **options).stats.prompt_tokens


def test_they_are_the_templates_variables(llm):
    plain = n_prompt(llm)
    off = n_prompt(llm, template_options={"enable_thinking": False})
    assert off == plain + len("<think></think>")
    assert n_prompt(llm, template_options={"words": ["a", "bc"]}) == plain + len("[a][bc]")
    assert (
        n_prompt(llm, template_options={"unknown": 1})
        == plain
        == n_prompt(llm, template_options={})
    )


def test_they_come_before_think(llm):
    off = n_prompt(llm, think=False)
    assert n_prompt(llm, think=True, template_options={"enable_thinking": False}) == off
    assert n_prompt(llm, think=False, template_options={"enable_thinking": True}) == n_prompt(llm)


def test_a_conversation_takes_them(llm):
    sizes = [
        list(llm.conversation().send("hello", max_tokens=1, template_options=options))[-1]
        for options in (None, {"words": ["abc"]})
    ]
    assert sizes[1].stats.prompt_tokens == sizes[0].stats.prompt_tokens + len("[abc]")


@pytest.mark.parametrize("name", sorted(PROTECTED))
def test_what_a_request_sets_otherwise_cannot_be_set(name):
    with pytest.raises(UsageError, match=f"template_options cannot set {name}"):
        Request.of(HI, template_options={name: 1})


def test_a_text_has_no_template(llm):
    with pytest.raises(UsageError, match="needs messages"):
        llm.generate("hello", template_options={"a": 1})


def test_values_are_those_of_json(llm):
    with pytest.raises(MlxkvError, match="words"):
        llm.chat(HI, template_options={"words": [print]})
