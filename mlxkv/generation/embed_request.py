"""A typed request for vectors of texts, from every front end to the engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mlxkv.errors import UsageError

MAX_TEXTS = 100_000
"""Texts of a request."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts whose vectors are asked for.

    Args:
        texts: one or more.
        prompt: name of what the model puts before each; None for its default, "" for none.
        dimensions: values of a vector, the first ones, scaled to length 1 again; None for all.
        truncate: cut a text that is longer than the model takes, instead of an error.
    """

    texts: Sequence[str]
    prompt: str | None = None
    dimensions: int | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.texts, Collection):
            got = type(self.texts).__name__
            raise UsageError(f"must be a text or a list of texts; got {got}", field="texts")
        if not 0 < len(self.texts) <= MAX_TEXTS:
            n = len(self.texts)
            raise UsageError(f"must be 1 to {MAX_TEXTS:,} texts; got {n:,}", field="texts")
        for text in self.texts:
            if not isinstance(text, str):
                raise UsageError(f"must be strings; got {type(text).__name__}", field="texts")
