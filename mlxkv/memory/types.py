"""Data about memory: KV that is held, grants, and steps that freed memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mlxkv.base.units import human_bytes
from mlxkv.errors import KVCacheFull, lacks_memory
from mlxkv.kv.types import STEP, smaller_types

Error = TypeVar("Error", bound=BaseException)

ALLOCATION_ERRORS = (RuntimeError, MemoryError)
"""MLX raises these when an allocation fails, and for other faults: see `is_allocation_failure`."""

_NO_MEMORY = re.compile(
    r"\[metal::malloc\]"  # more than the largest buffer, or more buffers than the device has
    r"|Insufficient Memory|kIOGPUCommandBufferCallbackErrorOutOfMemory"  # once the GPU ran it
    r"|failed: out of memory"  # a CUDA call
    r"|^cublas.* failed with code: 3\b"
)
"""MLX's messages for failed allocations, from its sources (0.30 to 0.32), but what `lacks_memory`
knows.

Metal describes a failed command buffer in the system's language, then with its code in English.
Time-outs, hangs and page faults of the GPU have other codes.
"""


@dataclass(frozen=True, slots=True)
class Rung:
    """A step that freed memory.

    Args:
        kind: `cache`, `chunk`, `media`, `pages` or `packed` (quantized).
        n_tokens: tokens that the sequence held then.
        amount: bytes that were freed; for `chunk` the tokens of a chunk from then on.
        kv_type: for `packed` the new format of the sequence's KV.
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
                what = f"the prompt continues in chunks of {self.amount:,} tokens"
            case "media":
                what = f"encoded pictures and sound of {human_bytes(self.amount)} were dropped"
            case "adapters":
                what = f"idle adapters of {human_bytes(self.amount)} were dropped"
            case "pages":
                what = f"prefix pages of {human_bytes(self.amount)} were dropped from RAM"
            case _:
                what = f"the KV was quantized to {self.kv_type}, {human_bytes(self.amount)} less"
        return f"memory is short at {self.n_tokens:,} tokens: {what}"


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes beside the weights: KV before a step, and the peak of KV and computation during it."""

    before: int
    peak: int


@dataclass(frozen=True, slots=True)
class KVUse:
    """KV of one sequence, or of all live ones.

    Args:
        used_tokens: tokens held.
        used_bytes: their bytes.
        allocated_tokens: capacity of the buffers in tokens.
        allocated_bytes: bytes of the buffers.
    """

    used_tokens: int = 0
    used_bytes: int = 0
    allocated_tokens: int = 0
    allocated_bytes: int = 0


class Consumer(Protocol):
    """A sequence as the budget reads it.

    Attributes:
        n_held: tokens in its caches.
        nbytes: bytes of its caches.
        page_bytes: bytes kept beside them for its next page.
        kv_type: the format of its KV now.
        is_auto: whether its KV may be quantized further where memory is short.
    """

    @property
    def n_held(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def kv_type(self) -> str: ...
    @property
    def is_auto(self) -> bool: ...
    def use(self) -> KVUse: ...


@dataclass(frozen=True, slots=True)
class Grant:
    """The budget's answer to a sequence that needs memory.

    Args:
        n_tokens: tokens it may compute at once; 0 where it has to quantize or to end.
        rungs: the steps that freed memory.
        quantize_to: the format to which the sequence has to quantize its KV, and then ask again.
        full: why the sequence has to end.
    """

    n_tokens: int = 0
    rungs: tuple[Rung, ...] = ()
    quantize_to: str | None = None
    full: KVCacheFull | None = None


def smaller_format(sequence: Consumer, kv_bytes: Callable[[str, int], int]) -> str | None:
    """The next format that a sequence's KV may be quantized to and takes fewer bytes in.

    Args:
        sequence: the sequence.
        kv_bytes: (format, tokens) -> bytes. Latent layers take the same in `q8` and `k8v4`.
    """
    if not sequence.is_auto:
        return None
    now = kv_bytes(sequence.kv_type, STEP)
    return next((t for t in smaller_types(sequence.kv_type) if kv_bytes(t, STEP) < now), None)


def is_allocation_failure(error: BaseException) -> bool:
    """Whether MLX, or Python, could not get memory."""
    known = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    return known or lacks_memory(error)


def without_trace(error: Error) -> Error:
    """An error without its traceback, which would keep arrays and caches alive."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """How a model's memory is used.

    Args:
        limit_bytes: the model's memory limit.
        weights_bytes: the model's weights.
        kv: KV of all live sequences, now.
        kv_start: the same when the last request began.
        kv_most: the largest since then.
        pages_ram_bytes: prefix pages in RAM.
        pages_ssd_bytes: prefix pages on disk, of all models together.
        workspace_bytes: the peak less weights, the largest KV, pages and draft models.
        active_bytes: what MLX has allocated in this process.
        cached_bytes: freed buffers that MLX's allocator keeps.
        peak_bytes: MLX's peak since the last request began.
        unexplained_bytes: the part of `active_bytes` that is none of weights, KV, pages and draft
            models.
        draft_bytes: weights, KV and pages of models that draft for it.
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
    draft_bytes: int = 0
