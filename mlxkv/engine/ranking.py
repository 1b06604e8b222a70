"""Prompts that have a model judge a document, and the tokens of its verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxkv.chat.rendered import Rendered, Segment
from mlxkv.engine.runtime import TextSide
from mlxkv.errors import UsageError
from mlxkv.generation.rank import TASK, VERDICTS, Rank, messages

_RERANKER = "qwen3-reranker"
_OPEN = f"<|im_start|>system\n{TASK}<|im_end|>\n<|im_start|>user\n"
_CLOSE = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Around the query and document, as Qwen3-Reranker's model card has it."""


def prompt_of(
    side: TextSide, rank: Rank, owner: str
) -> tuple[Rendered | None, list[Mapping[str, Any]]]:
    """The prompt of a pair: Qwen3-Reranker's own, and messages for other models.

    Args:
        side: of the model.
        rank: the pair.
        owner: see `Rendered`.
    """
    document = rank.document
    if rank.most is not None:
        ids = side.tokenizer.encode(document, add_special_tokens=False)
        if len(ids) > rank.most:
            document = side.tokenizer.decode(ids[: rank.most])
    own = None
    if _RERANKER in str(side.path).lower():
        segments = [Segment(_OPEN, False), Segment(rank.head + document), Segment(_CLOSE, False)]
        own = Rendered.of(segments, owner)
    return own, list(messages(rank.head, document))


def verdicts(side: TextSide) -> tuple[int, ...]:
    """The tokens that a verdict begins with.

    Raises:
        UsageError: the model's vocabulary does not tell them apart.
    """
    ids = [side.tokenizer.encode(word, add_special_tokens=False)[:1] for word in VERDICTS]
    found = tuple(token for each in ids for token in each)
    if len(set(found)) != len(VERDICTS):
        raise UsageError("this model has no tokens for yes and no: choose another to rank with")
    return found
