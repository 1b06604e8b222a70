"""Vectors of texts with a model in this process."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxkv.engine.embedding import embedded
from mlxkv.engine.runtime import Runtime
from mlxkv.generation.embed_request import EmbedRequest


def embed(
    runtime: Runtime,
    texts: str | Sequence[str],
    *,
    prompt: str | None = None,
    dimensions: int | None = None,
    truncate: bool = False,
) -> mx.array:
    """Vectors of texts, by a model that was trained for it.

    Args:
        runtime: the model.
        texts: one, or a list; they share batches, without padding.
        prompt: name of what the model puts before each, such as query or document; None for its
            default, "" for none.
        dimensions: values of a vector, the first ones, scaled to length 1 again; None for all.
        truncate: cut a text that is longer than the model takes, instead of an error.

    Returns:
        float32 `[N, D]`, or `[D]` for one text that is no list.

    Raises:
        UsageError: a model that generates text, no such prompt, or no such size.
        ContextExceeded: a text is longer than the model takes.
        OutOfMemory: a text takes more memory than there is.
    """
    of = [texts] if isinstance(texts, str) else texts
    found = embedded(runtime, EmbedRequest(of, prompt, dimensions, truncate))
    return found[0] if isinstance(texts, str) else found
