"""Decide which pages fit a file system's limits, and which are evicted for them, from one scan;
`folder` acts.

Eviction order:
1. Window parts not needed to resume at a leaf or branch.
2. The rest, the least recently used first; leaf before trunk, window part before full part. A page
   counts as used when any page behind it was, so that a chain is evicted from its end.
3. Prefixes that many sequences share (`shared`), in the same order.
4. Unpinned named KV, in the same order.
Pinned named KV is never evicted, nor are pages that are being written, or those before them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlxkv.base.units import parse_bytes
from mlxkv.errors import UsageError
from mlxkv.prefix.on_disk.format import PageKey

CAP_VARIABLE = "MLXKV_KV_DISK"
SLACK_BYTES = 32 << 10
"""Reserve for bytes that no page counts: directories that grow, replacements of small files."""
SMALLEST_CAP_BYTES = 128 << 10
"""The empty folders and one small page need so much."""
SHARED_PART = 0.5
"""Of the bytes that pages may take, what shared prefixes are spared at most."""
_BLOCK = 4096
_ENTRY_BYTES = 512
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """Limits of pages on a file system.

    Args:
        cap_bytes: everything under the folder together; 0 turns pages on disk off.
        free_bytes: bytes that stay free on the file system.
        daily_bytes: bytes written in a day at most.
    """

    cap_bytes: int
    free_bytes: int
    daily_bytes: int

    @classmethod
    def for_folder(cls, root: Path) -> DiskLimits:
        """The limits of this machine.

        The cap is MLXKV_KV_DISK ("20GiB", "0" for off), else a tenth of the file system, at most
        64 GiB. A twentieth of the file system, at most 20 GiB, stays free. At most a tenth of it is
        written in a day: a third of the endurance that consumer drives are rated for.

        Raises:
            UsageError: MLXKV_KV_DISK is no size.
        """
        size = file_system(root).f_frsize * file_system(root).f_blocks
        cap = _chosen_cap()
        return cls(
            min(size // 10, 64 * _GIB) if cap is None else cap,
            min(size // 20, 20 * _GIB),
            size // 10,
        )


def check_cap() -> None:
    """Raise UsageError where MLXKV_KV_DISK is no size, before anything is computed."""
    _chosen_cap()


def _chosen_cap() -> int | None:
    text = os.environ.get(CAP_VARIABLE, "").strip()
    if text == "0":
        return 0
    try:
        return parse_bytes(text or None)
    except UsageError:
        raise UsageError(
            f"{CAP_VARIABLE} must be a size like 20GiB, or 0 for no KV on disk; got {text!r}"
        ) from None


def file_system(path: Path) -> os.statvfs_result:
    """The file system of a folder that need not exist."""
    for folder in (path.absolute(), *path.absolute().parents):
        with suppress(OSError):
            return os.statvfs(folder)
    return os.statvfs("/")


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """The folder's use of the disk.

    Args:
        n_bytes: everything that counts against the cap.
        n_pages: files of pages, of all models.
        written_today_bytes: bytes that count against the daily budget.
        refused: reason -> pages that this process did not write.
    """

    n_bytes: int
    n_pages: int
    written_today_bytes: int
    refused: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Stored:
    """A page's file in the folder.

    Args:
        model: the folder that it lies in.
        key: its name.
        n_bytes: its bytes on disk.
        used_ns: when it was used last.
    """

    model: str
    key: PageKey
    n_bytes: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class Scan:
    """The folder's bytes, and its files that are named like pages, at one moment."""

    n_bytes: int
    pages: tuple[Stored, ...]


def allocated_bytes(stat: os.stat_result) -> int:
    """Bytes of a file or directory; at least its size, as some file systems allocate late."""
    return max(stat.st_blocks * 512, rounded(stat.st_size))


