"""Chains of pages for the tests of page files, and a process that is killed while it writes them.

    python -m tests.support.page_writer kill ROOT N     fork N writers in turn, kill each
    python -m tests.support.page_writer crowd ROOT N CAP  the same, two at a time under a cap
    python -m tests.support.page_writer write ROOT N CAP SEED  write N chains, say when done

`kill` and `crowd` print what they saw as JSON. No MLX: a process that has it starts too slowly.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mlxkv.prefix.eviction import DiskLimits
from mlxkv.prefix.on_disk.format import ROOT, PageFile, PageKey, page_name
from mlxkv.prefix.on_disk.writer import PageFiles

FINGERPRINT = "5a" * 32
NO_LIMIT = 1 << 40


def limits(cap: int = NO_LIMIT, free: int = 0, daily: int = NO_LIMIT) -> DiskLimits:
    return DiskLimits(cap, free, daily)


def one_page(parent: str, start: int, tokens: bytes, part: str, n_values: int) -> PageFile:
    """A page whose tensors follow from its name."""
    name = page_name(parent, tokens)
    values = np.random.default_rng([int(name[:8], 16), part == "full"])
    tensors = {
        "0.0": values.integers(0, 1 << 16, (1, 2, n_values), dtype=np.uint16),
        "0.1": values.integers(0, 1 << 16, (1, 2, n_values), dtype=np.uint16),
        "3.0": values.standard_normal((1, 5), dtype=np.float32),
    }
    dtypes = {"0.0": "bfloat16", "0.1": "bfloat16", "3.0": "float32"}
    return PageFile(PageKey(parent, name, len(tokens) // 4, part), start, tokens, tensors, dtypes)


def chain(
    seed: int | Sequence[int],
    n_pages: int,
    *,
    parts: Sequence[str] = ("full",),
    n_values: int = 8,
    tip: int = 256,
    after: PageFile | None = None,
) -> list[PageFile]:
    """Pages of consecutive tokens, each in all its parts; the last has `tip` tokens."""
    ids = np.random.default_rng(seed)
    parent = after.key.name if after else ROOT
    start = after.start + after.key.n_tokens if after else 0
    pages: list[PageFile] = []
    for i in range(n_pages):
        n_tokens = tip if i == n_pages - 1 else 256
        tokens = ids.integers(0, 50_000, n_tokens, dtype=np.int32).tobytes()
        pages += [one_page(parent, start, tokens, part, n_values) for part in parts]
        parent, start = pages[-1].key.name, start + n_tokens
    return pages


def same(a: PageFile | None, b: PageFile) -> bool:
    """Whether two pages are equal to the last bit."""
    return (
        a is not None
        and (a.key, a.start, a.tokens, dict(a.dtypes)) == (b.key, b.start, b.tokens, b.dtypes)
        and a.tensors.keys() == b.tensors.keys()
        and all(
            a.tensors[name].tobytes() == x.tobytes()
            and (a.tensors[name].shape, a.tensors[name].dtype) == (x.shape, x.dtype)
            for name, x in b.tensors.items()
        )
    )


def opened(root: Path, cap: int = 1 << 40, **kwargs: int) -> PageFiles:
    return PageFiles(root, FINGERPRINT, limits(cap), **kwargs)


def stored(root: Path, pages: Sequence[PageFile], **kwargs: int) -> PageFiles:
    """The folder after these pages were written."""
    files = opened(root, **kwargs)
    files.write(pages)
    files.flush()
    return files


def path_of(root: Path, key: PageKey) -> Path:
    return root / "pages" / FINGERPRINT[:32] / key.file_name


def aged(root: Path, pages: Sequence[PageFile], age_s: float) -> None:
    """Pages that were used last so long ago."""
    then = time.time_ns() - int(age_s * 1e9)
    for page in pages:
        os.utime(path_of(root, page.key), ns=(then, then))


def folder_bytes(root: Path) -> int:
    """What everything under a folder takes, itself included, as `du` counts it or by size."""
    blocks = sizes = 0
    for folder, _, names in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in names)):  # noqa: PTH118
            try:
                about = os.lstat(path)
            except FileNotFoundError:
                continue
            blocks += about.st_blocks * 512
            sizes += about.st_size
    return max(blocks, sizes)


def frozen_bytes(root: Path, pids: Iterable[int]) -> int:
    """`folder_bytes` at one moment: a walk past writers counts what they replace twice."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        # Only a process that has stopped writes no more; the signal alone says nothing.
        if sys.platform == "linux":
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        else:
            time.sleep(0.005)  # macOS has no waitid before Python 3.13
    n_bytes = folder_bytes(root)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    return n_bytes


def stored_keys(root: Path) -> list[PageKey]:
    """Keys of all files in the model's folder."""
    try:
        names = os.listdir(root / "pages" / FINGERPRINT[:32])  # noqa: PTH208
    except FileNotFoundError:
        return []
    return [key for name in names if (key := PageKey.parse(name)) is not None]


