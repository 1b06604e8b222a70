"""What is said of memory: what is used, what gave way, how a failure to allocate looks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

from mlxkv.terminal import human_bytes

Error = TypeVar("Error", bound=BaseException)

ALLOCATION_ERRORS = (RuntimeError, MemoryError)
"""What MLX raises where it gets no memory, among other things: see `is_allocation_failure`."""

_NO_MEMORY = re.compile(
    r"Unable to allocate"  # [malloc], of every backend
    r"|\[metal::malloc\]"  # more than the largest buffer, or more buffers than the device has
    r"|Insufficient Memory|kIOGPUCommandBufferCallbackErrorOutOfMemory"  # once the GPU ran it
    r"|failed: out of memory"  # a CUDA call
    r"|^cublas.* failed with code: 3\b"
)
"""What MLX says where there is no memory, by its sources (0.30 to 0.32).

Metal describes a failed command buffer in the system's language, and its code behind that in every
language. Time-outs, hangs and page faults of the GPU have other codes: less memory mends none of
them.
"""


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
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def without_trace(error: Error) -> Error:
    """An error that keeps nothing alive of where it came from: no arrays, no caches."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
