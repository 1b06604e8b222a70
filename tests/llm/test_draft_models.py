"""A smaller model drafts: the same answers, with its own KV, and only where it has the same
tokens."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest

import mlxkv
from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.generation.drafts import small_model
from mlxkv.generation.session import Session
from mlxkv.llm.llm import LLM
from tests.llm.test_drafts import PROMPT, SCHEMA, Eager
from tests.support.command_line import chat_model
from tests.support.hybrid import hybrid_chat_model

TEXT = "a text in which little is said twice, so that a model has to guess what comes next"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Models whose guesses are right (a copy), and wrong (another family)."""
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "llama-copy"):
        chat_model(root / name, ascii=True)
    for name in ("gemma3", "gemma3-copy"):
        chat_model(root / name, family="gemma3", ascii=True, sliding_window=24)
    chat_model(root / "others", special=("<|more|>",))
    hybrid_chat_model(root / "states")
    return root


def load(made: Path, name: str, drafter: str | None, **options: Any) -> LLM:
    draft = "off" if drafter is None else str(made / drafter)
    llm = mlxkv.load(made / name, dtype="float32", draft=draft, **options)
    llm.drafting.costs = Eager()
    return llm


CHOICES = {
    "greedy": {"temperature": 0},
    "penalties": {"temperature": 0.8, "seed": 3, "presence_penalty": 0.5, "repeat_penalty": 1.1},
    "logprobs": {"temperature": 1.0, "seed": 4, "logprobs": 2, "min_tokens": 30},
    "schema": {"format": SCHEMA, "temperature": 1.0, "seed": 1},
}


@pytest.mark.parametrize(
    ("name", "drafter", "kv_type"),
    [
        ("llama", "llama-copy", "q8"),
        ("gemma3", "gemma3-copy", "native"),  # a window that has wrapped, in both
        ("llama", "gemma3", "q4"),  # what it guesses is wrong
        ("states", "llama", "native"),  # and is taken back from states
    ],
)
def test_a_model_that_drafts_changes_no_answer(made, name: str, drafter: str, kv_type: str):
    llm, is_right = load(made, name, drafter, kv_type=kv_type), drafter.endswith("copy")
    for case, options in CHOICES.items():
        options = {"max_tokens": 40, **options}
        plain = llm.generate(TEXT, draft="off", **options)
        llm.drafting.forget()
        drafted = llm.generate(TEXT, **options)
        assert drafted.tokens == plain.tokens, case
        assert drafted.finish_reason == plain.finish_reason
        ours, theirs = ([one.logprob for one in each.logprobs] for each in (drafted, plain))
        assert ours == pytest.approx(theirs, abs=1e-4 if kv_type == "native" else 2e-2)
        if is_right and case != "schema":  # almost all of that is forced
            assert drafted.stats.drafts is not None
            proposed, accepted = drafted.stats.drafts.by["model"]
            # With the random numbers of each place, seeded tokens are as right as greedy ones.
            assert accepted > 0.5 * proposed > 5, case
    llm.close()


def test_what_stood_before_goes_before_a_model_that_is_no_more_often_right(made):
    llm = load(made, "llama", "gemma3")
    llm.generate(PROMPT, max_tokens=60)
    drafts = llm.generate(PROMPT, max_tokens=60).stats.drafts
    assert drafts is not None
    assert drafts.by["lookup"][1] > 20 > drafts.by.get("model", (0, 0))[0]


def test_its_memory_is_the_limits_and_its_prompt_is_computed_once(made, monkeypatch):
    llm, draft = load(made, "llama", "llama-copy"), str(made / "llama-copy")
    used, limit = llm.draft_models.used_bytes, llm.memory_limit
    assert used > 0
    assert llm.budget.limit_bytes == limit - used
    monkeypatch.setattr(small_model, "CHUNK", 64)
    prompt = "".join(random.Random(1).choices(string.ascii_letters, k=600))
    first = llm.generate(prompt, max_tokens=40)
    assert llm.stats().draft_bytes > used  # its pages
    drafter = llm.draft_models.find(draft)
    assert drafter is not None
    assert drafter.n_kept("", llm.encode(prompt)) >= len(llm.encode(prompt)) - 1
    again = llm.generate([*llm.encode(prompt), *first.tokens, 40], max_tokens=8)
    assert again.stats.drafts is not None  # it does not wait for what it has
    plan = mlxkv.plan(made / "llama", context=512, draft=draft)
    assert plan.draft_bytes > used
    without = mlxkv.plan(made / "llama", context=512)
    assert plan.total_bytes == without.total_bytes + plan.draft_bytes
    llm.close()


def test_a_model_that_is_no_smaller_is_named_in_the_log(made, caplog):
    load(made, "llama", "llama-copy").close()
    assert "llama-copy drafts for a model that is no larger" in caplog.text


def test_of_a_batch_it_drafts_one_answer_at_a_time(made, monkeypatch):
    llm, prompts = load(made, "llama", "llama-copy"), [TEXT, TEXT[5:], TEXT[9:]]
    drafter, held = llm.draft_models.runtimes[0], []
    small = llm.draft_models.find(str(made / "llama-copy"))

    def opened(owner: str) -> Session:
        held.append(drafter.budget.kv_bytes)
        return drafter.session(owner)

    monkeypatch.setattr(small, "open_session", opened)
    options = {"max_tokens": 30, "temperature": 0.9, "seed": 5}
    plain = [llm.generate(prompt, draft="off", **options).tokens for prompt in prompts]
    llm.drafting.forget()
    drafted = llm.generate(prompts, **options)
    assert [each.tokens for each in drafted] == plain
    assert held == [0] * len(held) != []


def test_a_draft_model_that_fails_ends_no_answer(made, monkeypatch):
    llm = load(made, "llama", "llama-copy")
    plain = llm.generate(TEXT, max_tokens=30, draft="off").tokens
    llm.drafting.forget()
    drafter = llm.draft_models.runtimes[0].model
    real, n = drafter.last_logits, []

    def failing(*args):
        n.append(1)
        if len(n) == 9:
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        return real(*args)

    monkeypatch.setattr(drafter, "last_logits", failing)
    result = llm.generate(TEXT, max_tokens=30)
    assert (result.tokens, len(n)) == (plain, 9)
    monkeypatch.undo()
    llm.drafting.forget()
    after = llm.generate(TEXT, max_tokens=30).stats.drafts
    assert after is not None
    assert "model" in after.by


@pytest.mark.parametrize(
    ("name", "drafter", "error", "text"),
    [
        ("llama", "others", UsageError, "'!' is token 4 in .*others, and token 3 here"),
        ("llama", "llama", UsageError, "is the model itself"),
        ("llama", "nowhere", ModelNotFound, "nowhere"),
        ("llama", "states", UsageError, "whose layers keep keys and values; .*states is none"),
    ],
)
def test_a_model_that_cannot_draft_is_refused(made, name: str, drafter: str, error, text: str):
    with pytest.raises(error, match=text) as raised:
        load(made, name, drafter)
    assert "\n" not in str(raised.value)
    if drafter != "others":  # a plan reads no tokenizers
        with pytest.raises(error, match=text):
            mlxkv.plan(made / name, context=512, draft=str(made / drafter))
