"""What tests of prefix reuse share: KV of their own on disk, and a model of each kind of cache."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlxkv
from mlxkv.llm.llm import LLM
from tests.support.command_line import chat_model, of_each_kind


@pytest.fixture(scope="module")
def reused(tmp_path_factory) -> Path:
    """A folder with `llama` and `gemma3`, whose windows slide."""
    return of_each_kind(tmp_path_factory.mktemp("models"), chat_model)


@pytest.fixture
def kv(tmp_path, monkeypatch) -> Path:
    """Where KV lies on disk."""
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    return tmp_path / "kv"


@pytest.fixture(params=["llama", "gemma3"])
def either(request, reused, kv) -> LLM:
    """A model of each kind, which shares KV on disk."""
    return mlxkv.load(reused / request.param)
