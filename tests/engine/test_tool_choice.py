"""Which of the tools in a prompt may be called, and that the prompt is the same whatever may."""

from __future__ import annotations

import pytest

import mlxkv
from mlxkv.errors import UsageError
from mlxkv.generation.reader import AnswerReader
from mlxkv.parsers.formats import parser_for
from mlxkv.sampling.grammar import Grammar
from mlxkv.server.tools import Function, tool_options
from tests.sampling.test_grammar import with_template
from tests.support.command_line import chat_model

TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{# <tool_call></tool_call> #}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HARMONY = TOOLS.replace("<tool_call></tool_call>", "<|channel|><|message|>").replace(
    "<|im_start|>assistant\n", "<|start|>assistant"
)
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>",
                  "<|end|>", "<|return|>")  # fmt: skip
FUNCTIONS = [
    Function(name="weather", description="The weather. " * 30, parameters=None, strict=None),
    Function(name="clock", description="The time. " * 30, parameters=None, strict=None),
]
HI = [{"role": "user", "content": "hello"}]
CHOICES = {
    "auto": ("auto", None),
    "none": ("none", None),
    "required": ("required", None),
    "named": ("required", ["clock"]),
    "some": ("auto", ["clock"]),
}


@pytest.fixture(scope="module")
def hermes(tmp_path_factory):
    path = chat_model(
        tmp_path_factory.mktemp("tools") / "m",
        template=TOOLS,
        special=("<tool_call>", "</tool_call>"),
        max_position_embeddings=4096,
    )
    with mlxkv.load(path) as llm:
        yield llm


def ask(llm, choice: str, **options):
    mode, named = CHOICES[choice]
    chosen = {k: v for k, v in tool_options(FUNCTIONS, mode, named).items() if v is not None}
    opener = llm.tokenizer.id_of("<tool_call>")
    wish = {} if opener is None else {"logit_bias": {opener: 100.0}}
    return llm.chat(HI, **{"max_tokens": 60, **chosen, **wish, **options})


def test_turns_that_differ_in_their_choice_share_the_whole_prefix(hermes):
    first = ask(hermes, "auto")
    assert first.stats.prompt_tokens > 600
    for choice in CHOICES:
        assert ask(hermes, choice).stats.computed_tokens <= 1


def test_where_no_tool_may_be_called_the_token_that_begins_a_call_never_comes(hermes):
    opener = hermes.tokenizer.id_of("<tool_call>")
    assert ask(hermes, "auto").tokens[0] == opener
    answer = ask(hermes, "none")
    assert opener not in answer.tokens and not answer.tool_calls and answer.text


@pytest.mark.parametrize("choice, name", [("named", "clock"), ("some", "clock")])
def test_only_tools_that_may_be_called_are_called(hermes, choice, name):
    answer = ask(hermes, choice, max_tokens=400)
    assert [call.name for call in answer.tool_calls] and not answer.text.strip()
    assert {call.name for call in answer.tool_calls} == {name}
    assert all(call.error is None and call.arguments == {} for call in answer.tool_calls)


def test_where_some_tools_may_be_called_text_may_come_as_well(hermes):
    opener = hermes.tokenizer.id_of("<tool_call>")
    answer = ask(hermes, "some", logit_bias={opener: -100.0}, max_tokens=20)
    assert answer.text and not answer.tool_calls


def test_harmony_makes_no_call_where_none_may_be_made(tmp_path):
    path = chat_model(
        tmp_path / "m",
        template=HARMONY,
        special=HARMONY_TOKENS,
        ascii=True,
        max_position_embeddings=4096,
    )
    with mlxkv.load(path) as llm:
        bias = {llm.tokenizer.id_of(t): 60.0 for t in ("<|channel|>", "<|message|>", "<|end|>")}
        for choice in ("none", "some"):
            answer = ask(llm, choice, max_tokens=120, logit_bias=bias)
            written = llm.tokenizer.decode(answer.tokens, skip_special_tokens=False)
            assert "<|channel|>" in written and "<|message|>" in written
            assert not any(call.name != "clock" for call in answer.tool_calls)
            if choice == "none":
                assert "to=" not in written and not answer.tool_calls


@pytest.mark.parametrize("name", ["llama3", "glm4", "hermes"])
@pytest.mark.parametrize("callable, called", [((), False), (("f",), True), (("g",), False)])
def test_a_call_that_is_written_all_the_same_is_text(name, callable, called):
    tokenizer = with_template(name)
    text = {
        "llama3": '{"name": "f", "parameters": {}}',
        "glm4": 'f\n{"a": 1}',
        "hermes": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    }[name]
    parser = parser_for(tokenizer, prompt="", tools=[{"name": "f"}, {"name": "g"}])
    reader = AnswerReader(tokenizer, parser, callable=callable)
    parts = [*map(reader.add, tokenizer.encode(text, add_special_tokens=False)), reader.finish()]
    assert "".join(part.text for part in parts) == ("" if called else text)
    assert [call.name for part in parts for call in part.tool_calls] == (["f"] if called else [])


def test_callable_names_tools_of_the_prompt(hermes):
    with pytest.raises(UsageError, match="callable names 'x'"):
        hermes.chat(HI, tools=[FUNCTIONS[0].schema_of()], callable=("x",))


def test_a_format_stays_where_no_tool_may_be_called(hermes):
    options = tool_options(FUNCTIONS, "none", content=Grammar("regex", "[a-c]{3}"))
    answer = hermes.chat(HI, max_tokens=9, **options)
    assert len(answer.text) == 3 and set(answer.text) <= set("abc")
