"""Builds and installs shim.cpp: from then on MLX's CPU wheel builds graphs as Metal would.

It overwrites functions of libmlx in the running process, and nothing takes that back: only a
process of its own may install it (`measure` is that process).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

DECODED_FROM = "0.32.4"
"""The MLX whose macOS wheel says which attention takes a fused kernel (shim.cpp)."""

SOURCE = Path(__file__).with_name("shim.cpp")

_FAST = "mlx::core::fast::"
_REPLACED = {
    "mlx::core::gpu::is_available()": "yes",
    "mlx::core::gpu::device_count()": "one_device",
    "mlx::core::gpu::device_info[abi:cxx11](int)": "device_info",
    "mlx::core::gpu::new_stream(mlx::core::Stream)": "no_stream",
    "mlx::core::gpu::new_thread_unsafe_stream(mlx::core::Stream)": "no_stream",
    "mlx::core::gpu::synchronize(mlx::core::Stream)": "no_stream",
    "mlx::core::metal::is_available()": "yes",
    "mlx::core::detail::compile_available_for_device(mlx::core::Device const&)": "yes",
    f"{_FAST}RMSNorm::use_fallback(mlx::core::Stream)": "falls_back_on_cpu",
    f"{_FAST}LayerNorm::use_fallback(mlx::core::Stream)": "falls_back_on_cpu",
    f"{_FAST}RoPE::use_fallback(mlx::core::Stream)": "falls_back_on_cpu",
    f"{_FAST}ScaledDotProductAttention::supports_bool_mask()": "yes",
    f"{_FAST}ScaledDotProductAttention::use_fallback(": "attention_falls_back",
    "mlx::core::export_to_dot(std::ostream": "write_graph",
}
"""Beginning of a function's name in libmlx -> what of shim.cpp it becomes."""


def why_not() -> str | None:
    """Why this machine cannot build or install the shim; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the shim patches Linux x86_64 code; this is {sys.platform} {platform.machine()}"
    if missing := [tool for tool in ("g++", "nm") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} not installed"
    if version() != DECODED_FROM:
        return f"the attention table is decoded from MLX {DECODED_FROM}; this is MLX {version()}"
    if absent := _REPLACED.keys() - _addresses().keys():
        return f"libmlx has no function {sorted(absent)[0]}"
    return None


def version() -> str:
    """Of the installed MLX."""
    return importlib.metadata.version("mlx")


def _library() -> Path:
    return Path(mx.__file__).parent / "lib" / "libmlx.so"


@functools.cache
def _addresses() -> dict[str, int]:
    """Where in libmlx the functions of `_REPLACED` are, by the key there."""
    listing = subprocess.run(
        ["nm", "-C", _library()], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in listing.splitlines():
        address, _, rest = line.partition(" ")
        kind, _, name = rest.partition(" ")
        # A clone is a part that the compiler moved out of the function, a lambda one inside it.
        if kind not in ("t", "T") or "clone" in name or "{lambda" in name:
            continue
        for start in _REPLACED:
            if name == start or (not start.endswith(")") and name.startswith(start)):
                found[start] = int(address, 16)
    return found


def build(folder: Path) -> Path:
    """The compiled shim in a folder; compiles it (3 s) unless it is there."""
    key = hashlib.sha256(SOURCE.read_bytes() + version().encode()).hexdigest()[:16]
    target = folder / f"shim-{key}.so"
    if target.exists():
        return target
    library = _library()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w"]
        command += [f"-I{library.parent.parent / 'include'}", str(SOURCE), "-o", str(made)]
        command += [f"-L{library.parent}", "-lmlx", f"-Wl,-rpath,{library.parent}"]
        subprocess.run(command, check=True)
        os.replace(made, target)  # noqa: PTH105
    return target


def install(folder: Path) -> None:
    """Patch this process; graphs built inside `gpu()` are Metal's from here on."""
    shim = ctypes.CDLL(str(build(folder)), mode=ctypes.RTLD_GLOBAL)
    shim.shim_replace.argtypes = [ctypes.c_size_t, ctypes.c_char_p]
    base = _loaded_at()
    for start, address in _addresses().items():
        error = shim.shim_replace(base + address, _REPLACED[start].encode())
        assert error == 0, f"{start}: cannot be replaced ({error})"
    mx.set_default_device(mx.Device(mx.cpu, 0))


def _loaded_at() -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, *_ = line.split()
        if line.endswith("/libmlx.so") and int(offset, 16) == 0:
            return int(span.split("-")[0], 16)
    raise AssertionError("libmlx.so is not loaded")


@contextlib.contextmanager
def gpu() -> Iterator[None]:
    """Build what is inside on the GPU; what asks for an evaluation there gets none."""
    evaluate, later = mx.eval, mx.async_eval
    mx.set_default_device(mx.Device(mx.gpu, 0))
    mx.eval = mx.async_eval = lambda *arrays: None
    try:
        yield
    finally:
        mx.eval, mx.async_eval = evaluate, later
        mx.set_default_device(mx.Device(mx.cpu, 0))


def graph(*arrays: mx.array) -> dict[str, Any]:
    """The operations that evaluating these arrays takes, in order, as shim.cpp writes them."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        mx.export_to_dot(file.name, *arrays)
        return json.loads(Path(file.name).read_text())


def are_done(arrays: Sequence[mx.array]) -> list[bool]:
    """Whether each has its contents, so that no graph reaches behind it."""
    shim = ctypes.CDLL(None)
    shim.shim_want_operations(0)
    try:
        return [done for *_, done in graph(*arrays)["outputs"]]
    finally:
        shim.shim_want_operations(1)
