"""What `mlxkv run` begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxkv.terminal.answer_options import AnswerOptions

if TYPE_CHECKING:
    from mlxkv.saved_kv.manifest import NamedKV
    from mlxkv.terminal.files.attachments import Attachment


@dataclass(frozen=True, slots=True)
class Start:
    """What `mlxkv run` was given for one answer, or for a chat.

    Args:
        settings: of the answers.
        system: the system prompt.
        verbose: print figures after an answer.
        kv_from: saved KV to start from.
        attached: pictures and recordings; they stand before the first prompt.
        image_budget: most tokens of each picture, for models that let them be chosen.
    """

    settings: AnswerOptions
    system: str | None = None
    verbose: bool = False
    kv_from: NamedKV | None = None
    attached: Sequence[Attachment] = ()
    image_budget: int | None = None