def rounded(n_bytes: int) -> int:
    """Round up to whole blocks."""
    return -(-n_bytes // _BLOCK) * _BLOCK


def reserved_bytes(n_bytes: int) -> int:
    """Bytes to reserve for a new file of so many bytes and its directory entries."""
    return rounded(n_bytes) + _ENTRY_BYTES


class Room:
    """Decides which files fit, and which pages are evicted for them.

    Args:
        scan: of the folder, under its lock.
        limits: of the folder.
        free_bytes: on the file system.
        written_bytes: today.
        order: pages that may be evicted, in order; called when one must be.
    """

    def __init__(
        self,
        scan: Scan,
        limits: DiskLimits,
        free_bytes: int,
        written_bytes: int,
        order: Iterable[Stored],
    ):
        self.evicted: list[Stored] = []
        self.written_bytes = written_bytes
        self._limits = limits
        self._n_bytes = scan.n_bytes
        self._free = free_bytes
        self._order = iter(order)
        self._ahead: list[Stored] = []
        self._evict(self._free_up(0))

    def take(self, n_bytes: int, *, keep: bool = False) -> str | None:
        """Reserve room for a file, or return why there is none.

        Args:
            n_bytes: from `reserved_bytes`.
            keep: ignore the daily budget.
        """
        if not keep and self.written_bytes + n_bytes > self._limits.daily_bytes:
            return "daily budget"
        going = self._free_up(n_bytes)
        freed = sum(page.n_bytes for page in going)
        if self._n_bytes - freed + n_bytes > self._limits.cap_bytes - SLACK_BYTES:
            self._ahead = going + self._ahead
            return "cap"
        if self._free + freed - n_bytes < self._limits.free_bytes:
            self._ahead = going + self._ahead
            return "free space"
        self._evict(going)
        self._n_bytes += n_bytes
        self._free -= n_bytes
        self.written_bytes += n_bytes
        return None

    def _free_up(self, n_bytes: int) -> list[Stored]:
        """The pages to evict for so many bytes more; all, if that is not enough."""
        over = self._n_bytes + n_bytes - (self._limits.cap_bytes - SLACK_BYTES)
        ahead, self._ahead = self._ahead, []
        going: list[Stored] = []
        while over > 0:
            page = ahead.pop(0) if ahead else next(self._order, None)
            if page is None:
                break
            going.append(page)
            over -= page.n_bytes
        self._ahead = ahead
        return going

    def _evict(self, pages: list[Stored]) -> None:
        freed = sum(page.n_bytes for page in pages)
        self._n_bytes -= freed
        self._free += freed
        self.evicted += pages


@dataclass(frozen=True, slots=True)
class _Chains:
    """The pages of one model as a forest.

    Args:
        parents: of every page in the folder.
        depth: number of pages before it in the folder.
        used_ns: the latest use of it or of a page behind it.
        needed: pages whose window part is needed to resume.
    """

    parents: Mapping[str, str]
    depth: Mapping[str, int]
    used_ns: Mapping[str, int]
    needed: Collection[str]


def eviction_order(
    pages: Collection[Stored],
    wanted: Collection[Stored],
    window_pages: Mapping[str, int | None],
    named: Mapping[tuple[str, str], bool],
    shared: Collection[tuple[str, PageKey]] = (),
) -> list[Stored]:
    """The pages that may be evicted, in order.

    Args:
        pages: all in the folder.
        wanted: pages about to be written.
        window_pages: model -> number of pages before a leaf or branch whose window part is needed
            to resume there; all are kept where it is None or missing.
        named: (model, file name) of pages of named KV -> whether it is pinned.
        shared: (model, key) of pages of a prefix that many sequences share.
    """
    models: dict[str, list[Stored]] = {}
    for page in [*pages, *wanted]:
        models.setdefault(page.model, []).append(page)
    chains = {model: _chains(some, window_pages.get(model)) for model, some in models.items()}
    writing = {(page.model, page.key) for page in wanted}
    trunk = _trunk(wanted, chains)
    ranked = []
    for page in pages:
        chain, key = chains[page.model], page.key
        pinned = named.get((page.model, key.file_name))
        if pinned or (page.model, key) in writing:
            continue
        far = key.part == "window" and key.name not in chain.needed
        is_shared = (page.model, key) in shared
        rank = 3 if pinned is not None else 2 if is_shared else 0 if far else 1
        if rank and (page.model, key.name) in trunk:
            continue
        used, depth = chain.used_ns[key.name], chain.depth[key.name]
        ranked.append(((rank, used, -depth, key.part == "full", key.name), page))
    return [page for _, page in sorted(ranked, key=lambda pair: pair[0])]


def shared_pages(
    pages: Collection[Stored],
    window_pages: Mapping[str, int | None],
    shared: Mapping[str, Sequence[str]],
    limit_bytes: int,
) -> set[tuple[str, PageKey]]:
    """(model, key) of what is needed to go on behind shared prefixes.

    Args:
        pages: all that are here.
        window_pages: as for `eviction_order`.
        shared: the last page of each prefix, by model; the latest last.
        limit_bytes: of all of them; of a prefix that does not fit, its beginning.
    """
    here: dict[tuple[str, str], list[Stored]] = {}
    for page in pages:
        here.setdefault((page.model, page.key.name), []).append(page)
    found: set[tuple[str, PageKey]] = set()
    for model, ends in shared.items():
        for last in reversed(ends):
            for page in _needed_behind(model, last, here, window_pages.get(model)):
                if (model, page.key) in found:
                    continue
                limit_bytes -= page.n_bytes
                if limit_bytes < 0:
                    return found
                found.add((model, page.key))
    return found


def _needed_behind(
    model: str, last: str, here: Mapping[tuple[str, str], list[Stored]], near: int | None
) -> list[Stored]:
    """What is here of the pages up to one and needed to go on behind it, trunk first."""
    chain: list[list[Stored]] = []
    name, seen = last, set[str]()
    while (parts := here.get((model, name))) and name not in seen:
        seen.add(name)
        is_near = near is None or len(seen) <= near + 1
        chain.append([page for page in parts if is_near or page.key.part == "full"])
        name = parts[0].key.parent
    return [page for parts in reversed(chain) for page in parts]


def _trunk(wanted: Iterable[Stored], chains: Mapping[str, _Chains]) -> set[tuple[str, str]]:
    """(model, name) of pages and of all pages before them."""
    trunk: set[tuple[str, str]] = set()
    for page in wanted:
        parents = chains[page.model].parents
        name = page.key.name
        while name in parents and (page.model, name) not in trunk:
            trunk.add((page.model, name))
            name = parents[name]
    return trunk


def _chains(pages: Iterable[Stored], near: int | None) -> _Chains:
    parents: dict[str, str] = {}
    used_ns: dict[str, int] = {}
    for page in pages:
        name = page.key.name
        parents[name] = page.key.parent
        used_ns[name] = max(used_ns.get(name, 0), page.used_ns)
    children: dict[str, list[str]] = {}
    for name, parent in parents.items():
        children.setdefault(parent, []).append(name)
    trunk_first = _trunk_first(parents, children)
    # Names in a circle are forged: they are behind no root and get no depth.
    depth = dict.fromkeys(parents, 0)
    for name in trunk_first:
        depth[name] = depth.get(parents[name], -1) + 1
    reach = dict.fromkeys(parents, -1)
    for name in reversed(trunk_first):
        behind = children.get(name, [])
        used_ns[name] = max([used_ns[name], *(used_ns[child] for child in behind)])
        far = near if near is not None else len(parents)
        reach[name] = far if len(behind) != 1 else reach[behind[0]] - 1
    needed = {name for name, pages_left in reach.items() if pages_left >= 0}
    return _Chains(parents, depth, used_ns, needed)


def _trunk_first(parents: Mapping[str, str], children: Mapping[str, list[str]]) -> list[str]:
    order = [name for name, parent in parents.items() if parent not in parents]
    for name in order:
        order.extend(children.get(name, ()))
    return order
