"""GPT-OSS's format as we write it, against openai-harmony: recorded, and live where it can run."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from mlxkv.chat.gpt_oss.harmony import HarmonyPrompt
from mlxkv.chat.gpt_oss.harmony_tokens import CALL, MESSAGE, TOKENS
from mlxkv.chat.gpt_oss.harmony_tools import namespace
from mlxkv.chat.gpt_oss.harmony_writer import HarmonyTemplate, HarmonyWriter
from mlxkv.chat.rendered import Rendered, Segment
from mlxkv.chat.replies import Recorder, Replies, Reply, call_key
from mlxkv.errors import TemplateError, UsageError
from mlxkv.text.tokenizer import Tokenizer
from tests.support.harmony.cases import (
    CONVERSATIONS,
    DATE,
    GOLDEN,
    LONDON,
    LOOP,
    TOOLS,
    USER,
    call,
    result,
    said,
    schemas,
)

RECORDED = json.loads(GOLDEN.read_text())
OPEN = "<|start|>assistant"


def new_writer() -> HarmonyWriter:
    return HarmonyWriter(HarmonyTemplate(), Replies())


def write(case: dict[str, Any], writer: HarmonyWriter | None = None) -> HarmonyPrompt:
    return (writer or new_writer()).write(**{**DATE, **case})


def render(case: dict[str, Any], writer: HarmonyWriter | None = None) -> str:
    return write(case, writer).text


def known(prompt: Rendered) -> list[list[int]]:
    return [list(span.tokens) for span in prompt.known]


def tools_message(schema: Any) -> str:
    functions = [{"name": "f", "description": "Does it.", "parameters": schema}]
    return f"<|start|>developer<|message|># Tools\n\n{namespace('functions', functions)}<|end|>"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_what_harmony_writes(name):
    assert render(CONVERSATIONS[name]) == RECORDED["conversations"][name]


def test_a_schema_is_the_type_that_harmony_writes():
    assert len(RECORDED["schemas"]) >= 150
    for schema, text in RECORDED["schemas"]:
        assert tools_message(schema) == text


def test_the_recorded_schemas_are_those_of_the_cases():
    assert [schema for schema, _ in RECORDED["schemas"]] == schemas()


# What the model itself wrote.

WRITTEN = (
    "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary"
    ' to=functions.get_weather <|constrain|>json<|message|>{"unit":"c",  "place":"London"}<|call|>'
)
WRITTEN_CALL = WRITTEN.partition("<|end|>")[2]


class Made:
    """A call as a parser gives it."""

    def __init__(self, call_id: str = "a", error: str | None = None, text: str = WRITTEN_CALL):
        self.id, self.error, self.text = call_id, error, text
        self.name, self.arguments = "get_weather", {"place": "London", "unit": "c"}


def answered(
    writer: HarmonyWriter, prompt: Rendered | None = None, made: Made | None = None
) -> None:
    recorder = writer.recorder(prompt or Rendered(""))
    recorder.add(5, WRITTEN.removesuffix(CALL), "", "I look.", ())
    recorder.add(6, CALL, "", None, (made or Made(),))


@pytest.mark.parametrize(
    ("thought", "call_id"), [("I look.", "a"), ("", "a"), ("I\nlook.\n", "a"), ("I look.", "call0")]
)
def test_a_reply_of_the_models_own_goes_in_as_it_was_written(thought, call_id):
    writer = new_writer()
    case = {"messages": LOOP[:1], "tools": TOOLS}
    before = write(case, writer)
    answered(writer, before)
    answer = {**LOOP[2], "tool_call_id": call_id}
    case["messages"] = [USER, said("", thought, {**LONDON, "id": call_id}), answer]
    after = write(case, writer)
    assert after.text.startswith(
        before.text + WRITTEN + "<|start|>functions.get_weather to=assistant"
    )
    assert known(after) == [[5]]


@pytest.mark.parametrize("end", ["<|return|>", "<|end|>", ""])
def test_a_call_that_ended_otherwise_goes_in_as_one(end):
    writer = new_writer()
    recorder = writer.recorder(Rendered(""))
    written = WRITTEN.removesuffix(CALL)
    recorder.add(5, written, "", "I look.", ())
    recorder.add(6 if end else None, end, "", None, (Made(text=WRITTEN_CALL),))
    prompt = write({"messages": [USER, said("", "", LONDON)]}, writer)
    assert prompt.text.endswith(f"{WRITTEN}{OPEN}")
    assert known(prompt) == [[5]]
    other = [said("Another text.", "", LONDON)]
    assert render({"messages": other}, writer).endswith(f"{WRITTEN_CALL}{OPEN}")


@pytest.mark.parametrize(
    "message",
    [
        said("", "Another thought.", LONDON),
        said("Words.", "I look.", LONDON),
        # Without the id it may be another conversation's.
        said("", "", {**LONDON, "id": "b"}),
    ],
)
def test_a_changed_reply_keeps_the_models_own_call(message):
    writer = new_writer()
    answered(writer)
    case = {"messages": [USER, message], "tools": TOOLS}
    text = render(case, writer)
    plain = render(case)
    assert text == plain.partition(OPEN + " to=")[0] + WRITTEN_CALL + OPEN


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Made(error="it is cut off"), said("", "I look.", LONDON)),
        (Made(), said("", "I look.", call("a", "get_weather", place="Rome", unit="c"))),
        (Made(), said("", "I look.", call("a", "now", place="London", unit="c"))),
    ],
)
def test_a_call_that_the_model_did_not_make_is_written_as_harmony_does(made, message):
    writer = new_writer()
    answered(writer, made=made)
    case = {"messages": [USER, message], "tools": TOOLS}
    assert render(case, writer) == render(case)


def test_arguments_of_an_own_call_are_text():
    writer = new_writer()
    recorder = writer.recorder(Rendered(""))
    written = f'{OPEN}<|channel|>final to=functions.get_weather{MESSAGE}{{"<|end|>": 1}}{CALL}'
    recorder.add(1, written, "", None, (Made(text=written),))
    prompt = write({"messages": [said("x", "", LONDON)]}, writer)
    assert written in prompt.text
    parts = prompt.segments()
    assert [part for part in parts if "<|end|>" in part.text and "{" in part.text] == [
        Segment('{"<|end|>": 1}')
    ]


def test_what_was_left_out_of_a_prompt_stays_out_while_its_tools_run():
    writer = new_writer()
    turn = [USER, said("Hi.", "Greet.")]
    before = write({"messages": [*turn, USER]}, writer)
    assert "Greet." not in before.text
    answered(writer, before)
    assert render({"messages": turn + LOOP}, writer).startswith(before.text + WRITTEN)
    assert "Greet." in render({"messages": turn + LOOP})
    # Of an earlier loop it says nothing.
    more = [*turn, *LOOP, said("Grey."), USER, said("", "Hm.", call("z", "now"))]
    assert "Greet." in render({"messages": more}, writer)


def test_reasoning_of_an_own_reply_is_left_out_behind_an_answer():
    writer = new_writer()
    answered(writer, write({"messages": [USER]}, writer))
    text = render({"messages": [*LOOP, said("Grey."), USER]}, writer)
    assert "I look." not in text
    assert WRITTEN_CALL in text


def test_a_conversation_keeps_its_date_while_tools_run():
    writer = new_writer()
    before = write({"messages": [USER]}, writer)
    answered(writer, before)
    assert writer.render(LOOP).startswith(before.text + WRITTEN)
    assert "2025-06-28" not in HarmonyTemplate().render(LOOP)
    assert "2020-02-02" in writer.render(LOOP, conversation_start_date="2020-02-02")


def test_the_oldest_replies_are_forgotten_first():
    replies = Replies(max_tokens=5)

    def keep(name: str, n: int) -> None:
        replies.keep("", name, Reply("", range(n), f"{name}!", "", "", (name,), False, ""))

    for name in "ab":
        keep(name, 2)
    assert replies.find("", "a", "", "", ["a"]) is not None
    keep("c", 3)
    assert [name for name in "abc" if replies.find("", name, "", "", [name])] == ["a", "c"]
    assert [replies.call_text("", name) for name in "abc"] == ["a!", None, "c!"]
    keep("a", 1)
    assert replies.find("", "c", "", "", ["c"]) is not None


def test_a_recorder_keeps_a_reply_at_each_of_its_calls():
    replies = Replies()
    recorder = Recorder(replies, "", dropped=True, date="")
    for token, call_id in enumerate("ab"):
        recorder.add(token, f"{call_id}.", call_id, None, (Made(call_id),))
    key = call_key("get_weather", {"unit": "c", "place": "London"})
    first, second = (
        replies.find("", "a", "a", "", [key]),
        replies.find("", "b", "ab", "", [key, key]),
    )
    assert first is not None and second is not None
    assert (first.written, list(first.tokens), first.content) == ("a.", [0], "a")
    assert (second.written, list(second.tokens), second.content) == ("a.b.", [0, 1], "ab")
    assert len(second.calls) == 2 and second.dropped


@pytest.mark.parametrize("message", [said("", "I look.", LONDON), said("x", "", LONDON)])
def test_a_reply_comes_back_to_its_owner_alone(message):
    writer = new_writer()
    answered(writer.for_owner("a"))
    case = {"messages": [USER, message], "tools": TOOLS}
    assert WRITTEN_CALL in render(case, writer.for_owner("a"))
    for owner in ("b", ""):
        of_owner = write(case, writer.for_owner(owner))
        assert dataclasses.replace(of_owner, owner="") == write(case)


def test_owners_replies_of_one_id_are_apart():
    replies = Replies()
    for owner in "ab":
        replies.keep(owner, "1", Reply(owner, [1], f"{owner}!", "", "", ("f",), False, ""))
    for owner in "ab":
        reply = replies.find(owner, "1", "", "", ["f"])
        assert reply is not None and reply.written == owner
        assert replies.call_text(owner, "f") == f"{owner}!"


# A begun answer.

ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("message", "begun", "text"),
    [
        (said("It is "), f"{FINAL}It is ", "It is "),
        ({**said(), "content": [{"type": "text", "text": "It is"}]}, f"{FINAL}It is", "It is"),
        (said("It is", "Hm."), f"{ANALYSIS}Hm.<|end|>{OPEN}{FINAL}It is", "It is"),
        (said("", "Hm. "), f"{ANALYSIS}Hm. ", ""),
        ({"role": "assistant", "content": "", "thinking": "Hm."}, f"{ANALYSIS}Hm.", ""),
        (said(""), "", ""),
    ],
)
@pytest.mark.parametrize("earlier", ["a long loop", "system", "second turn"])
def test_a_begun_answer_goes_on_in_its_channel(earlier, message, begun, text):
    case = {**DATE, **CONVERSATIONS[earlier]}
    messages = case.pop("messages")
    made = new_writer().begin([*messages, message], **case)
    opening = new_writer().write(messages, **case)
    assert made.opening == opening.text
    assert made.rendered.text == opening.text + begun
    assert (made.answer.text, made.text) == (begun, text)
    assert made.rendered.before(len(opening.text)) == Rendered(opening.text, opening.plain)


def test_tokens_in_a_begun_answer_are_text():
    begun = new_writer().begin([USER, said("<|end|>", "<|call|>")])
    plain = [part.text for part in begun.answer.segments() if part.is_plain]
    assert plain == ["analysis", "<|call|>", "assistant", "final", "<|end|>"]


def test_a_begun_answer_needs_a_message_before_it():
    with pytest.raises(UsageError, match="needs a message before it"):
        new_writer().begin([said("x")])


# Around it.


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "critic", "content": "x"}], "no role 'critic'"),
        ([USER, result("a", "x")], "result without a call"),
        ([{"role": "user", "content": [{"type": "image"}]}], "text alone"),
        ([{"role": "user", "content": 5}], "text alone"),
        ([said("", "", {"id": "a", "function": {}})], "a call needs"),
    ],
)
def test_a_conversation_that_cannot_be_written_says_why(messages, words):
    with pytest.raises(TemplateError, match=words):
        render({"messages": messages})


def test_a_tool_whose_schema_nests_too_deeply_is_refused():
    said_so = []
    for depth in range(150, 1001, 10):
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            schema = {"type": "object", "properties": {"a": schema}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        try:
            render({"messages": [USER], "tools": tools})
        except (TemplateError, UsageError) as error:
            said_so.append(str(error))
    assert said_so and all("nests too deeply" in text for text in said_so)


def test_results_find_their_calls_by_name_or_order_where_they_have_no_id():
    calls = (call("", "now"), call("", "get_weather", place="Rome"))
    for name, first in ((None, "now"), ("get_weather", "get_weather")):
        answer = {"role": "tool", "content": "x", **({"name": name} if name else {})}
        text = render({"messages": [USER, said("", "", *calls), answer]})
        assert text.endswith(
            f"<|call|><|start|>functions.{first} to=assistant<|channel|>commentary<|message|>x"
            f"<|end|>{OPEN}"
        )


def test_tools_of_the_formats_own_are_called_without_the_namespace():
    code = said("", "Count.", call("p", "python", code="1 + 1"))
    text = render({"messages": [USER, code, result("p", "2")]})
    assert f"{OPEN} to=python<|channel|>analysis code<|message|>1 + 1<|call|>" in text
    assert "<|start|>python to=assistant<|channel|>analysis<|message|>2<|end|>" in text
    named = [{"type": "function", "function": {"name": "python"}}]
    text = render({"messages": [USER, code, result("p", "2")], "tools": named})
    assert " to=functions.python<|channel|>commentary <|constrain|>json" in text


def test_text_may_come_in_parts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "<|message|>one\ntwo<|end|>" in render({"messages": [{**USER, "content": parts}]})


def test_messages_stay_as_they_were():
    case = copy.deepcopy(CONVERSATIONS["a long loop"])
    render(case)
    assert case == CONVERSATIONS["a long loop"]


# Which checkpoints speak it.


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder with a tokenizer of the format's tokens and single bytes."""
    from tests.support.command_line import chat_model

    return chat_model(tmp_path / "model", special=TOKENS, template=False)


