"""How well documents fit a query, by a chat model that is asked to say yes or no.

The prompt is the one that Qwen3-Reranker was trained on; other models get its text as one message
of their chat template. The query and the instruction come before the document, so that their KV is
computed once for all documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxkv.errors import UsageError

if TYPE_CHECKING:
    from mlxkv.generation.outputs import Chunk

TASK = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""What is asked for where a request has no instruction; Qwen3-Reranker's own default."""
VERDICTS = ("yes", "no")
MAX_DOCUMENTS = 10_000
AT_A_TIME = 8
"""Documents of a request that are computed at a time: each has KV of its own behind the query's,
and the queue of a key has room for other requests."""


@dataclass(frozen=True, slots=True)
class Rank:
    """A query and a document to be judged.

    Args:
        instruction: what makes a document fit; None for `INSTRUCTION`.
        most: tokens of the document, the first ones; None for all.
    """

    query: str
    document: str
    instruction: str | None = None
    most: int | None = None

    @property
    def head(self) -> str:
        """What stands before the document, the same for all of a query."""
        instruction = self.instruction or INSTRUCTION
        return f"<Instruct>: {instruction}\n<Query>: {self.query}\n<Document>: "


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document with its verdict.

    Args:
        index: its place in the request.
        score: probability of yes, of the two verdicts.
        yes, no: log-probabilities of the verdicts among all tokens.
        n_tokens: of its prompt.
        n_computed: of those, computed for it; the others were known.
    """

    index: int
    score: float
    yes: float
    no: float
    n_tokens: int
    n_computed: int


def check(
    query: str,
    documents: Sequence[str],
    top_n: int | None = None,
    max_tokens_per_doc: int | None = None,
) -> None:
    """Raise UsageError for what cannot be ranked."""
    if not isinstance(query, str) or not query:
        raise UsageError("must be a text that is not empty", field="query")
    if isinstance(documents, str) or not 0 < len(documents) <= MAX_DOCUMENTS:
        raise UsageError(f"must be a list of 1 to {MAX_DOCUMENTS:,} texts", field="documents")
    if not all(isinstance(document, str) for document in documents):
        raise UsageError("must be texts", field="documents")
    counts = {"top_n": top_n, "max_tokens_per_doc": max_tokens_per_doc}
    for name, n in counts.items():
        if n is not None and (type(n) is not int or n < 1):
            raise UsageError(f"must be at least 1; got {n!r}", field=name)


def options_of(rank: Rank) -> dict[str, Any]:
    """Keywords of `Request.of` beside the prompt: one token, both verdicts told."""
    return {
        "rank": rank,
        "max_tokens": 1,
        "logprobs": 0,
        "temperature": 0.0,
        "think": False,
        "best_effort": True,
        "draft": "off",
    }


def messages(head: str, document: str) -> list[dict[str, Any]]:
    """The prompt as a conversation, for models of any chat template."""
    return [{"role": "user", "content": f"{TASK}\n\n{head}{document}"}]


def ranked(index: int, chunks: Sequence[Chunk]) -> Ranked:
    """The verdict on one document.

    Args:
        index: its place in the request.
        chunks: of the answer.

    Raises:
        UsageError: the answer has none.
    """
    told = next((chunk.logprobs for chunk in chunks if chunk.logprobs is not None), None)
    stats = chunks[-1].stats if chunks else None
    if told is None or len(told.top) < 2 or stats is None:
        raise UsageError("the model gave no verdict")
    yes, no = (each.logprob or 0.0 for each in told.top[-2:])
    score = 1 / (1 + math.exp(min(no - yes, 700.0)))
    return Ranked(index, score, yes, no, stats.prompt_tokens, stats.computed_tokens)


def in_order(found: Sequence[Ranked], top_n: int | None) -> list[Ranked]:
    """Best first."""
    return sorted(found, key=lambda each: (-each.score, each.index))[:top_n]
