"""Smaller models that draft for a model, by the names that ask for them.

Each is a runtime of its own, with weights, pages and a budget. Whoever loads them shares the memory
out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mlxkv.errors import UsageError
from mlxkv.generation.drafts.small_model import SmallModel
from mlxkv.generation.session import Session
from mlxkv.kv.types import CacheSpec, take_drafts
from mlxkv.memory.budget import Budget
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.layout import Kinds
from mlxkv.prefix.pages import Pages
from mlxkv.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Runs(Protocol):
    """A loaded model as it is seen here: a `Runtime`."""

    model: CausalLM
    budget: Budget
    path: Path
    tokenizer: Tokenizer
    config: Any

    @property
    def context(self) -> int: ...
    def session(self, owner: str = "") -> Session: ...
    def pages_of(self, owner: str) -> Pages | None: ...
    def close(self) -> None: ...


class DraftModels:
    """The models that draft for one.

    Args:
        runtime: of the model that they draft for.
    """

    def __init__(self, runtime: Runs):
        self._runtime = runtime
        self._all: dict[str, tuple[Runs, SmallModel]] = {}

    @property
    def runtimes(self) -> list[Runs]:
        """Each once."""
        return list({id(each): each for each, _ in self._all.values()}.values())

    @property
    def used_bytes(self) -> int:
        """What they take, their KV and pages included."""
        return sum(each.budget.used_bytes for each in self.runtimes)

    def runtime(self, name: str) -> Runs | None:
        """The one of a name; None where it is not loaded."""
        return self._all[name][0] if name in self._all else None

    def find(self, name: str) -> SmallModel | None:
        """`runtime`, as what drafts."""
        return self._all[name][1] if name in self._all else None

    def attach(self, name: str, drafter: Runs) -> None:
        """Have a loaded model draft where its name asks for it.

        Raises:
            UsageError: it has other tokens, or cannot take back what it computed.
        """
        known = next((small for each, small in self._all.values() if each is drafter), None)
        if known is None:
            check(self._runtime, name, drafter)
            if drafter.budget.weights_bytes >= self._runtime.budget.weights_bytes:
                _log.warning("%s drafts for a model that is no larger: that cannot pay", name)
            known = _small(self._runtime, drafter)
        self._all[name] = drafter, known

    def detach(self, drafter: Runs) -> None:
        """Forget a model, whatever its names; no answer is being drafted by it."""
        self._all = {name: pair for name, pair in self._all.items() if pair[0] is not drafter}

    def share_memory(self, limit_bytes: int) -> None:
        """Give the model and those that draft for it what the others leave of a limit."""
        if not self._all:
            return
        budgets = [each.budget for each in (self._runtime, *self.runtimes)]
        used = [budget.used_bytes for budget in budgets]
        for budget, own in zip(budgets, used, strict=True):
            budget.limit_bytes = limit_bytes - (sum(used) - own)


def check(runtime: Runs, name: str, drafter: Runs) -> None:
    """Check that a model can draft for another.

    Raises:
        UsageError: it cannot; the text says why.
    """
    if drafter.path == runtime.path:
        raise itself(name)
    check_layers(name, drafter.model.cache_specs(), runtime.model.cache_specs())
    if (found := _difference(runtime.tokenizer, drafter.tokenizer)) is not None:
        token, ours, theirs = found
        raise UsageError(
            f"needs a model with the same tokens; {token!r} is {theirs} in {name}, and {ours} here",
            field="draft",
        )


def check_layers(
    name: str, drafter: Sequence[CacheSpec | None], model: Sequence[CacheSpec | None]
) -> None:
    """Check that both a model that drafts and the one it drafts for can take tokens back.

    Raises:
        UsageError: one of them cannot.
    """
    kinds = Kinds.of(drafter)
    if kinds is None or kinds.states:
        raise UsageError(
            f"needs a model that writes, and whose layers keep keys and values; {name} is none",
            field="draft",
        )
    if not take_drafts(model):
        raise UsageError(
            "is for models that can take a draft back: this one keeps states that cannot",
            field="draft",
        )


def itself(name: str) -> UsageError:
    """For a model that shall draft for itself."""
    return UsageError(f"needs another, smaller model; {name} is the model itself", field="draft")


def _difference(ours: Tokenizer, theirs: Tokenizer) -> tuple[str, str, str] | None:
    """A token that two tokenizers do not share, and what each says of it."""
    one, other = ours.vocabulary, theirs.vocabulary
    if one == other:
        return None
    token, _ = min(one.items() ^ other.items(), key=lambda pair: (pair[1], pair[0]))
    said = [f"token {of[token]}" if token in of else "none" for of in (one, other)]
    return token, said[0], said[1]


def _small(runtime: Runs, drafter: Runs) -> SmallModel:
    def n_kept(owner: str, tokens: Sequence[int]) -> int:
        pages = drafter.pages_of(owner)
        return 0 if pages is None else pages.match(tokens, len(tokens)).n_tokens

    own, theirs = drafter.config.vocab_size, runtime.config.vocab_size
    name = str(drafter.path)
    return SmallModel(drafter.session, n_kept, drafter.context, own, theirs, name)
