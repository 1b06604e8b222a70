"""Drafts through a whole model: the same answers, with and without, by all ways to choose."""

from __future__ import annotations

import re
from typing import Any

import pytest

import mlxkv
from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.generation.drafts.pace import Costs
from mlxkv.llm.llm import LLM
from tests.families.test_glm import hub_weights, our_weights
from tests.generation.test_mtp import CONFIG
from tests.support.command_line import chat_model
from tests.support.half_right import half_right
from tests.support.tiny import write_checkpoint

PROMPT = "hello there, hello again, hello there, hello again, hello there"


class Eager(Costs):
    """Every pass takes as long: all that is proposed is computed."""

    def seconds(self, n_rows: int, n_tokens: int) -> float | None:
        return 1.0


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = chat_model(tmp_path_factory.mktemp("drafts") / "llama", ascii=True)
    llm = mlxkv.load(folder, dtype="float32")
    llm.drafting.costs = Eager()
    return llm


SCHEMA = {
    "type": "object",
    "properties": {
        "a_property_with_a_long_name": {"enum": ["one", "two"]},
        "another_property": {"type": "boolean"},
    },
    "required": ["a_property_with_a_long_name", "another_property"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 3, "presence_penalty": 0.5, "logprobs": 2},
        {"temperature": 0.5, "seed": 4, "min_tokens": 40, "repeat_penalty": 1.1},
        {"format": SCHEMA, "temperature": 1.0, "seed": 1, "logprobs": 0},
        {"format": SCHEMA, "temperature": 1.0, "seed": 5, "presence_penalty": 0.5},
        {"format": re.compile("(hello |there ){12}"), "temperature": 1.0, "seed": 2},
        {"temperature": 0, "context": 60, "overflow": "shift"},
    ],
    ids=("greedy", "penalty", "min_tokens", "schema", "forced", "regex", "shift"),
)
def test_a_draft_changes_nothing_of_an_answer(llm: LLM, options: dict[str, Any]):
    options = {"max_tokens": 60, **options}
    plain = llm.generate(PROMPT, draft="off", **options)
    first = llm.generate(PROMPT, **options)
    drafted = llm.generate(PROMPT, **options)  # it was given before, and is looked up
    assert first.tokens == plain.tokens
    assert (drafted.tokens, drafted.text) == (plain.tokens, plain.text)
    assert drafted.finish_reason == plain.finish_reason
    ours, theirs = ([one.logprob for one in each.logprobs] for each in (drafted, plain))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert plain.stats.drafts is None
    assert drafted.stats.drafts is not None
    assert drafted.stats.drafts.accepted > 0
    assert drafted.stats.tokens_a_pass > 1


def test_what_a_format_forces_is_taken(llm: LLM):
    stats = llm.generate("hello", format=SCHEMA, max_tokens=200).stats
    assert stats.drafts is not None
    proposed, accepted = stats.drafts.by["grammar"]
    assert proposed == accepted > 20


def test_a_stop_text_inside_a_draft_ends_the_answer_there(llm: LLM):
    whole = llm.generate(PROMPT, max_tokens=60, temperature=0, draft="off")
    stop = whole.text[30:33]
    plain = llm.generate(PROMPT, max_tokens=60, temperature=0, stop=(stop,), draft="off")
    drafted = llm.generate(PROMPT, max_tokens=60, temperature=0, stop=(stop,))
    assert (drafted.text, drafted.tokens) == (plain.text, plain.tokens)
    assert drafted.finish_reason == "stop"


def test_what_a_model_has_not_is_left_out(llm: LLM):
    stats = llm.generate(PROMPT, draft="mtp", max_tokens=9).stats
    assert stats.generated_tokens == 9
    assert stats.drafts is None


def test_a_next_token_layer_drafts_where_it_is_asked_for(tmp_path):
    folder = chat_model(tmp_path, ascii=True)
    config = CONFIG | {"vocab_size": 260, "eos_token_id": 2}
    weights = half_right(config, hub_weights(config, our_weights(config)), 0.8, adds=0.3)
    path = write_checkpoint(folder, config, weights)
    without = mlxkv.load(path, dtype="float32")
    assert without.model.predictor() is None
    llm = mlxkv.load(path, dtype="float32", draft="auto")
    assert llm.budget.weights_bytes > without.budget.weights_bytes
    llm.drafting.costs = Eager()
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0.8, "seed": 3, "ignore_eos": True}
    plain = llm.generate("hello", draft="off", **options)
    for draft, drafters in (("mtp", {"mtp"}), ("auto", {"mtp"}), ("lookup", set())):
        llm.drafting.forget()
        found = llm.generate("hello", draft=draft, **options)
        assert found.tokens == plain.tokens
        drafts = found.stats.drafts
        assert (set() if drafts is None else set(drafts.by)) == drafters
    assert without.generate("hello", draft="off", **options).tokens == plain.tokens


def test_an_unknown_drafter_is_refused(llm: LLM):
    with pytest.raises(ModelNotFound, match="no model named 'best'"):
        llm.generate("hello", draft="best")
    with pytest.raises(
        UsageError, match="must be auto, off, lookup, mtp or a model's name; got ' '"
    ):
        llm.generate("hello", draft=" ")
