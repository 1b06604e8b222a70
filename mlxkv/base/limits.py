"""The memory limits that Linux sets a process, beside the RAM of the machine.

A container or a service has those of its control groups (cgroup v1 and v2, each group up to the
root of the hierarchy that it sees); `ulimit -v` and `ulimit -d` are RLIMIT_AS and RLIMIT_DATA.
macOS has no control groups and enforces neither of the two, so nothing is read there.

A control group counts the page cache of files, which gives way under pressure: the inactive part
of it (`inactive_file`) counts as free here, as the kernel's own out-of-memory decision has it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxkv.base.units import human_bytes

ROOT = Path("/")
"""What /proc and the mounted control groups are found below."""
_M_ARENA_MAX = -8
LARGEST = 2**60
"""A limit at or above this is none: cgroup v1 writes the largest multiple of a page for none."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit, and what counts against it.

    Args:
        name: for people, such as "cgroup memory.max of /user.slice" or "ulimit -v".
        n_bytes: the limit.
        used_bytes: what is used of it, by this process or by all of the control group.
        is_mapped: whether memory counts from when it is mapped, touched or not.
    """

    name: str
    n_bytes: int
    used_bytes: int
    is_mapped: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({human_bytes(self.n_bytes)})"


def limits() -> list[Limit]:
    """All memory limits of this process but the machine's RAM; empty where there are none."""
    if sys.platform != "linux":
        return []
    return [*_of_process(), *_of_groups()]


def mapped_bytes() -> int | None:
    """The least limit of mapped memory; None where there is none."""
    return min((limit.n_bytes for limit in _of_process()), default=None)


def map_less() -> None:
    """Map less that may never be used, for a limit counts it all the same.

    glibc gives each thread a heap of its own and maps 64 MiB for it: one serves all threads from
    here on. tokenizers starts a thread for each core, and aborts the process where it cannot.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        set_option(_M_ARENA_MAX, 1)


def _of_process() -> Iterator[Limit]:
    if sys.platform != "linux":
        return
    import resource

    for name, number, column in (("ulimit -v", resource.RLIMIT_AS, 0),
                                 ("ulimit -d", resource.RLIMIT_DATA, 5)):  # fmt: skip
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY and soft < LARGEST:
            pages = int((_text(ROOT / "proc/self/statm") or "0 0 0 0 0 0").split()[column])
            yield Limit(name, soft, pages * os.sysconf("SC_PAGE_SIZE"), is_mapped=True)


def _of_groups() -> Iterator[Limit]:
    for files in _group_files(ROOT):
        limit = _number(files.limit)
        if limit is None or limit >= LARGEST:
            continue
        stat = _text(files.folder / "memory.stat") or ""
        # cgroup v1 counts those below it under the total_ names.
        cached = re.search(rf"^{files.inactive} (\d+)$", stat, re.MULTILINE)
        used = (_number(files.usage) or 0) - (int(cached[1]) if cached else 0)
        yield Limit(files.name, limit, max(0, used))


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """Where one limit of a control group is read."""

    name: str
    folder: Path
    limit: Path
    usage: Path
    inactive: str


@functools.cache
def _group_files(root: Path) -> tuple[_GroupFiles, ...]:
    """The files of all control groups that may limit this process, that it can read.

    Where they lie is looked up once: a process is rarely moved to another group.
    """
    found = []
    mounts = _text(root / "proc/self/mountinfo") or ""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if not controllers or "memory" in controllers.split(","):
            for folder, name in _folders(root, mounts, group, is_v2=not controllers):
                found += _limits_in(folder, name, is_v2=not controllers)
    return tuple(found)


def _folders(root: Path, mounts: str, group: str, *, is_v2: bool) -> Iterator[tuple[Path, str]]:
    """A group's folder and those of all groups above it, below the mounts of its hierarchy."""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        (kind, _, options), columns = (*rest.split(), "", "", "")[:3], fields.split()
        if len(columns) < 5 or kind != ("cgroup2" if is_v2 else "cgroup"):
            continue
        if not is_v2 and "memory" not in options.split(","):
            continue
        # Of a container, the mount's own root is its group: what lies above is out of its sight.
        top, mount = _unescaped(columns[3]), root / _unescaped(columns[4]).lstrip("/")
        inside = group.removeprefix(top if top != "/" else "")
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        if top != "/" and not (group + "/").startswith(top + "/"):
            parts = []
        for n in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:n]), "/" + "/".join(parts[:n])


def _limits_in(folder: Path, name: str, *, is_v2: bool) -> Iterator[_GroupFiles]:
    if is_v2:
        files = (("memory.max", "memory.current"), ("memory.high", "memory.current"))
    else:
        files = (("memory.limit_in_bytes", "memory.usage_in_bytes"),)
    inactive = "inactive_file" if is_v2 else "total_inactive_file"
    for limit, usage in files:
        if (folder / limit).is_file():
            label = f"cgroup {limit} of {name}"
            yield _GroupFiles(label, folder, folder / limit, folder / usage, inactive)


def _unescaped(path: str) -> str:
    """A path of mountinfo, which writes blanks as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _number(path: Path) -> int | None:
    """The number in a file; None for `max`, or if it cannot be read."""
    text = (_text(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
