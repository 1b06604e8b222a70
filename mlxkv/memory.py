"""What is said of memory: what is used, what gave way, how a failure to allocate looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from mlxkv.terminal import human_bytes

Error = TypeVar("Error", bound=BaseException)

ALLOCATION_ERRORS = (RuntimeError, MemoryError)
"""What MLX raises where it gets no memory, among other things: see `is_allocation_failure`."""


@dataclass(frozen=True, slots=True)
class Rung:
    """What was done to find room.

    Args:
        kind: `cache`, `chunk`, `pages` or `packed`.
        n_tokens: tokens that the sequence held then.
        amount: bytes that were given back; for `chunk` the tokens that are computed at a time now.
        kv_type: the format of the sequence's KV, for `packed`.
    """

    kind: str
    n_tokens: int
    amount: int
    kv_type: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "cache":
                what = f"MLX's allocator gave back {human_bytes(self.amount)}"
            case "chunk":
                what = f"the prompt goes on in chunks of {self.amount:,} tokens"
            case "pages":
                what = f"prefix pages of {human_bytes(self.amount)} were dropped from RAM"
            case _:
                what = f"the KV was packed to {self.kv_type}, {human_bytes(self.amount)} less"
        return f"memory is short at {self.n_tokens:,} tokens: {what}"


@dataclass(frozen=True, slots=True)
class KVUse:
    """KV of all live sequences.

    Args:
        used_tokens: tokens that are held.
        used_bytes: what they take.
        allocated_tokens: tokens that there is room for.
        allocated_bytes: what that takes.
    """

    used_tokens: int = 0
    used_bytes: int = 0
    allocated_tokens: int = 0
    allocated_bytes: int = 0


def is_allocation_failure(error: BaseException) -> bool:
    """Whether MLX, or Python, could not get memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and "alloc" in str(error).lower()


def without_trace(error: Error) -> Error:
    """An error that keeps nothing alive of where it came from: no arrays, no caches."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
