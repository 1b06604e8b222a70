"""A picture or a piece of sound, as a prompt holds it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

IMAGE, AUDIO = "image", "audio"
KINDS = (IMAGE, AUDIO)


@dataclass(frozen=True)
class Medium:
    """One picture, or one piece of sound, of a prompt.

    A prompt's token list holds `ids` where the model's rows for it stand: numbers below 0, which no
    token has, made of the content. So two prompts share their beginning exactly where they have the
    same text and the same media, and all that compares tokens or names pages by them needs to know
    nothing of media.

    Args:
        kind: `IMAGE` or `AUDIO`.
        digest: SHA-256 of the decoded content and of the preprocessing that the model's rows depend
            on (its size, for one).
        n_tokens: rows that the model makes of it.
        token: the vocabulary's token that stands for one row.
        name: of the file, for messages; "" if it has none.
        data: arrays that the model's encoder takes; None where only the KV is known, as of saved
            prompts.
        owner: whose prompt it is of (an API key): what is kept of it is of use to the owner's other
            prompts alone.
    """

    kind: str
    digest: bytes
    n_tokens: int
    token: int
    name: str = field(default="", compare=False)
    data: Mapping[str, np.ndarray] | None = field(default=None, compare=False, repr=False)
    owner: str = field(default="", compare=False)

    @property
    def kept_as(self) -> tuple[str, bytes]:
        """What its rows are kept under."""
        return self.owner, self.digest

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """The number of each row in a prompt's tokens: int32, below 0."""
        stream = hashlib.shake_256(self.digest).digest(4 * self.n_tokens)
        numbers = array("I", stream)
        return tuple(-1 - (number & 0x7FFFFFFF) for number in numbers)
