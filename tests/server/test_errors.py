"""What clients are told of errors: words that they know, and nothing of this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from mlxkv.base.paths import models_dir
from mlxkv.errors import ContextExceeded, Hint, KVCacheFull, OutOfMemory, TemplateError
from mlxkv.generation.embed import TextTooLong
from mlxkv.server.errors import ANTHROPIC, OLLAMA, OPENAI, RESPONSES, failure_of, fields_of
from mlxkv.server.fields import Texts

APIS = {"anthropic": ANTHROPIC, "ollama": OLLAMA, "openai": OPENAI, "responses": RESPONSES}
FULL_CONTEXT = re.compile(
    r"prompt is too long|maximum context length|context[ _]length|context[ _]window|exceed"
    r"|too many tokens|token limit|reduce the length|input is too long|context size",
    re.IGNORECASE,
)
"""How agents know that they have to compact, over all APIs."""


@pytest.mark.parametrize(
    ("api", "pattern"),
    [
        ("anthropic", r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)"),
        ("openai", r"maximum context length is (?P<limit>\d+) tokens.* has (?P<n>\d+)"),
        ("responses", r"maximum context length is (?P<limit>\d+) tokens.* has (?P<n>\d+)"),
        ("ollama", r"the input length exceeds the context length: (\d+) tokens, and (\d+)"),
    ],
)
def test_a_full_context_is_said_in_the_apis_own_words(api, pattern):
    failure = failure_of(ContextExceeded(22966, 8192), APIS[api])
    assert failure.code == "context_length_exceeded"
    found = re.search(pattern, failure.message)
    assert found and {int(n) for n in found.groups()} == {22966, 8192}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "error",
    [
        KVCacheFull(256, 4096, 1024, "16 GiB", "2 GiB", [Hint("context", 1024, "allows 1,024")]),
        OutOfMemory("the memory limit of 16 GiB does not allow it"),
    ],
)
def test_too_little_memory_is_never_taken_for_a_full_context(api, error):
    failure = failure_of(error, APIS[api])
    assert (failure.status, failure.code) == (503, "insufficient_memory")
    assert not FULL_CONTEXT.search(failure.message), failure.message


@pytest.mark.parametrize(
    "folder", [models_dir() / "m", Path.home() / "My Models", Path("/opt/models/x")]
)
def test_a_file_is_named_without_its_folder(folder):
    error = TemplateError(f"{folder / 'tokenizer_config.json'}: key 'chat_template' is missing")
    message = failure_of(error, OPENAI).message
    assert message.endswith("tokenizer_config.json: key 'chat_template' is missing")
    assert str(folder) not in message and str(Path.home()) not in message
    assert "/opt" not in message


@pytest.mark.parametrize(
    "text", ["GET /v1/models lists them", "10 tokens/s", "https://a.example/b/c", "and/or"]
)
def test_other_slashes_stay(text):
    assert failure_of(OutOfMemory(text), OPENAI).message == text


@pytest.mark.parametrize(
    ("path", "error", "param", "text"),
    [
        (
            "/v1/embeddings",
            TextTooLong(1, 3002, 2048),
            "input",
            "text 2 has 3,002 tokens and the model takes 2,048: shorten it, or have it cut; "
            "try truncate: true",
        ),
        (
            "/v1/rerank",
            ContextExceeded(9093, 8192),
            "documents",
            "a document and the query have 9093 tokens, and the model takes 8192: shorten the "
            "document, or have it cut by max_tokens_per_doc",
        ),
    ],
)
def test_a_text_that_is_too_long_is_said_with_the_routes_own_fields(path, error, param, text):
    failure = failure_of(error, fields_of(path))
    assert (failure.message, failure.param) == (text, param)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "input: Input should be a valid string; input: List should have at least 1 item"),
        (["a"] * 2049, "input: List should have at most 2048 items"),
        ([1], "input.0: Input should be a valid string"),
    ],
)
def test_faults_of_texts_name_the_field_and_no_type(texts, said):
    class Body(BaseModel):
        input: Texts

    with pytest.raises(ValidationError) as caught:
        Body(input=texts)
    errors = [{**each, "loc": ("body", *each["loc"])} for each in caught.value.errors()]
    failure = failure_of(RequestValidationError(errors), OPENAI)
    assert said in failure.message and "constrained" not in failure.message
    assert failure.param is not None and failure.param.startswith("input")