def leftovers(root: Path) -> list[str]:
    """Files under `tmp`."""
    return os.listdir(root / "tmp") if (root / "tmp").is_dir() else []  # noqa: PTH208


def write_forever(root: Path, cap: int, seed: int, said: int) -> None:
    """Write chains until killed; says each number when its pages are flushed."""
    files = PageFiles(root, FINGERPRINT, limits(cap))
    number = 0
    while True:
        files.write(chain([seed, number], 3, n_values=20_000), keep=number % 4 == 3)
        files.flush()
        os.write(said, f"{number}\n".encode())
        number += 1


def start_writer(root: Path, cap: int, seed: int) -> tuple[int, int]:
    """(process, what it says) of a forked writer."""
    out, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        try:
            write_forever(root, cap, seed, said)
        finally:
            os._exit(1)
    os.close(said)
    return pid, out


def kill(pid: int, out: int, begun: bytes = b"") -> list[int]:
    """End a writer; the numbers it said, `begun` first. One that died by itself is an error."""
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    with os.fdopen(out, "rb") as file:
        return [int(line) for line in (begun + file.read()).split(b"\n")[:-1]]


def kill_one_by_one(root: Path, n_kills: int) -> dict[str, object]:
    """Kill writers at random moments, and look at the folder after each."""
    moments = random.Random(0)
    wrong: list[str] = []
    n_said = n_leftovers = n_pages = 0
    for i in range(n_kills):
        if i % 15 == 0:
            shutil.rmtree(root, ignore_errors=True)
        pid, out = start_writer(root, NO_LIMIT, i)
        # As far as it may have come on any machine, and on from there for a random while.
        begun = os.read(out, 64) if i % 2 else b""
        time.sleep(moments.uniform(0, 0.04))
        said = kill(pid, out, begun)
        n_said += len(said)
        n_leftovers += bool(leftovers(root))
        files = PageFiles(root, FINGERPRINT, limits())
        if leftovers(root):
            wrong.append(f"{i}: leftovers after a start")
        for number in said:
            pages = chain([i, number], 3, n_values=20_000)
            if not all(page.key in files and same(files.read(page.key), page) for page in pages):
                wrong.append(f"{i}: chain {number} was flushed and is not there")
        keys = stored_keys(root)
        n_pages += len(keys)
        wrong += [f"{i}: {key} is damaged" for key in keys if files.read(key) is None]
    return {"wrong": wrong, "said": n_said, "leftovers": n_leftovers, "pages": n_pages}


def kill_in_a_crowd(root: Path, n_kills: int, cap: int) -> dict[str, object]:
    """Two writers under one cap; now one, now the other is killed and replaced."""
    moments = random.Random(1)
    wrong: list[str] = []
    most = n_said = n_looks = 0
    writers = [start_writer(root, cap, -i - 1 & 0xFFFF) for i in range(2)]
    for i in range(n_kills):
        end = time.monotonic() + moments.uniform(0.01, 0.06)
        while time.monotonic() < end:
            most = max(most, frozen_bytes(root, [pid for pid, _ in writers]))
            n_looks += 1
            time.sleep(0.002)
        n_said += len(kill(*writers[i % 2]))
        files = PageFiles(root, FINGERPRINT, limits(cap))
        for key in stored_keys(root):
            page = files.read(key)
            if page is None and key in PageFiles(root, FINGERPRINT, limits(cap)):
                wrong.append(f"{i}: {key} is there and cannot be read")
            if page is not None:
                expected = one_page(key.parent, page.start, page.tokens, key.part, 20_000)
                wrong += [f"{i}: {key} is wrong"] * (not same(page, expected))
        writers[i % 2] = start_writer(root, cap, i)
    for writer in writers:
        n_said += len(kill(*writer))
    PageFiles(root, FINGERPRINT, limits(cap))
    wrong += [f"{name} is left" for name in leftovers(root)]
    counts = {"said": n_said, "looks": n_looks, "most_bytes": most}
    return {"wrong": wrong, **counts, "pages": len(stored_keys(root))}


def write_chains(root: Path, n_chains: int, cap: int, seed: int) -> None:
    """Write chains one after the other."""
    files = PageFiles(root, FINGERPRINT, limits(cap))
    for number in range(n_chains):
        files.write(chain([seed, number], 3, n_values=5_000))
        if number % 2:
            files.flush()
    files.close()
    print(json.dumps(dict(files.usage().refused)))


if __name__ == "__main__":
    what, folder, *numbers = sys.argv[1:]
    if what == "write":
        write_chains(Path(folder), *(int(number) for number in numbers))
    else:
        run = {"kill": kill_one_by_one, "crowd": kill_in_a_crowd}[what]
        print(json.dumps(run(Path(folder), *(int(number) for number in numbers))))
