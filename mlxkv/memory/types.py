"""What is said of memory: what is used, what gave way, how a failure to allocate looks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

from mlxkv.base.units import human_bytes

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


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Where a model's memory is.

    Args:
        limit_bytes: what it may take.
        weights_bytes: of the model.
        kv: of all live sequences, now.
        kv_start: when the last request began.
        kv_most: at the most since then.
        pages_ram_bytes: prefix pages in RAM.
        pages_ssd_bytes: prefix pages on disk, all models' together.
        workspace_bytes: what the peak had beside weights, the most KV and pages.
        active_bytes: what MLX has allocated in this process.
        cached_bytes: freed buffers that its allocator keeps.
        peak_bytes: the most it had allocated since the last request began.
        unexplained_bytes: of `active_bytes`, what is neither weights nor KV nor pages.
    """

    limit_bytes: int
    weights_bytes: int
    kv: KVUse
    kv_start: KVUse
    kv_most: KVUse
    pages_ram_bytes: int
    pages_ssd_bytes: int
    workspace_bytes: int
    active_bytes: int
    cached_bytes: int
    peak_bytes: int
    unexplained_bytes: int
