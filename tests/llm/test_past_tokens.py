"""What is looked up outlives the process: beside the pages, an owner's own, bounded, encrypted."""

from __future__ import annotations

import random
import string
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest

import mlxkv
from mlxkv.base.seal import VARIABLE
from mlxkv.generation.drafts.lookup import PAST_TOKENS, PastTokens
from mlxkv.generation.outputs import Result
from mlxkv.llm.llm import LLM
from mlxkv.prefix.on_disk.folder import TOKENS_FILE
from tests.llm.test_drafts import Eager
from tests.support.command_line import chat_model

PROMPT = "".join(random.Random(2).choices(string.ascii_letters, k=300))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("past") / "llama", ascii=True)


@pytest.fixture(autouse=True)
def kv(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "64MiB")
    return tmp_path / "kv"


def load(model: Path) -> LLM:
    llm = mlxkv.load(model, dtype="float32")
    llm.drafting.costs = Eager()
    return llm


def answered(model: Path) -> Result:
    """The answer of a process of its own."""
    with load(model) as llm:
        return llm.generate(PROMPT, max_tokens=30)


def files(kv: Path) -> list[Path]:
    return list((kv / "pages").glob(f"*/{TOKENS_FILE}"))


def looked_up(result: Result) -> int:
    return 0 if result.stats.drafts is None else result.stats.drafts.by["lookup"][1]


@pytest.mark.parametrize("key", ("", "5a" * 32))
def test_an_earlier_answer_is_looked_up_after_a_restart(model, kv, key: str, monkeypatch):
    monkeypatch.setenv(VARIABLE, key)
    first = answered(model)
    again = answered(model)
    assert again.tokens == first.tokens
    assert looked_up(again) > 20 > looked_up(first)
    (file,) = files(kv)
    assert file.stat().st_mode & 0o077 == 0
    tokens = array("i", first.tokens).tobytes()
    assert (tokens in file.read_bytes()) == (not key)
    monkeypatch.setenv(VARIABLE, "6b" * 32)
    assert looked_up(answered(model)) == looked_up(first)
    file.write_bytes(file.read_bytes()[:-3])  # damaged: as if there were none
    monkeypatch.setenv(VARIABLE, key)
    assert looked_up(answered(model)) == looked_up(first)


def test_what_is_kept_is_an_owners_own(model, kv):
    with load(model) as llm:
        prompt, texts = llm.encode(PROMPT), []
        for owner in ("one", "two"):
            pages = llm.pages_of(owner)
            assert pages is not None
            session = llm.session(owner)
            session.prefill(prompt)
            session.finish()
            assert pages.disk is not None
            llm.drafting.of_answer(owner).end([*prompt, 5 if owner == "one" else 6])
    assert len(files(kv)) == 2
    with load(model) as llm:
        for owner in ("one", "two", "three"):
            llm.pages_of(owner).disk  # noqa: B018  # pyright: ignore
            found = llm.drafting.of_answer(owner).begin(prompt).propose(1)
            texts.append(None if found is None else found.tokens)  # pyright: ignore
    assert texts[:2] == [[5], [6]]
    assert texts[2] is None or texts[2][0] in prompt  # of the prompt alone


def test_processes_add_to_what_others_kept_and_the_latest_stay():
    def kept(past: PastTokens, *sequences: Sequence[int]) -> list[tuple[int, ...]]:
        return past.merged(sequences)

    past = PastTokens()
    past.add([1, 2, 3, 4, 5])
    assert kept(past, [7, 8, 9, 9], [1, 2, 3, 4]) == [(7, 8, 9, 9), (1, 2, 3, 4, 5)]
    past.add(range(PAST_TOKENS - 3))
    assert kept(past, [7, 8, 9, 9]) == [tuple(range(PAST_TOKENS - 3))]


def test_nothing_is_written_where_pages_have_no_room(model, kv, monkeypatch):
    monkeypatch.setenv("MLXKV_KV_DISK", "0")
    answered(model)
    assert files(kv) == []
