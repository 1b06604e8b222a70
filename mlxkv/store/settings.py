"""The settings that a model runs with, and where each comes from.

The first of these that sets a value decides it: the request, the command line (or the caller), the
environment, the model's own settings file, and then the model, the machine or a default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from mlxkv.base import device
from mlxkv.base.units import human_bytes
from mlxkv.checkpoint.config import read_config
from mlxkv.checkpoint.mlxkv_json import (
    DRAFTS,
    KINDS,
    OWN_DRAFTS,
    RECORD,
    checked,
    error_at,
    of_model,
    read_setting,
)
from mlxkv.errors import ConfigError, MlxkvError, UsageError

COMMAND_LINE, CALLER, REQUEST = "command line", "caller", "request"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting(Generic[T]):
    """One effective value.

    Args:
        name: as the settings file spells it.
        value: tokens, bytes or a name.
        origin: `request`, `command line`, `caller`, an environment variable's name,
            `mlxkv.json`, `config.json`, `machine` or `default`.
    """

    name: str
    value: T
    origin: str

    def __str__(self) -> str:
        value = str(self.value)
        if isinstance(self.value, int):
            is_bytes = self.name == "memory"
            value = human_bytes(self.value) if is_bytes else f"{self.value:,} tokens"
        return f"{value} ({self.origin})"


@dataclass(frozen=True, slots=True)
class Settings:
    """The effective values for one model.

    Args:
        context: tokens that a prompt and its answer may have together.
        kv_type: format of the KV cache, by layer or for all (`kv.types.LayerTypes`).
        memory: bytes that weights, KV and all else may take.
        overflow: what a sequence does at the context: `stop`, or `shift`, which drops the oldest
            tokens behind the kept ones.
        keep: leading tokens that a shift keeps, besides the system prompt and saved KV.
        draft: what proposes tokens of answers, of which several are computed at once.
        own_context: the model's own context, which `context` does not pass.
    """

    context: Setting[int]
    kv_type: Setting[str]
    memory: Setting[int]
    overflow: Setting[str]
    keep: Setting[int]
    draft: Setting[str]
    own_context: int

    def __iter__(self) -> Iterator[Setting[Any]]:
        return iter(getattr(self, name) for name in KINDS)

    def asked(
        self,
        context: int | None,
        overflow: str | None,
        keep: int | None,
        draft: str | None = None,
    ) -> Settings:
        """These settings with those of one request.

        Raises:
            UsageError: a value out of its range, or a context past the model's own.
        """
        asked = checked({"context": context, "overflow": overflow, "keep": keep, "draft": draft})
        if "context" in asked:
            _within(asked["context"], None, self.own_context)
        return replace(
            self, **{name: Setting(name, value, REQUEST) for name, value in asked.items()}
        )


@dataclass(frozen=True, slots=True)
class Given:
    """The settings of a command line or caller; None leaves a value to the other sources.

    Args:
        kv_type: as a text, or as the table that `mlxkv.json` may have.
        memory: bytes, or like "16GiB"; "auto" for what the machine allows.
        origin: `COMMAND_LINE` or `CALLER`.
        draft: see `Settings`.

    Raises:
        UsageError: a value out of its range.
    """

    context: int | None = None
    kv_type: str | Mapping[str, str] | None = None
    memory: str | int | None = None
    overflow: str | None = None
    keep: int | None = None
    origin: str = CALLER
    draft: str | None = None

    def __post_init__(self) -> None:
        checked({name: getattr(self, name) for name in KINDS})


def draws_on_model(draft: str) -> bool:
    """Whether a value of `draft` needs what the model has for drafts itself."""
    return draft in OWN_DRAFTS


def draft_model(draft: str | None) -> str | None:
    """The model that a value of `draft` names; None where it names none."""
    return None if draft is None or draft in DRAFTS else draft


def effective(path: Path, given: Given | None = None) -> Settings:
    """The settings of the model in a directory.

    Raises:
        UsageError: an environment variable that cannot be read, or a context past the model's own.
        ConfigError: the model's settings file or config.json is wrong.
        ModelNotFound: no config.json.
    """
    given = Given() if given is None else given
    own, in_file = own_context(path), of_model(path)
    found = {}
    for name, kind in KINDS.items():
        text = os.environ.get(kind.variable, "").strip()
        # Value, origin, its place for messages, and the error for a wrong value.
        sources = (
            (getattr(given, name), given.origin, None, UsageError),
            (_from_text(text), kind.variable, kind.variable, UsageError),
            (in_file.get(name), RECORD, f"{path / RECORD}: {name}", ConfigError),
        )
        found[name] = _default(name, own)
        for raw, origin, where, error in sources:
            if raw is not None:
                value = read_setting(name, raw, where, error)
                if name == "context":
                    _within(value, where, own, error)
                found[name] = Setting(name, value, origin)
                break
    return Settings(**found, own_context=own)


def own_context(path: Path) -> int:
    """The context that a model's config.json names."""
    from mlxkv.models import family_for  # imports MLX, which `Given` does not need

    raw = read_config(path)
    source = str(path / "config.json")
    return family_for(raw, source).config(raw, source).context


def _default(name: str, own: int) -> Setting[Any]:
    if name == "context":
        return Setting(name, own, "config.json")
    if name == "memory":
        return Setting(name, device.memory_limit(), "machine")
    return Setting(name, KINDS[name].default, "default")


def _from_text(text: str) -> str | int | None:
    """A variable's value: an int if it is a whole number."""
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text or None


def _within(
    context: int, where: str | None, own: int, error: type[MlxkvError] = UsageError
) -> None:
    if context > own:
        text = f"must be at most the model's own context, {own:,}; got {context:,}"
        raise error_at("context", text, where, error)
