"""What the engine has, Python has: formats, log-probabilities, several answers, batches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import mlxkv
from mlxkv.errors import UsageError
from mlxkv.llm.llm import LLM
from mlxkv.sampling.grammar import Grammar
from tests.support.command_line import chat_model

PROMPTS = ["hello", "and then there was", "x" * 300]


class Point(BaseModel):
    x: int


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder: Path = tmp_path_factory.mktemp("generate")
    return mlxkv.load(chat_model(folder / "llama"), dtype="float32")


@pytest.mark.parametrize(
    "format", [re.compile("(yes|no) [0-9]{3}"), Grammar("regex", "(yes|no) [0-9]{3}")]
)
def test_an_answer_matches_its_regex(llm, format):
    answer = llm.generate("hello", format=format, max_tokens=50)
    assert re.fullmatch("(yes|no) [0-9]{3}", answer.text)
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("format", [Point, Point.model_json_schema()])
def test_an_answer_is_an_object_of_its_schema(llm, format):
    answer = llm.generate([{"role": "user", "content": "hi"}], format=format, max_tokens=200)
    assert answer.finish_reason in ("stop", "length")
    if answer.finish_reason == "stop":
        Point.model_validate_json(answer.text)
    assert re.match(r'\s*\{\s*"x"\s*:\s*-?[0-9]', answer.text)


def test_any_json_object_is_the_format_json(llm):
    text = llm.generate("hello", format="json", max_tokens=30).text
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize("format", ["yaml", 5, ["x"]])
def test_what_is_no_format_is_refused(llm, format):
    with pytest.raises(UsageError, match="format must be"):
        llm.generate("hello", format=format)


def test_a_grammar_that_cannot_be_read_is_refused_at_the_call(llm):
    with pytest.raises(UsageError):
        llm.stream("hello", format=re.compile("(?=a)b"))


def test_log_probabilities_come_with_each_token(llm):
    answer = llm.generate("hello", max_tokens=5, logprobs=2)
    assert [each.token for each in answer.logprobs] == answer.tokens
    for each in answer.logprobs:
        assert len(each.top) == 2
        assert each.logprob == each.top[0].logprob <= 0  # greedy: the likeliest
    assert llm.generate("hello", max_tokens=5).logprobs == ()


@pytest.mark.parametrize("n", [-1, 21, True, 1.5])
def test_logprobs_out_of_range_are_refused(llm, n):
    with pytest.raises(UsageError, match="logprobs"):
        llm.generate("hello", logprobs=n)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4}])
def test_a_list_of_prompts_is_answered_as_each_alone(llm, options):
    together = llm.generate(PROMPTS, max_tokens=12, **options)
    assert [each.tokens for each in together] == [
        llm.generate(prompt, max_tokens=12, **options).tokens for prompt in PROMPTS
    ]


def test_lists_of_ids_and_of_messages_are_batches_too(llm):
    ids = [llm.encode(prompt) for prompt in PROMPTS[:2]]
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
    for batch in (ids, chats):
        texts = [each.text for each in llm.generate(batch, max_tokens=6)]
        assert texts == [llm.generate(each, max_tokens=6).text for each in batch]


def test_several_answers_have_seeds_one_after_the_other(llm):
    several = llm.generate("hello", n=3, max_tokens=8, temperature=1.0, seed=7)
    alone = [llm.generate("hello", max_tokens=8, temperature=1.0, seed=7 + i) for i in range(3)]
    assert [each.tokens for each in several] == [each.tokens for each in alone]
    assert len({tuple(each.tokens) for each in several}) == 3


def test_each_prompt_of_a_batch_gets_its_answers_in_a_row(llm):
    answers = llm.generate(PROMPTS[:2], n=2, max_tokens=4)
    first, second = (llm.generate(prompt, max_tokens=4).tokens for prompt in PROMPTS[:2])
    assert [each.tokens for each in answers] == [first, first, second, second]


def test_a_prompt_is_encoded_once_however_many_answers_it_gets(llm, monkeypatch):
    encode, encoded = llm.tokenizer.encode, []
    monkeypatch.setattr(
        llm.tokenizer, "encode", lambda text, **more: encoded.append(text) or encode(text, **more)
    )
    llm.generate(PROMPTS[:2], n=3, max_tokens=2)
    assert encoded == PROMPTS[:2]


@pytest.mark.parametrize("n", [0, -1, True, "2"])
def test_n_is_a_number_of_answers(llm, n):
    with pytest.raises(UsageError, match="n must be a whole number"):
        llm.generate("hello", n=n)


def test_a_batch_without_prompts_is_refused(llm):
    with pytest.raises(UsageError, match="empty"):
        llm.generate([])


def test_a_stream_is_of_one_prompt(llm):
    with pytest.raises(UsageError, match="stream answers one prompt"):
        llm.stream(["a", "b"])


def test_two_streams_may_be_read_in_turns(llm):
    first, second = (llm.stream(prompt, max_tokens=6) for prompt in PROMPTS[:2])
    tokens = [(a.token, b.token) for a, b in zip(first, second, strict=True)]
    alone = [llm.generate(prompt, max_tokens=6).tokens for prompt in PROMPTS[:2]]
    assert tokens == list(zip(*alone, strict=True))


def test_recommended_sampling_is_what_the_models_file_says(llm, monkeypatch):
    given = mlxkv.load(llm.path, dtype="float32")
    (given.path / "generation_config.json").write_text(json.dumps({"temperature": 1.0}))
    own = given.generate("hello", max_tokens=8, temperature=1.0, seed=3).tokens
    greedy = given.generate("hello", max_tokens=8, seed=3).tokens
    assert given.generate("hello", max_tokens=8, seed=3, recommended=True).tokens == own != greedy


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"logit_bias": None}])
def test_tokens_that_the_models_file_suppresses_do_not_come(llm, options):
    given = mlxkv.load(llm.path, dtype="float32")
    before = given.generate("hello", max_tokens=6, **options).tokens
    if "logit_bias" in options:
        options = {"logit_bias": dict.fromkeys(before, 50.0)}
    file = given.path / "generation_config.json"
    said = json.loads(file.read_text()) if file.exists() else None
    try:
        file.write_text(json.dumps({**(said or {}), "suppress_tokens": before}))
        again = mlxkv.load(llm.path, dtype="float32")
        assert not set(again.generate("hello", max_tokens=6, **options).tokens) & set(before)
    finally:
        file.unlink() if said is None else file.write_text(json.dumps(said))
