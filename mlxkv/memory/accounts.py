"""The budget's account of each live sequence: bytes reserved and granted."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from mlxkv.memory.types import Consumer, KVUse


@dataclass(slots=True)
class Account:
    """One sequence's account.

    Args:
        n_admitted: length of the prompt that KV is reserved for.
        granted: tokens held when memory was last granted, and bytes of the KV after that step.
        chunk_cap: tokens of a chunk at most, where memory was short; None for any number.
        n_chunk_reported: the smallest chunk that was reported.
        n_failed_at: tokens held when MLX last failed to allocate; None where it has not.
        is_quantizing: whether it must quantize its KV before it asks again.
    """

    n_admitted: int = 0
    granted: tuple[int, int] | None = None
    chunk_cap: int | None = None
    n_chunk_reported: int | None = None
    n_failed_at: int | None = None
    is_quantizing: bool = False


class Accounts:
    """The accounts of all live sequences; each lasts as long as its sequence."""

    def __init__(self) -> None:
        self._all: weakref.WeakKeyDictionary[Consumer, Account] = weakref.WeakKeyDictionary()
        self._joining = threading.Lock()

    def __getitem__(self, sequence: Consumer) -> Account:
        return self._all[sequence]

    def open(self, sequence: Consumer) -> None:
        with self._joining:
            self._all[sequence] = Account()

    def live(self) -> list[Consumer]:
        """The sequences; safe while another thread opens accounts."""
        with self._joining:
            return list(self._all)

    def use(self) -> KVUse:
        """KV of all live sequences, now."""
        uses = [sequence.use() for sequence in self.live()]
        return KVUse(
            sum(use.used_tokens for use in uses),
            sum(use.used_bytes for use in uses),
            sum(use.allocated_tokens for use in uses),
            sum(use.allocated_bytes for use in uses),
        )

    def granted_bytes(self, asking: Consumer) -> int:
        """Bytes granted to other sequences that their caches have not taken yet."""
        n_bytes = 0
        for sequence in self.live():
            granted = self._all[sequence].granted
            if sequence is not asking and granted is not None and sequence.n_held == granted[0]:
                n_bytes += max(0, granted[1] - sequence.nbytes)
        return n_bytes

    def others_bytes(self, asking: Consumer, kv_bytes: Callable[[str, int], int]) -> int:
        """Bytes that other sequences hold or reserve; `kv_bytes`: (format, tokens) -> bytes."""
        n_bytes = 0
        for sequence in self.live():
            if sequence is asking:
                continue
            n_admitted = self._all[sequence].n_admitted
            is_reserved = n_admitted > sequence.n_held
            reserved = kv_bytes(sequence.kv_type, n_admitted) if is_reserved else 0
            n_bytes += max(sequence.nbytes, reserved)
        return n_bytes
