"""Chat templates: renderings as transformers', errors, limits, and append-only continuation."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
import time
from typing import Any

import pytest

from mlxkv.chat.chat_template import ChatTemplate, append_only_suffix, thinking_options
from mlxkv.chat.jinja import sandbox as jinja_sandbox
from mlxkv.errors import TemplateError, UsageError
from tests.support.chat_templates.cases import (
    ANSWER,
    CALL,
    CONVERSATIONS,
    GOLDEN,
    HELLO,
    MORE,
    PARTS,
    SYSTEM,
    TEMPLATES,
    THOUGHT,
    TOKENS,
    TOOLS,
)
from tests.support.paths import ROOT

GOLDENS = json.loads(GOLDEN.read_text(encoding="utf-8"))
USER = {"role": "user", "content": "Hello"}


def template(name: str) -> ChatTemplate:
    return of(TEMPLATES[name].read_text(encoding="utf-8"))


def of(source: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, name_of_file="dir/chat_template.jinja", **{**TOKENS, **options})


def refused(source: str, **extra: Any) -> str:
    """The one line with which a template fails."""
    with pytest.raises(TemplateError) as caught:
        of(source).render([USER], **extra)
    message = str(caught.value)
    assert message.startswith("dir/chat_template.jinja: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_renders_as_in_transformers(name: str, case: str):
    options = dict(CONVERSATIONS[case])
    messages, golden = options.pop("messages"), GOLDENS[name][case]
    if "text" in golden:
        assert template(name).render(messages, **options) == golden["text"]
        return
    with pytest.raises(TemplateError) as caught:
        template(name).render(messages, **options)
    # The text of the error is the template's, or Python's, in both.
    kind, _, said = golden["error"].partition(": ")
    assert said in str(caught.value)
    assert ("refuses" in str(caught.value)) == (kind == "TemplateError")


def test_the_goldens_cover_every_template_and_conversation():
    assert {name: set(cases) for name, cases in GOLDENS.items()} == {
        name: set(CONVERSATIONS) for name in TEMPLATES
    }


def test_html_and_unicode_are_not_escaped_by_tojson():
    text = of("{{ messages[0] | tojson }}").render([{"role": "user", "content": "<é>&'日"}])
    assert text == """{"role": "user", "content": "<é>&'日"}"""


def test_a_special_token_that_is_not_set_writes_nothing():
    assert of("[{{ bos_token }}{{ pad_token }}]", bos_token=None).render([USER]) == "[]"
    assert of("{{ pad_token }}", special_tokens={"pad_token": "<p>"}).render([USER]) == "<p>"


def test_an_extra_variable_wins_over_a_special_token():
    assert of("{{ bos_token }}").render([USER], bos_token="<other>") == "<other>"


def test_tools_select_the_template_for_tools():
    both = of("plain", tools_source="with tools")
    assert both.render([USER]) == "plain"
    assert both.render([USER], tools=TOOLS) == "with tools"
    assert of("plain").render([USER], tools=TOOLS) == "plain"


def test_strftime_now_writes_the_date():
    # Twice, in case midnight on New Year's Eve falls between.
    years = {
        time.strftime("%Y"),
        of("{{ strftime_now('%Y') }}").render([USER]),
        time.strftime("%Y"),
    }
    assert len(years) <= 2


def test_what_a_message_holds_is_never_run_as_a_template():
    text = of("{{ messages[0].content }}").render([{"role": "user", "content": "{{ 1 / 0 }}"}])
    assert text == "{{ 1 / 0 }}"


def test_rendering_leaves_the_messages_as_they_were():
    message = {"role": "user", "content": None, "list": [1]}
    with pytest.raises(TemplateError):
        of("{{ messages[0].list.append(2) }}").render([message])
    assert message == {"role": "user", "content": None, "list": [1]}


def test_a_subclass_of_a_plain_type_renders_as_its_value():
    class Role(str, enum.Enum):  # noqa: UP042 - its str() is "Role.USER", a StrEnum's is not
        USER = "user"

    assert of("{{ messages[0].role }}").render([{"role": Role.USER}]) == "user"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ("hello", "messages must be a list of dicts; got str"),
        ([{"content": "x"}], 'message 1 must be a dict with a "role"'),
        ([USER, "hello"], "message 2 must be a dict"),
        ([{"role": "user", "content": object()}], "message 1: a chat template takes text"),
        ([{"role": "user", "content": b"x"}], "got b'x'"),
    ],
)
def test_messages_of_the_wrong_shape_are_a_usage_error(messages: Any, said: str):
    with pytest.raises(UsageError, match=said):
        template("chatml").render(messages)


@pytest.mark.parametrize("tools", [{"name": "x"}, "x", ["x"]])
def test_tools_of_the_wrong_shape_are_a_usage_error(tools: Any):
    with pytest.raises(UsageError, match="tools must be a list of dicts"):
        template("tools").render([USER], tools=tools)


def test_a_syntax_error_names_the_file_and_the_line():
    assert "chat_template.jinja: line 2: syntax error: " in refused("\n{% for x %}")
    assert "syntax error" in refused("{{ x | no_such_filter }}")


def test_what_the_template_refuses_is_one_line():
    said = refused("{{ raise_exception('no\n  such role') }}")
    assert said.endswith("the template refuses this conversation: no such role")


def test_a_template_that_fails_says_why_without_a_class_of_jinja():
    said = refused("{{ x.y }}")
    assert said.endswith("the template failed on this conversation: 'x' is undefined")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.open }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__class__() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ dict.update(messages[0], a=1) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ lipsum(n=1000000) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as x %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str):
    refused(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ loop.length }}{% endfor %}"
        "{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{{ m(99) }}",
        "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 10 ** (10 ** 10) }}",
    ],
)
def test_a_template_that_would_run_or_write_for_ever_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jinja_sandbox, "MAX_STEPS", 50_000)
    monkeypatch.setattr(jinja_sandbox, "MAX_CHARS", 1_000_000)
    said = refused(source)
    assert "stopped: " in said or "Range too big" in said


HELD = "{% set held = 'x' * 30000 %}"
NESTED = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)


def grown(step: str) -> str:
    """A template that makes a text longer 60 times."""
    again = "{% for i in range(60) %}{% set ns.s = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(s='xxxx') %}" + again


@pytest.mark.parametrize(
    "source",
    [
        grown("ns.s ~ ns.s"),
        grown("ns.s + ns.s"),
        grown("[ns.s, ns.s] | join"),
        grown("ns.s.join([ns.s, ns.s])"),
        grown("ns.s | replace('x', 'xx')"),
        grown("ns.s.replace('x', 'xx')"),
        grown("'%s%s' % (ns.s, ns.s)"),
        grown("'{}{}'.format(ns.s, ns.s)"),
        grown("'%s%s' | format(ns.s, ns.s)"),
        grown("(ns.s | list + ns.s | list) | join"),
        "{{ '%9000000d' % 1 }}",
        "{{ '%*d' % (9000000, 1) }}",
        "{{ '{:>9000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 9000000) }}",
        "{{ '%9000000d' | format(1) }}",
        "{{ 'a' | center(9000000) }}",
        "{{ 'a'.ljust(9000000) }}",
        "{{ '1'.zfill(9000000) }}",
        "{{ ('\\t' * 3000).expandtabs(3000) }}",
        "{{ ('\\n' * 3000) | indent(3000) }}",
        "{{ ('a ' * 3000) | wordwrap(1, wrapstring='x' * 3000) }}",
        "{{ ('a' * 3000).translate({97: 'x' * 3000}) }}",
        "{{ [1] | batch(9000000, 0) | list }}",
        "{{ [1] | slice(9000000) | list }}",
        "{{ [1] | tojson(indent=9000000) }}",
        "{{ (range(9999) | batch(1) | list) | sum(start=[]) }}",
        "{% for i in range(9999) %}{% set x = range(9999) | map('string') | list %}{% endfor %}",
        "{% set l = range(9999) | list %}{% for i in range(9999) %}{% set x = l | sort %}"
        "{% endfor %}",
        HELD + "{% set y %}{% for i in range(999) %}{{ held }}{% endfor %}{% endset %}",
        HELD + "{% for i in range(999) %}{% set x = held | upper %}{% endfor %}",
        HELD + "{% for i in range(999) %}{% set x = held[1:] %}{% endfor %}",
        HELD + "{% for i in range(9999) %}{% set x = 'y' in held %}{% endfor %}",
        HELD + "{% for i in range(9999) %}{% set x = held.count('y') %}{% endfor %}",
        HELD + "{% set x = (held ~ held).split('x') %}",
        NESTED + "{{ ns.a }}",
        NESTED + "{{ ns.a | tojson }}",
        NESTED + "{% set x = ns.a ~ '' %}",
        NESTED + "{% set x = '%s' % [ns.a] %}",
        NESTED + "{% set x = ns.a == ns.b %}",
        NESTED + "{% set x = ns.a is eq(ns.b) %}",
        NESTED + "{% set x = ns.a in [ns.b] %}",
        "{% set ns = namespace(a=7) %}{% for i in range(60) %}{% set ns.a = ns.a * ns.a %}"
        "{% endfor %}",
    ],
)
def test_a_template_that_builds_too_much_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_STEPS", 50_000)
    monkeypatch.setattr(jinja_sandbox, "MAX_CHARS", 1_000_000)
    monkeypatch.setattr(jinja_sandbox, "MAX_BYTES", 2_000_000)
    assert "stopped: " in refused(source)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 1 + 2 }} {{ 'a' + 'b' + role }} {{ ([1] + [2])[1:] }}", "3 abuser [2]"),
        ("{{ 'a' ~ 1 ~ none }} {{ 'b' in 'abc' }} {{ 3 not in [1, 2] }}", "a1None True True"),
        ("{{ 'abcd'[1:3] }}{{ [1, 2, 3][::-1] }} {{ 'x'[5:] }}", "bc[3, 2, 1] "),
        ("{{ [3, 1] | sort | join('-') }} {{ [[1], [2]] | sum(start=[]) }}", "1-3 [1, 2]"),
        ("{{ messages | map(attribute='role') | list }}", "['user']"),
        ("{{ '%5d|' % 12 }}{{ '{:>4}'.format('a') }}", "   12|   a"),
        ("{{ '%s of 9000000000' % 1700000000 }} {{ '{}'.format(9000000000) }}", None),
        ("{% set ns = namespace(n=1) %}{{ ns.n }}{{ ns.none }}{{ ns.none is defined }}", "1False"),
        ("{% set x = dict(items=1, a=2) %}{{ x.a }}{{ x.items is callable }}", "2True"),
        ("{{ [1] == [1] }} {{ [1] != [2] }} {{ [1] is eq([1]) }} {{ 1 is in([1]) }}", "True " * 4),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') + m(2) }}", "<a><2>"),
    ],
)
def test_what_counts_computes_the_same(source: str, text: str | None):
    if text is None:
        text = "1700000000 of 9000000000 9000000000"
    head = "{% set role = messages[0].role %}"
    assert of(head + source).render([USER]).strip() == text.strip()


def test_endless_recursion_is_an_error():
    assert "nests too deeply" in refused("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


def test_loops_keep_jinjas_loop_variables():
    source = (
        "{% for x in 'abc' %}{{ loop.index }}{{ loop.length }}{{ loop.revindex0 }}"
        "{{ loop.previtem }}{{ loop.nextitem }}{{ loop.last }} {% else %}none{% endfor %}"
        "{% for x in [] %}{% else %}empty{% endfor %}"
        "{% for x in [1, [2]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
    )
    assert of(source).render([USER]) == "132bFalse 231acFalse 330bTrue empty12"


def test_the_step_limit_leaves_room_for_long_conversations():
    # 1,000 messages, each of which looks at all of them.
    source = "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.content }}{% endfor %}"
    assert of(source).render([USER] * 1000) == "Hello" * 1000


def test_jinja2_is_imported_by_the_first_render_and_not_before():
    code = (
        "import sys; from mlxkv.chat.chat_template import ChatTemplate; t = ChatTemplate('x');"
        "assert 'jinja2' not in sys.modules; t.render([{'role': 'user'}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Append-only continuation -------------------------------------------------------------------------

APPENDING = ["chatml", "headers", "turns", "tools", "reasoning"]


def first_turn(name: str) -> list[dict[str, Any]]:
    return [USER] if name == "turns" else [SYSTEM, USER]


@pytest.mark.parametrize("name", [*APPENDING, "inst"])
@pytest.mark.parametrize("answer", ["An answer.", "", "Two\n\nparagraphs", "日本 🙂", "<|im_end|>"])
def test_cached_text_and_suffix_are_the_rendering_of_the_next_turn(name: str, answer: str):
    chat = template(name)
    # Mistral's style moves the system prompt to the last user turn; without one it only appends.
    earlier = [USER] if name == "inst" else first_turn(name)
    turn = [*earlier, {"role": "assistant", "content": answer}]
    suffix = append_only_suffix(chat, turn, [MORE])
    assert suffix is not None
    whole = chat.render([*turn, MORE])
    cached = chat.render(earlier) + answer
    if name == "inst":
        # The template writes a space before the answer where the model wrote none.
        cached, whole = cached.replace(" ", ""), whole.replace(" ", "")
        suffix = suffix.replace(" ", "")
    assert cached + suffix == whole


@pytest.mark.parametrize("name", APPENDING)
def test_white_space_around_an_answer_does_not_break_the_prefix(name: str):
    chat = template(name)
    said = "\n  An answer. \n\n"
    turn = [*first_turn(name), {"role": "assistant", "content": said}]
    suffix = append_only_suffix(chat, turn, [MORE])
    plain = [*first_turn(name), {"role": "assistant", "content": "An answer."}]
    assert suffix is not None
    assert suffix == append_only_suffix(chat, plain, [MORE])


def test_turns_add_up_over_a_conversation_with_untrimmed_answers():
    chat = template("headers")
    messages: list[dict[str, Any]] = [SYSTEM, USER]
    cached = chat.render(messages)
    for i in range(4):
        answer, user = f" answer {i}\n", {"role": "user", "content": f"question {i}"}
        messages.append({"role": "assistant", "content": answer})
        suffix = append_only_suffix(chat, messages, [user], prompt=cached)
        assert suffix is not None
        cached += answer + suffix
        messages.append(user)
    assert "".join(cached.split()) == "".join(chat.render(messages).split())


def test_a_template_that_drops_reasoning_is_not_append_only():
    chat = template("reasoning")
    assert append_only_suffix(chat, [USER, THOUGHT], [MORE]) is None
    # Reasoning kept apart by the caller is still in the cache.
    apart = {"role": "assistant", "content": "Answer.", "reasoning_content": "hm"}
    raw = "<think>\nhm\n</think>\n\nAnswer."
    assert append_only_suffix(chat, [USER, apart], [MORE], answer=raw) is None


def test_an_opening_that_later_turns_lack_is_not_append_only():
    chat = template("reasoning")
    turn = [USER, {"role": "assistant", "content": "Answer."}]
    assert append_only_suffix(chat, turn, [MORE], enable_thinking=False) is None
    assert append_only_suffix(chat, turn, [MORE]) is not None


def test_a_system_prompt_that_moves_is_not_append_only():
    assert append_only_suffix(template("inst"), [SYSTEM, HELLO, ANSWER], [MORE]) is None


def test_a_prompt_rendered_on_another_day_is_not_append_only():
    chat, turn = template("headers"), [USER, ANSWER]
    yesterday = chat.render([USER], date_string="25 Jul")
    assert append_only_suffix(chat, turn, [MORE], prompt=yesterday, date_string="26 Jul") is None
    assert append_only_suffix(chat, turn, [MORE], prompt=yesterday, date_string="25 Jul")


def test_a_template_that_rewrites_the_answer_is_not_append_only():
    shouting = of("{% for m in messages %}{{ m.content | upper }}|{% endfor %}>")
    assert append_only_suffix(shouting, [USER, ANSWER], [MORE]) is None
    shorter = of("{% for m in messages %}|{{ m.content[:4] }}{% endfor %}|")
    assert (
        append_only_suffix(shorter, [USER, {**ANSWER, "content": "a longer one"}], [MORE]) is None
    )
    forgetful = of("{{ messages[-1].content }}>")
    assert append_only_suffix(forgetful, [USER, ANSWER], [MORE]) is None


def test_a_tool_call_goes_on_where_its_text_is_what_the_template_writes():
    chat = template("tools")
    raw = '<tool_call>\n{"name": "weather", "arguments": {"n":1.5,"place":"Köln"}}\n</tool_call>'
    result = {"role": "tool", "content": "21"}
    suffix = append_only_suffix(chat, [USER, CALL], [result], answer=raw, tools=TOOLS)
    assert suffix is not None
    whole = chat.render([USER, CALL, result], tools=TOOLS)
    assert chat.render([USER], tools=TOOLS) + raw + suffix == whole
    spaced = raw.replace(":1.5", ": 1.5")
    assert append_only_suffix(chat, [USER, CALL], [result], answer=spaced, tools=TOOLS) is None


def test_a_new_turn_that_the_template_refuses_is_its_error():
    with pytest.raises(TemplateError, match="Roles have to alternate"):
        append_only_suffix(template("turns"), [USER, ANSWER], [MORE, MORE])


def test_a_conversation_that_does_not_end_with_an_answer_is_a_usage_error():
    with pytest.raises(UsageError, match="end with the assistant"):
        append_only_suffix(template("chatml"), [USER], [MORE])
    with pytest.raises(UsageError, match="must be text"):
        append_only_suffix(template("chatml"), [PARTS, {"role": "assistant"}], [MORE])


def test_the_variables_that_a_template_reads_are_known():
    assert template("harmony").variables >= {"messages", "tools", "reasoning_effort"}
    assert "enable_thinking" not in template("harmony").variables
    assert template("glm_moe").variables >= {"enable_thinking", "clear_thinking"}
    assert "enable_thinking" in of("x", tools_source="{{ enable_thinking }}").variables
    assert "loop" not in of("{% for x in messages %}{{ loop.index }}{% endfor %}").variables
    with pytest.raises(TemplateError, match="syntax error"):
        _ = of("{% for %}").variables


@pytest.mark.parametrize(
    ("source", "think", "options"),
    [
        ("{{ enable_thinking }}", True, {"enable_thinking": True}),
        ("{{ thinking }}", False, {"thinking": False}),
        ("{{ reasoning_effort }}", True, {}),
        ("{{ reasoning_effort }}", False, {"reasoning_effort": "low"}),
        ("{{ reasoning_effort }}", "high", {"reasoning_effort": "high"}),
        ("{{ enable_thinking }}{{ reasoning_effort }}", False, {"enable_thinking": False}),
        ("", False, {}),
    ],
)
def test_thinking_is_asked_for_by_the_variables_that_the_template_reads(source, think, options):
    assert thinking_options(of(source), think, has_reasoning=bool(source)) == options


@pytest.mark.parametrize(("think", "able"), [(True, False), (False, True), ("low", True)])
def test_a_template_without_a_switch_for_thinking_says_so(think, able):
    with pytest.raises(UsageError, match=r"reasoning"):
        thinking_options(of("{{ messages }}"), think, has_reasoning=able)


@pytest.mark.parametrize("think", [True, False, "low", "high"])
@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize(
    ("source", "switches"),
    [("{{ messages }}", ()), ("{{ enable_thinking }}", ("enable_thinking",))],
)
def test_best_effort_sets_the_switches_that_there_are(source, switches, able, think):
    options = thinking_options(of(source), think, has_reasoning=able, best_effort=True)
    assert options == dict.fromkeys(switches, bool(think))


def test_reasoning_that_a_template_keeps_goes_on_whatever_white_space_it_puts_around_it():
    talk = [USER, {"role": "assistant", "content": "Hi.", "reasoning_content": "hm"}]
    answer = "\n<think>\nhm\n</think>\n\nHi."
    suffix = append_only_suffix(
        template("glm_moe"), talk, [USER], answer=answer, clear_thinking=False
    )
    assert suffix == "<|user|>\nHello<|assistant|>"
    assert append_only_suffix(template("glm_moe"), talk, [USER], answer=answer) is None
