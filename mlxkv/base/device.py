"""The device that MLX runs on, and the BLAS that is loaded before MLX is imported.

On Linux MLX's CPU wheel links the reference BLAS. An OpenBLAS that is loaded into the global scope
first computes MLX's float32 matrix products instead, 8 to 50 times faster; macOS has Accelerate.
This module imports MLX only when a function needs the device.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from mlxkv.base import limits, openblas
from mlxkv.base.limits import Limit

if TYPE_CHECKING:
    import mlx.core as mx

Stream = TypeVar("Stream")

MAX_CORES = 8
MARGIN_BYTES, MAPPED_MARGIN_BYTES = 32 << 20, 64 << 20
"""What models leave of a limit of the process, for Python's objects, sockets and the stacks of
threads; of one of mapped memory, see `limits`."""
STACK_BYTES = 8 << 20
"""Of a stream's thread."""
LOOK_S = 0.1
"""How long what was read of the process's limits is believed: a budget asks at each token."""
_M_ARENA_MAX = -8
"""Of glibc's `mallopt`."""
_OF_THREAD = threading.local()
_OPENBLAS = ("libopenblas.so.0", "libopenblas.so")


@functools.cache
def load_blas() -> str | None:
    """Load an installed OpenBLAS into the global scope; only useful before `mlx.core` is imported.

    `MLXKV_BLAS=0` leaves the reference BLAS in place, another value names a library.

    Returns:
        The name of the library that serves MLX's float32 products; None for the reference BLAS,
        and on systems other than Linux.
    """
    if sys.platform != "linux":
        return None
    wanted = os.environ.get("MLXKV_BLAS", "")
    if wanted == "0" or "mlx.core" in sys.modules:
        return _already_loaded()
    # mlxkv divides products over the cores itself; OpenBLAS' own threads would compete.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if limits.mapped_bytes() is not None:
        limits.map_less()
        if not openblas.has_room():
            return None
    for name in (wanted,) if wanted else _OPENBLAS:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        # OpenBLAS' exit handler hangs while MLX is inside one of its products, and a step may be in
        # flight when an answer ends early.
        atexit.register(_finish_at_exit)
        return name
    return None


def core_streams() -> tuple[mx.Stream, ...]:
    """One stream for each core on the CPU backend, one on a GPU.

    MLX's streams belong to the thread that made them, and so does a model that was split.
    """
    streams = getattr(_OF_THREAD, "streams", None)
    if streams is None:
        streams = _OF_THREAD.streams = _new_streams()
    return streams


def _new_streams() -> tuple[mx.Stream, ...]:
    import mlx.core as mx

    default = mx.default_stream(mx.default_device())
    if not on_cpu():
        return (default,)
    n = min(n_cores(), MAX_CORES)
    if (library := load_blas()) is not None:
        n = openblas.BUFFERS.take(library, n, limits.mapped_bytes())
        _least.cache_clear()
    return (default, *(mx.new_stream(mx.Device(mx.cpu)) for _ in range(n - 1)))


def side_streams() -> tuple[mx.Stream, ...]:
    """Streams beside the default one, which stays free: one for each core on the CPU backend.

    On a GPU, and where a process may map little memory, the default one.
    """
    import mlx.core as mx

    streams = getattr(_OF_THREAD, "side_streams", None)
    if streams is None:
        n = min(n_cores(), MAX_CORES) if on_cpu() and limits.mapped_bytes() is None else 0
        streams = tuple(mx.new_stream(mx.Device(mx.cpu)) for _ in range(n))
        streams = streams or (mx.default_stream(mx.default_device()),)
        _OF_THREAD.side_streams = streams
    return streams


def _bytes_of_streams(limit_bytes: int) -> int:
    """Address space that streams will take where no thread has made any yet."""
    if not on_cpu() or load_blas() is None or openblas.BUFFERS.n_taken:
        return 0
    n_streams = openblas.n_allowed(min(n_cores(), MAX_CORES), limit_bytes)
    return n_streams * (openblas.BUFFER_BYTES + STACK_BYTES)


