"""Pictures where memory is short, and where pages end inside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlxkv
from mlxkv.engine import prompt as prompts
from mlxkv.errors import KVCacheFull
from mlxkv.generation.request import Request
from mlxkv.kv.types import STEP
from mlxkv.llm.llm import LLM
from mlxkv.memory.media import encoder_bytes, shapes_of
from tests.support.seeing import ROWS, load_seeing, picture, seeing_model, shown
from tests.support.tiny_media import write_gemma3

A, B = picture(1), picture(2)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return seeing_model(tmp_path_factory.mktemp("models") / "llama", max_position_embeddings=8192)


@pytest.fixture
def llm(path, kv) -> LLM:
    return load_seeing(path)


def test_kept_rows_give_way_before_a_request_is_refused(llm):
    llm.generate(shown(A), max_tokens=1)
    budget, session = llm.budget, llm.session()
    llm.pages = None
    assert budget.rows.nbytes
    mx.clear_cache()
    grant = budget.make_room(session, budget._free(session) + 1)
    assert "media" in [rung.kind for rung in grant.rungs]
    assert grant.full is None and budget.rows.nbytes == 0
    refused = budget.make_room(session, 2 * budget.limit_bytes)
    assert isinstance(refused.full, KVCacheFull)


def test_rows_that_are_kept_count_and_are_bounded(llm):
    rows, before = llm.budget.rows, llm.budget.used_bytes
    llm.generate(shown(A), max_tokens=1)
    one = rows.nbytes
    assert one == ROWS * llm.config.hidden_size * 4
    assert llm.budget.used_bytes >= before + one
    rows.set_limit(2 * one)
    for seed in range(3, 7):
        llm.generate(shown(picture(seed)), max_tokens=1)
    assert rows.nbytes == 2 * one
    rows.set_limit(one)
    assert rows.nbytes == one
    assert llm.budget.give_pages(1) == one and not rows.nbytes  # another model needs room


def test_an_encoder_takes_at_least_its_input_and_its_rows(llm):
    (medium,) = llm.media.read("image", {"image": A.tobytes()})
    n_rows = ROWS * llm.config.hidden_size * 4
    n_bytes = encoder_bytes(llm.model, "image", shapes_of(medium))
    assert A.nbytes + n_rows <= n_bytes <= 64 * (A.nbytes + n_rows)


def test_a_picture_is_granted_whole_or_not_at_all(llm):
    budget, session = llm.budget, llm.session()
    budget.begin_prompt(session)
    budget._accounts[session].chunk_cap = 4
    assert budget.grant(session, 300, last=False).n_tokens == 8  # doubled
    assert budget.grant(session, 300, last=False, whole=True).n_tokens == 300
    budget.limit_bytes = budget.weights_bytes + 1000
    assert isinstance(budget.grant(session, 300, last=False, whole=True).full, KVCacheFull)


def test_an_encoder_that_gets_no_memory_is_tried_again(llm):
    expected = load_seeing(llm.path).generate(shown("a", A, "b"), max_tokens=5).tokens
    llm.generate(shown("other", B), max_tokens=1)
    real, failures = llm.model.media_rows, [1]

    def media_rows(kind: str, data: Any) -> mx.array:
        if failures:
            failures.pop()
            raise RuntimeError("[metal::malloc] Unable to allocate")
        return real(kind, data)

    llm.model.media_rows = media_rows  # pyright: ignore[reportAttributeAccessIssue]
    result = llm.generate(shown("a", A, "b"), max_tokens=5)
    assert result.tokens == expected and not failures
    assert result.stats.rungs


def noise(seed: int) -> Image.Image:
    values = np.random.RandomState(seed).randint(0, 255, (60, 60, 3), dtype=np.uint8)
    return Image.fromarray(values)


def asked(n: int, *pictures: Image.Image) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "q" * n}]
    for each in pictures:
        parts += [{"type": "image", "image": each}, {"type": "text", "text": "c" * 20}]
    return [{"role": "user", "content": parts}]


def test_nothing_goes_on_inside_a_picture_whose_rows_see_each_other(tmp_path, kv):
    """A page ends inside a real encoder's picture, and the rest of the picture is gone."""
    path = write_gemma3(tmp_path / "gemma3")
    n = 245  # the picture's four rows begin at 254
    llm = mlxkv.load(path)
    prompt = asked(n, noise(1), noise(2))
    prepared = prompts.prepare(llm, Request(prompt))
    start, stop, _ = prepared.media.spans(prepared.tokens)[0]
    assert start == n + 9
    first = llm.generate(prompt, max_tokens=6)
    llm.close()
    for page in Path(os.environ["MLXKV_KV"]).rglob("*.safetensors"):
        if f".{STEP}." not in page.name:
            page.unlink()
    llm = mlxkv.load(path)
    again = llm.generate(prompt, max_tokens=6)
    assert again.tokens == first.tokens
    assert start < STEP < stop and again.stats.restored_tokens == start
    other = asked(n, noise(1), noise(3))
    fresh = mlxkv.load(path)
    fresh.pages = None
    fresh._pages.update({"": None})
    assert llm.generate(other, max_tokens=6).tokens == fresh.generate(other, max_tokens=6).tokens
    llm.close()
