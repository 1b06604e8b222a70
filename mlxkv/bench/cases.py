"""What is measured: contexts and batches that the model and the memory allow, and their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxkv.base.device import default_chunk
from mlxkv.base.units import human_bytes
from mlxkv.errors import UsageError
from mlxkv.memory import needs
from mlxkv.memory.needs import Needs
from mlxkv.memory.trace import hollow
from mlxkv.models.adapters import adapted_bytes
from mlxkv.models.loader import lay_out
from mlxkv.store.adapters import AdapterRef, own_adapters, read_adapters
from mlxkv.store.settings import Settings
from mlxkv.text.tokenizer import Tokenizer

SHORTEST = 8
"""Tokens of the prompt at context 0: a model needs a prompt."""
APART = 1000
"""Paragraphs between the starts of two prompts of a batch, so that no two share a prefix."""


@dataclass(frozen=True, slots=True)
class Case:
    """One context at one batch size.

    Args:
        context: tokens of each prompt, as asked for.
        batch: sequences at a time.
        n_prompt: tokens that each prompt has.
        n_timed: decode steps that are timed; the answer has one token more, which prefill gives.
        plan_bytes: MLX's peak memory by the plan, for mlxkv.
    """

    context: int
    batch: int
    n_prompt: int
    n_timed: int
    plan_bytes: int

    @property
    def n_used(self) -> int:
        """Tokens of a sequence at the end."""
        return self.n_prompt + self.n_timed + 1


@dataclass(frozen=True, slots=True)
class Skipped:
    """A case that was not measured, or not to its end.

    Args:
        reason: contains no path.
        engine: "" for all.
    """

    context: int
    batch: int
    reason: str
    engine: str = ""

    def __str__(self) -> str:
        case = f"context {self.context:,}, batch {self.batch}"
        return f"{self.engine or 'skipped'}: {case}: {self.reason}"


class Planner:
    """Which cases a model's context and the memory limit allow; the model is not loaded."""

    def __init__(self, path: Path, settings: Settings, adapters: Sequence[AdapterRef] = ()):
        layout = lay_out(path)
        self._weights_bytes = layout.nbytes
        added = read_adapters([*own_adapters(path), *adapters], layout.checkpoint.raw)
        model = hollow(layout, added)
        self._weights_bytes += adapted_bytes(model)
        self._needs = Needs(model, settings.kv_type.value, default_chunk())
        self._limit = settings.memory.value
        self._window = settings.context.value

    def choose(
        self, contexts: Sequence[int], batches: Sequence[int], n_timed: int
    ) -> tuple[list[Case], list[Skipped]]:
        """The cases, short contexts first, and the skipped ones.

        A prompt as long as the model's context is shortened by the length of the answer.
        """
        cases, skipped = [], []
        for context in contexts:
            n_prompt = min(max(context, SHORTEST), self._window - n_timed - 1)
            for batch in batches:
                if context > self._window or n_prompt < 1:
                    reason = f"the model's context here is {self._window:,} tokens"
                    skipped.append(Skipped(context, batch, reason))
                    continue
                case = Case(context, batch, n_prompt, n_timed, 0)
                needed = self._needed_bytes(case)
                if needed > self._limit:
                    limit = human_bytes(self._limit)
                    reason = f"the plan needs {human_bytes(needed)} and the limit is {limit}"
                    skipped.append(Skipped(context, batch, reason))
                    continue
                cases.append(Case(context, batch, n_prompt, n_timed, self._peak_bytes(case)))
        return cases, skipped

    def _needed_bytes(self, case: Case) -> int:
        """Weights, KV of all sequences and workspace, as `Plan.total_bytes` has them."""
        kv = self._needs.kv_bytes(case.n_used)
        workspace = max(0, self._needs.held(case.n_used).peak - kv)
        return self._weights_bytes + kv * case.batch + workspace

    def _peak_bytes(self, case: Case) -> int:
        """`Plan.peak_bytes`, with KV and prefix pages of the other sequences."""
        n, more = case.n_used, case.batch - 1
        room = needs.pages_bytes(self._limit, self._weights_bytes)
        pages = self._needs.pages_bytes(n)
        first = self._needs.peak(n, room)
        others = more * self._needs.kv_bytes(n) + min(more * pages, max(0, room - min(pages, room)))
        return self._weights_bytes + first + others


def prompts(tokenizer: Tokenizer, n_tokens: int, batch: int) -> list[list[int]]:
    """One prompt of exactly `n_tokens` token ids for each sequence, its first token (BOS) counted.

    Raises:
        UsageError: the tokenizer makes nothing of the text.
    """
    return [_prompt(tokenizer, n_tokens, i * APART) for i in range(batch)]


def _prompt(tokenizer: Tokenizer, n_tokens: int, first: int) -> list[int]:
    n_paragraphs, tokens = 1, list[int]()
    while len(tokens) < n_tokens:
        numbers = range(first, first + n_paragraphs)
        # The number first: paragraphs, and so prompts, differ from their first words on.
        text = "".join(f"{i}. {TEXT.format(n=i % 9 + 2, m=(i * 37) % 500)}" for i in numbers)
        before, tokens = len(tokens), tokenizer.encode(text)
        if len(tokens) <= before:
            raise UsageError("the model's tokenizer makes no more tokens of a longer text")
        n_paragraphs = n_paragraphs * 2
    return tokens[:n_tokens]


TEXT = (
    "A river begins where rain and melting snow find the same slope. High in the hills it is a "
    "thread between stones, cold enough to hurt the hand; a day's walk below it turns a mill, and "
    "in the plain it carries barges, silt and the news of upstream towns. Engineers measure it in "
    "cubic metres a second, children in sticks thrown from a bridge. When the valley was surveyed "
    "in 1874, the party of {n} counted {m} bends between the two weirs and drew every one of them "
    "by hand, with the depth in feet beside it. "
)
