"""A real model on real caches that answers what it is told to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from mlxkv.base import device
from mlxkv.engine.runtime import Runtime
from mlxkv.generation.session import Restored, Session
from mlxkv.kv.layout import Positions


def said(
    real: Any, tokens: mx.array, caches: Any, n_prompt: int, answer: Sequence[int], n_vocab: int
) -> mx.array:
    """Logits of `real(tokens, caches)`, but those of the answer's own where it is said.

    Args:
        real: a model's `last_logits`.
        tokens: its argument; a row for each token where a draft is computed.
        caches: its argument.
        n_prompt: tokens before the answer.
        answer: what is said behind them.
        n_vocab: width of the logits.
    """
    offset, logits = caches[0].offset, real(tokens, caches)
    rows = []
    for row, token in enumerate(_next_of(answer, offset, tokens, n_prompt)):
        own = logits[row : row + 1]
        if token is not None:
            own = mx.where(mx.arange(n_vocab) == token, 100.0, own * 0)
        rows.append(own)
    return mx.concatenate(rows)


def _next_of(
    answer: Sequence[int], offset: Any, tokens: mx.array, n_prompt: int
) -> list[int | None]:
    """For each row the answer's token behind it; None inside the prompt, or one step ahead."""
    last = offset.of if isinstance(offset, Positions) else (offset + tokens.shape[1] - 1,)
    places = [position + 1 - n_prompt for position in last]
    return [answer[at] if 0 <= at < len(answer) else None for at in places]


_TOLD = 1e4
"""A hidden state's first value from which on it says the next token: so much above it."""


def _told(hidden: mx.array, following: Sequence[int | None]) -> mx.array:
    """Hidden states `[T, 1, E]` that say what follows them."""
    for row, token in enumerate(following):
        if token is not None:
            hidden[row, 0, 0] = _TOLD + token
    return hidden


def _read(hidden: mx.array, logits: mx.array) -> mx.array:
    """Logits of states, but what is said for those that say it."""
    first = hidden[..., :1]
    said = mx.where(mx.arange(logits.shape[-1]) == first - _TOLD, 100.0, 0.0)
    return mx.where(first >= _TOLD, said, logits)


def draft_on_cpu_alone(runtime: Runtime) -> None:
    """A GPU computes a lone sequence's draft as a chunk, whose logits `said` does not say."""
    if not device.on_cpu():
        runtime.drafting.of_answer = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]


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
    draft_on_cpu_alone(runtime)

    def last_logits(tokens: mx.array, caches: Any = None) -> mx.array:
        if not prompts:
            return real(tokens, caches)
        n_prompt, n_vocab = len(prompts[-1]), runtime.config.vocab_size
        return said(real, tokens, caches, n_prompt, current, n_vocab)

    # A pass that leaves logits out, of tokens that a grammar forces, takes these two.
    real_states, real_logits = model.hidden_states, model.logits

    def hidden_states(tokens: mx.array, caches: Any = None) -> mx.array:
        if not prompts or caches is None or tokens.shape[1] > 1:
            return real_states(tokens, caches)
        offset, hidden = caches[0].offset, real_states(tokens, caches)
        return _told(hidden, _next_of(current, offset, tokens, len(prompts[-1])))

    def logits(hidden: mx.array) -> mx.array:
        return _read(hidden, real_logits(hidden))

    def session(owner: str = "", adapter: Sequence[str] = ()) -> Session:
        made = open_session(owner)
        restore = made.restore

        def noted(tokens: Sequence[int]) -> Restored:
            prompts.append(list(tokens))
            current[:] = runtime.tokenizer.encode(left.pop(0), add_special_tokens=False)
            return restore(tokens)

        made.restore = noted  # pyright: ignore[reportAttributeAccessIssue]
        return made

    model.hidden_states, model.logits = hidden_states, logits  # pyright: ignore[reportAttributeAccessIssue]
    model.last_logits = last_logits  # pyright: ignore[reportAttributeAccessIssue]
    runtime.session = session  # pyright: ignore[reportAttributeAccessIssue]
    return prompts