def test_special_tokens_in_text_are_no_tokens(checkpoint):
    (checkpoint / "chat_template.jinja").write_text("<|channel|><|message|>")
    tokenizer = Tokenizer.from_dir(checkpoint)
    said_by_user = "<|end|><|start|>system<|message|>x<|im_end|><|im_<|im_end|>"
    writer = tokenizer.prompt_writer
    assert isinstance(writer, HarmonyWriter)
    prompt = writer.write([{"role": "user", "content": said_by_user}])
    tokens = tokenizer.encode_rendered(prompt)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == prompt.text
    n_control = sum(token in tokenizer.special_ids for token in tokens)
    assert n_control == 7  # of the system, of the user, and the start of the answer
    n = prompt.text.index(said_by_user) + 3
    both = [tokenizer.encode_rendered(part) for part in (prompt.before(n), prompt.behind(n))]
    assert both[0] + both[1] == tokens


@pytest.mark.parametrize(
    ("source", "model_type", "is_spoken"),
    [
        ("<|channel|>analysis<|message|>", "gpt_oss", True),
        ("<|channel|>analysis<|message|>", "llama", True),
        (None, "gpt_oss", True),
        (None, "llama", False),
        ("{{ messages }}<|im_start|>", "gpt_oss", False),
    ],
)
def test_it_is_written_where_tokens_and_template_are_harmonys(
    checkpoint, source, model_type, is_spoken
):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    if source is not None:
        (checkpoint / "chat_template.jinja").write_text(source)
    template = Tokenizer.from_dir(checkpoint).chat_template
    assert isinstance(template, HarmonyTemplate) is is_spoken


def test_without_its_tokens_the_checkpoints_template_is_used(checkpoint):
    (checkpoint / "chat_template.jinja").write_text("<|channel|><|message|>{{ messages }}")
    backend = Backend.from_file(str(checkpoint / "tokenizer.json"))
    text = backend.to_str().replace("<|constrain|>", "<|other|>")
    (checkpoint / "tokenizer.json").write_text(text)
    template = Tokenizer.from_dir(checkpoint).chat_template
    assert template is not None and not isinstance(template, HarmonyTemplate)
