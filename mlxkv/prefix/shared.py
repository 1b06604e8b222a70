"""Prefixes that many sequences share: of all pages without a saved name they are evicted last.

Each has a name that the caller chooses, and is known by its last page. The file `shared.json` in a
model's folder has that page for each name, so that other processes and later ones spare it too.
What is spared is bounded by a part of what pages may take, the latest names first. No MLX here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from mlxkv.base.seal import Seal
from mlxkv.kv.types import STEP
from mlxkv.prefix.eviction import SHARED_PART, SMALLEST_CAP_BYTES
from mlxkv.prefix.layout import Kinds, Link
from mlxkv.prefix.on_disk.folder import SHARED_FILE, Folder
from mlxkv.prefix.on_disk.format import ROOT

MAX_NAMES = 16
CLOSE_WAIT_S = 2.0


class SharedPrefixes:
    """The shared prefixes of one model's pages, by name; the latest last.

    Args:
        kinds: of the model's layers.
    """

    def __init__(self, kinds: Kinds):
        self._kinds = kinds
        self._chains: dict[str, tuple[Link, ...]] = {}

    def __len__(self) -> int:
        return len(self._chains)

    @property
    def chains(self) -> Mapping[str, Sequence[Link]]:
        """The pages of each prefix, from position 0 on."""
        return self._chains

    def put(self, name: str, links: Sequence[Link]) -> None:
        """Spare these pages, and no longer those that had the name."""
        self._chains.pop(name, None)
        self._chains[name] = tuple(links)
        while len(self._chains) > MAX_NAMES:
            del self._chains[next(iter(self._chains))]

    def spared(
        self, size: Callable[[Link, str], int | None], budget_bytes: int
    ) -> set[tuple[str, str]]:
        """(page, part) of what is needed to go on behind the prefixes, as far as it is bounded.

        Args:
            size: bytes of a part of a page; None if it is not held.
            budget_bytes: what all pages may take.
        """
        room, found = SHARED_PART * budget_bytes, set[tuple[str, str]]()
        for links in reversed(self._chains.values()):
            for part in self._kinds.parts:
                for link in self._kinds.needed(links, part, links[-1].stop):
                    n_bytes = size(link, part)
                    if n_bytes is None or (link.name, part) in found:
                        continue
                    if n_bytes > room:
                        return found
                    room -= n_bytes
                    found.add((link.name, part))
        return found


class SharedFile:
    """Which shared prefixes a model has on disk.

    Args:
        folder: of all models' pages.
        model: the model's folder in it.
        seal: how the folder's files are written.
    """

    def __init__(self, folder: Folder, model: str, seal: Seal):
        self._folder, self._model, self._seal = folder, model, seal
        self._pending: dict[str, str] = {}
        self._noted: dict[str, str] = {}

    def read(self, parents: Mapping[str, str]) -> dict[str, list[Link]]:
        """The prefixes whose pages are all there, the latest last.

        Args:
            parents: of each whole page on disk, the page before it.
        """
        self._noted = self._folder.shared(self._model)
        unmasked = self._seal.unmasked
        chains = {name: chain_to(unmasked(last), parents) for name, last in self._noted.items()}
        return {name: links for name, links in chains.items() if links}

    def write(self, chains: Mapping[str, Sequence[Link]], wait_s: float = 0.0) -> None:
        """Note the last page of each prefix; later, where another writer holds the folder.

        Args:
            chains: the latest last.
            wait_s: how long to wait for it.
        """
        ends = {name: self._seal.masked(links[-1].name) for name, links in chains.items()}
        self._pending |= {name: end for name, end in ends.items() if self._noted.get(name) != end}
        if not self._pending or self._folder.limits.cap_bytes < SMALLEST_CAP_BYTES:
            return
        with suppress(OSError), self._folder.locked(wait_s):
            known = self._folder.shared(self._model)
            for name, last in self._pending.items():
                if known.get(name) != last:
                    known.pop(name, None)
                    known[name] = last
            while len(known) > MAX_NAMES:
                del known[next(iter(known))]
            folder = self._folder.pages / self._model
            if folder.is_dir():  # it is made with the first page
                self._folder.put(folder / SHARED_FILE, json.dumps(known).encode())
                self._noted |= self._pending
                self._pending.clear()

    def close(self) -> None:
        """Write what is not written yet."""
        self.write({}, CLOSE_WAIT_S)


def chain_to(last: str, parents: Mapping[str, str]) -> list[Link]:
    """The whole pages up to one; none where some are missing."""
    names = [last]
    while (parent := parents.get(names[-1])) is not None and parent != ROOT:
        if len(names) > len(parents):
            return []  # names in a circle are forged
        names.append(parent)
    if parents.get(names[-1]) != ROOT or ROOT in names:
        return []
    names.reverse()
    before = [ROOT, *names[:-1]]
    return [Link(a, b, STEP * i) for i, (a, b) in enumerate(zip(before, names, strict=True))]
