"""Memory after many loads: `python -m benchmarks.reliability.loads --loads 500`.

Loads a tiny model, asks it for an answer and closes it, again and again in one process; prints the
resident memory, Python's objects, threads and descriptors after each tenth. Exits with 1 where
memory grew by more than `--allowed` KiB a load in the second half.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

import mlxkv
from mlxkv.base import device
from tests.support.command_line import chat_model


def resident_kib() -> int:
    """The process's resident memory, without what allocators keep of what was freed (Linux)."""
    gc.collect()
    mx.clear_cache()
    device.trim()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def load_once(path: Path) -> None:
    with mlxkv.load(path, dtype="float32") as llm:
        llm.generate("hello there", max_tokens=3)


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory after many loads.")
    parser.add_argument("--loads", type=int, default=500)
    parser.add_argument("--allowed", type=float, default=5.0, help="KiB a load")
    options = parser.parse_args()
    print("| loads | KiB | objects | threads | descriptors |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as home:
        os.environ["MLXKV_KV"] = f"{home}/kv"
        path = chat_model(Path(home) / "m")
        measured = []
        for n in range(options.loads + 1):
            if n % max(1, options.loads // 10) == 0:
                measured.append((n, resident_kib()))
                n_threads = len([*Path("/proc/self/task").iterdir()])
                n_files = len([*Path("/proc/self/fd").iterdir()])
                print(f"| {n} | {measured[-1][1]:,} | {len(gc.get_objects()):,} | {n_threads} | "
                      f"{n_files} |", flush=True)  # fmt: skip
            load_once(path)
    (half, before), (end, after) = measured[len(measured) // 2], measured[-1]
    grown = (after - before) / max(1, end - half)
    print(f"\n{grown:.1f} KiB a load in the second half")
    return 1 if grown > options.allowed else 0


if __name__ == "__main__":
    sys.exit(main())
