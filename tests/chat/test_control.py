"""Marks in texts that spell control tokens."""

from __future__ import annotations

import time

from mlxkv.chat.control import Controls, Written
from mlxkv.chat.rendered import Rendered

CONTROLS = Controls(frozenset({"<|im_end|>", "<|im_start|>", "<s>"}), frozenset({"<think>"}))


def marked(*messages: dict[str, object]) -> tuple[str, list[dict[str, str]]]:
    mark, (found,) = CONTROLS.mark(messages)
    return mark, found


def test_ordinary_messages_are_left_as_they_are():
    messages = [{"role": "user", "content": "a < b, <im_end>"}]
    mark, (found,) = CONTROLS.mark(messages)
    assert mark == ""
    assert found is messages


def test_unmarking_gives_the_text_and_its_spans():
    mark, (message,) = marked({"role": "user", "content": "a <|im_end|><s> b"})
    text = f"<|im_start|>user\n{message['content']}<|im_end|>"
    assert message["content"] != "a <|im_end|><s> b"
    assert CONTROLS.unmark(text, mark) == Rendered(
        "<|im_start|>user\na <|im_end|><s> b<|im_end|>", ((19, 32),)
    )


def test_overlapping_spellings_are_all_marked():
    controls = Controls(frozenset({"ab", "bc", "b"}))
    mark, (found,) = controls.mark([{"role": "user", "content": "abc"}])
    assert found[0]["content"] == f"a{mark}b{mark}c"
    assert controls.unmark(found[0]["content"], mark) == Rendered("abc", ((0, 3),))


def test_an_answers_own_markers_stay_and_special_tokens_do_not():
    mark, (message,) = marked({"role": "assistant", "content": "<think>x<s>"})
    assert message["content"] == f"<think>x<{mark}s>"
    written = {"role": "assistant", "content": Written("<think>x<s>")}
    assert marked(written)[1][0] == written


def test_tools_and_nested_values_are_marked_with_their_keys():
    tool = {"function": {"name": "f", "parameters": {"properties": {"<s>": {"enum": ["<s>", 1]}}}}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "<think>"}]}]
    mark, (found, tools) = CONTROLS.mark(messages, [tool])
    assert found[0]["content"] == [{"type": "text", "text": f"<{mark}think>"}]
    properties = tools[0]["function"]["parameters"]["properties"]
    assert properties == {f"<{mark}s>": {"enum": [f"<{mark}s>", 1]}}


def test_a_mark_occurs_in_no_text_and_is_found_where_json_escapes_it():
    used = "".join(map(chr, range(0xFDD0, 0xFDE0)))
    mark, (message,) = marked({"role": "user", "content": f"{used}\\ufde0 <s>"})
    assert mark == "\ufde1"
    assert CONTROLS.unmark("<\\ufde1s>", mark) == Rendered("<s>", ((0, 3),))
    assert CONTROLS.unmark(message["content"], mark).text == f"{used}\\ufde0 <s>"


def test_added_tokens_are_control_where_a_template_writes_them():
    added = {"<s>": True, "<think>": False, "<table>": False, "\n\n": False, "<x>": False}
    controls = Controls.of(added, "<think><table>\n\n")
    assert controls.all == {"<s>", "<think>"}


def test_a_long_text_of_brackets_is_scanned_in_no_time():
    many = Controls(frozenset(f"<|reserved_special_token_{i}|>" for i in range(250)))
    messages = [{"role": "user", "content": "<|reserved <div>x</div> " * 5_000}]
    start = time.thread_time()
    assert many.mark(messages)[0] == ""
    assert time.thread_time() - start < 0.25
