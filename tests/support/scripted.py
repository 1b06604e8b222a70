"""A real model on real caches that answers what it is told to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from mlxkv.engine.runtime import Runtime
from mlxkv.generation.session import Restored, Session


def script(runtime: Runtime, answers: Iterable[str]) -> list[list[int]]:
    """Have a model write these answers, one after the other, each for the next prompt.

    Args:
        runtime: of the model; one request at a time.
        answers: with the tokens that end them.

    Returns:
        The prompts that were asked, as they come.
    """
    model, open_session = runtime.model, runtime.session
    left, prompts, current = list(answers), [], []
    real = model.last_logits

    def last_logits(tokens: mx.array, caches: Any = None) -> mx.array:
        logits = real(tokens, caches)
        at = caches[0].offset - len(prompts[-1]) if prompts else -1
        if not 0 <= at < len(current):  # inside the prompt, or one step ahead
            return logits
        one = mx.arange(runtime.config.vocab_size) == current[at]
        return mx.where(one, 100.0, logits * 0)

    def session(owner: str = "") -> Session:
        made = open_session(owner)
        restore = made.restore

        def noted(tokens: Sequence[int]) -> Restored:
            prompts.append(list(tokens))
            current[:] = runtime.tokenizer.encode(left.pop(0), add_special_tokens=False)
            return restore(tokens)

        made.restore = noted  # pyright: ignore[reportAttributeAccessIssue]
        return made

    model.last_logits = last_logits  # pyright: ignore[reportAttributeAccessIssue]
    runtime.session = session  # pyright: ignore[reportAttributeAccessIssue]
    return prompts
