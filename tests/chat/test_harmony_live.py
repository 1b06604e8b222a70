"""GPT-OSS's format as we write it against openai-harmony itself, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxkv.chat.gpt_oss.harmony_tokens import TOKENS
from mlxkv.text.tokenizer import Tokenizer
from tests.chat.test_harmony import write
from tests.support.harmony import reference
from tests.support.harmony.cases import (
    CONVERSATIONS,
    DATE,
    GOLDEN,
    TOOLS,
    USER,
    call,
    result,
    said,
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return reference.tokenizer_folder()


@pytest.fixture(scope="module")
def encoding(folder, tmp_path_factory) -> Any:
    return reference.encoding(folder, tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_dir(folder)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_of_a_conversation_are_harmonys(name, encoding, tokenizer):
    case = {**DATE, **CONVERSATIONS[name]}
    assert tokenizer.encode_rendered(write(case)) == reference.render(encoding, case)


_PIECES = [*"aZ9 \n'(<|>{}", "é", "日", "🎉", *TOKENS, "<|endoftext|>", "<|", "|>", "start"]
_TEXTS = st.lists(st.sampled_from(_PIECES), max_size=12).map("".join)
_CALLS = st.dictionaries(st.sampled_from(["place", "unit", "x"]), _TEXTS | st.integers())


@st.composite
def conversations(draw: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for i in range(draw(st.integers(1, 8))):
        role = draw(st.sampled_from(["system", "user", "answer", "loop"]))
        if role in ("system", "user"):
            messages.append({"role": role, "content": draw(_TEXTS)})
        elif role == "answer":
            messages.append(said(draw(_TEXTS) or "Yes.", draw(_TEXTS)))
        else:
            names = draw(st.lists(st.sampled_from(["now", "get_weather"]), min_size=1, max_size=2))
            calls = [call(f"{i}.{n}", name, **draw(_CALLS)) for n, name in enumerate(names)]
            messages.append(said(draw(_TEXTS), draw(_TEXTS), *calls))
            messages += [result(each["id"], draw(_TEXTS)) for each in calls]
    messages = [m for m in messages if m["role"] != "system" or m["content"]]
    case = {"messages": messages or [USER], **DATE}
    return {**case, "tools": TOOLS} if draw(st.booleans()) else case


@settings(max_examples=300)
@given(case=conversations())
def test_tokens_of_any_conversation_are_harmonys(case, encoding, tokenizer):
    ours = tokenizer.encode_rendered(write(case))
    assert ours == reference.render(encoding, case)


def test_recorded_schemas_are_still_what_harmony_writes(encoding):
    for schema, text in json.loads(GOLDEN.read_text())["schemas"]:
        assert reference.namespace(encoding, schema) == text
