"""The recordings that a server transcribes at a time: samples take far more memory than files."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from mlxkv.engine.messages import Busy
from mlxkv.media.limits import MAX_SECONDS
from mlxkv.media.sound import RATE, decoded
from mlxkv.server.threads import run_in_threadpool

if TYPE_CHECKING:
    import numpy as np

RETRY_S = 5.0


class Sounds:
    """One file is decoded at a time, and an owner's together are no longer than one may be."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._held_s: defaultdict[str, float] = defaultdict(float)

    @asynccontextmanager
    async def decoded(self, owner: str, data: bytes, name: str) -> AsyncIterator[np.ndarray]:
        """A file's samples, which are held within the block.

        Raises:
            MediaError: it is no sound that can be read.
            Busy: the owner has too much sound transcribed.
        """
        async with self._turn:
            samples = await run_in_threadpool(decoded, data, name)
            seconds = len(samples) / RATE
            if self._held_s[owner] and self._held_s[owner] + seconds > MAX_SECONDS:
                raise Busy(RETRY_S, is_owners=bool(owner))
            self._held_s[owner] += seconds
        try:
            yield samples
        finally:
            self._held_s[owner] -= seconds
            if self._held_s[owner] < 1 / RATE:
                del self._held_s[owner]