def shares(n: int, streams: Sequence[Stream]) -> list[tuple[Stream, int, int]]:
    """Divide `n` rows evenly over streams: each with its first row and the end of its rows."""
    bounds = [n * i // len(streams) for i in range(len(streams) + 1)]
    return [(stream, *at) for stream, at in zip(streams, pairwise(bounds), strict=True)]


def trim() -> None:
    """Return freed memory that the C library keeps (glibc) to the system."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def keep_one_heap() -> None:
    """Have threads that start from now on take memory from the process's heap (glibc), and not each
    from a heap of its own, of which `trim` does not return what is free at its end."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_ARENA_MAX, 1)


def finish() -> None:
    """Wait for everything that MLX computes."""
    if "mlx.core" in sys.modules:
        import mlx.core as mx

        mx.synchronize()
        for stream in (
            *getattr(_OF_THREAD, "streams", ()),
            *getattr(_OF_THREAD, "side_streams", ()),
        ):
            mx.synchronize(stream)


def _finish_at_exit() -> None:
    with contextlib.suppress(Exception):  # where memory ran out, MLX may not even start a thread
        finish()


def _already_loaded() -> str | None:
    """An OpenBLAS that LD_PRELOAD or another library has loaded."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123
            # The loader maps the file behind the soname: libopenblasp-r0.3.21.so.
            names = (line.rstrip().rpartition("/")[2] for line in maps)
            return next((name for name in names if name.startswith("libopenblas")), None)
    except OSError:
        return None


def kind() -> str:
    """Where MLX computes by default: `metal`, `cuda` or `cpu`."""
    import mlx.core as mx

    if on_cpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def on_cpu() -> bool:
    """Whether MLX computes on the CPU backend."""
    default_device, cpu = _devices()
    return default_device() == cpu


@functools.cache
def _devices() -> tuple[Callable[[], mx.Device], mx.Device]:
    # Every step calls this: the import and the device object take time.
    import mlx.core as mx

    return mx.default_device, mx.Device(mx.cpu)


def default_dtype(checkpoint: mx.Dtype) -> mx.Dtype:
    """The dtype that `dtype="auto"` means here.

    The CPU backend accumulates 16-bit products in 16 bits and is several times slower at them
    (docs/design.md has the figures), so it computes in float32. A GPU keeps the checkpoint's.
    """
    import mlx.core as mx

    if on_cpu() or checkpoint not in (mx.float16, mx.bfloat16, mx.float32):
        return mx.float32
    return checkpoint


@functools.cache
def can_compile() -> bool:
    """Whether `mx.compile` works: on the CPU backend it calls a C++ compiler at run time."""
    return not on_cpu() or shutil.which("g++") is not None or shutil.which("c++") is not None


def n_cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allocator_keeps() -> int:
    """Bytes of freed buffers that MLX's allocator keeps at most: 32 MiB on the CPU backend."""
    import mlx.core as mx

    limit = mx.set_cache_limit(2**62)
    mx.set_cache_limit(limit)
    return limit


def max_arrays() -> int | None:
    """Arrays that this process may have at a time, with those that MLX's allocator keeps.

    Metal's resource limit, 499,000 on the Macs that report it; None where no limit is known.
    """
    import mlx.core as mx

    limit = None if on_cpu() else mx.device_info().get("resource_limit")
    return int(limit) if limit else None


def memory_limit() -> int:
    """Bytes that a model and its caches may take on this machine.

    Metal's recommended working set, a CUDA device's memory, or the RAM on the CPU backend; less
    where a limit of this process (`limits`) leaves less: its control groups', or a ulimit's.
    """
    import mlx.core as mx

    if not on_cpu():
        size = recommended_bytes() or mx.device_info().get("memory_size")
        if size:
            return int(size)
    allowed = process_allows()
    return ram_bytes() if allowed is None else min(allowed, ram_bytes())


def ram_bytes() -> int:
    """The machine's RAM, whatever of it this process may have."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def process_allows() -> int | None:
    """Bytes of MLX's arrays that the limits of this process allow; None where it has none.

    What else counts against a limit is taken off: Python, libraries and threads, and in a control
    group the other processes.
    """
    least = _least(int(time.monotonic() / LOOK_S))
    return None if least is None else least[1]


def tightest() -> Limit | None:
    """The limit of this process that allows models the least, if that is less than the RAM."""
    least = _least(int(time.monotonic() / LOOK_S))
    return None if least is None or least[1] >= ram_bytes() else least[0]


@functools.lru_cache(maxsize=1)
def _least(tick: int) -> tuple[Limit, int] | None:
    """The least limit at a time, and what it allows models."""
    del tick
    found = limits.limits()
    if not found:
        return None
    import mlx.core as mx

    arrays = mx.get_active_memory() + mx.get_cache_memory() if on_cpu() else 0
    allowed = [
        limit.n_bytes
        - max(0, limit.used_bytes - arrays)
        - (
            _bytes_of_streams(limit.n_bytes) + MAPPED_MARGIN_BYTES
            if limit.is_mapped
            else MARGIN_BYTES
        )
        for limit in found
    ]
    least = min(range(len(found)), key=allowed.__getitem__)
    return found[least], max(0, allowed[least])


class WiredLimit:
    """Memory that Metal keeps resident for this process, while it has models.

    MLX wires nothing by default, so the system may page weights out between two requests. mlx-lm
    wires the whole recommended working set, and long prompts then caused kernel panics. Here the
    limit is that of the models (weights, KV and workspace), and never more than that set.

    It may only be set while nothing is computed, so setting it waits for steps in flight.
    """

    def __init__(self) -> None:
        # A model may be garbage-collected, which releases it, while the limit is being set.
        self._lock = threading.RLock()
        self._held: dict[object, int] = {}
        self._before: int | None = None

    def hold(self, n_bytes: int) -> Callable[[], None]:
        """Wire the memory of a model or an engine, and return a function that releases it once."""
        key = object()
        with self._lock:
            self._held[key] = n_bytes
            self._apply()
        return lambda: self._release(key)

    def _release(self, key: object) -> None:
        with self._lock:
            if self._held.pop(key, None) is not None:
                self._apply()

    def _apply(self) -> None:
        most = recommended_bytes()
        if most is None:
            return
        import mlx.core as mx

        finish()
        if self._held:
            before = mx.set_wired_limit(min(sum(self._held.values()), most))
            self._before = before if self._before is None else self._before
        elif self._before is not None:
            mx.set_wired_limit(self._before)
            self._before = None


hold_wired = WiredLimit().hold
"""Of the process's one limit."""


def recommended_bytes() -> int | None:
    """Metal's recommended working set; None on other devices, where nothing is wired."""
    if on_cpu():
        return None
    import mlx.core as mx

    size = mx.device_info().get("max_recommended_working_set_size")
    return int(size) if size else None


CPU_CHUNK, GPU_CHUNK = 256, 2048
"""Prefill chunks: on the CPU backend attention over a short chunk stays in the CPU's caches (132
against 85 tokens/s at 2048); a GPU needs long ones."""


def default_chunk() -> int:
    """Tokens per prefill chunk on this device."""
    return CPU_CHUNK if on_cpu() else GPU_CHUNK
