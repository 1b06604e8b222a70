"""A model with what it needs to answer: tokenizer, pages, budget, sessions."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import mlx.core as mx

from mlxkv.base.stepwise import finished
from mlxkv.generation.session import Session
from mlxkv.llm.llm import LLM, _log
from mlxkv.models.loader import loading
from mlxkv.prefix.pages import Pages
from mlxkv.store.settings import Settings
from mlxkv.text.tokenizer import Tokenizer


def load_with(path: Path, settings: Settings, dtype: mx.Dtype | str = "auto") -> LLM:
    """Load a model's directory with settings that were found out before; else as `load`."""
    llm = finished(loading_with(path, settings, dtype))
    llm.hold_wired()
    return llm


def loading_with(
    path: Path, settings: Settings, dtype: mx.Dtype | str = "auto"
) -> Generator[None, None, LLM]:
    """`load_with` in steps."""
    limit = settings.memory.value
    model = yield from loading(path, dtype, limit)
    yield
    tokenizer = Tokenizer.from_dir(path)
    return LLM(model, tokenizer, path, settings.kv_type.value, limit, settings)


def keep_prefix(session: Session) -> None:
    """Keep a sequence's prefix; where that fails, its answer is no worse for it."""
    try:
        session.finish()
    except Exception as error:
        _log.warning("the prefix is not kept: %s", error)


def _close_at_exit(pages: Pages | None) -> None:
    if pages is not None:
        pages.close(at_exit=True)
