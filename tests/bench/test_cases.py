"""The prompts of `mlxkv bench` are exact, and what the plan says does not fit is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxkv.base.units import parse_bytes
from mlxkv.bench.cases import Planner, prompts
from mlxkv.store.settings import Given, effective
from mlxkv.text.tokenizer import Tokenizer
from tests.support.command_line import chat_model
from tests.support.paths import TOKENIZERS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "m", max_position_embeddings=600)


@pytest.mark.parametrize("n_tokens", [1, 8, 257, 3000])
def test_prompts_have_exactly_the_tokens_asked_for_and_differ_from_the_start(model, n_tokens):
    made = prompts(Tokenizer.from_dir(model), n_tokens, 3)
    assert [len(prompt) for prompt in made] == [n_tokens] * 3
    if n_tokens >= 8:
        assert len({tuple(prompt[:8]) for prompt in made}) == 3


def test_the_first_token_of_a_document_is_one_of_the_prompts_tokens():
    tokenizer = Tokenizer.from_dir(TOKENIZERS / "llama")
    assert tokenizer.bos_token_id is not None
    (prompt,) = prompts(tokenizer, 40, 1)
    assert prompt[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in prompt[1:]
    assert len(prompt) == 40


def test_what_the_plan_says_does_not_fit_is_left_out_with_its_numbers(model):
    limit = parse_bytes("2.4MiB")
    planner = Planner(model, effective(model, Given(memory=limit)))
    cases, skipped = planner.choose((8, 500), (1, 4), 3)
    assert [(c.context, c.batch) for c in cases] == [(8, 1), (8, 4)]
    assert [(s.context, s.batch) for s in skipped] == [(500, 1), (500, 4)]
    assert "the limit is 2.4 MiB" in skipped[0].reason
