"""Answers that were put away, as files: what a process leaves for the next one.

    asleep/PROCESS/lock                  held by the process while it lives
    asleep/PROCESS/KEY-LABEL.jsonl       one answer: lines of JSON, the newest last

Invariants:
- A file is its process's alone. The next process takes over what processes that have ended left.
- A file appears by a rename, with its first line. Lines are only appended: one that was cut short
  by the end of a process is the last, and is ignored.
- Files, their bytes and their age are bounded; the oldest go first.
- With `MLXKV_KV_KEY` each line is encrypted, and names say nothing of the request. A file of
  another key cannot be read, and is removed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxkv.base.durable import sync_path, write_whole
from mlxkv.base.seal import seal_of_environment
from mlxkv.generation.asleep import Asleep, Written

_log = logging.getLogger(__name__)

KEEP_S = 86_400.0
MAX_FILES = 256
MAX_BYTES = 64 << 20
_NAME = re.compile(r"(?P<key>[0-9a-f]{40})-(?P<label>[A-Za-z0-9_]{1,80})\.jsonl")

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sleeper:
    """A file of an answer.

    Args:
        name: of the file.
        ask: its first line: `owner`, `model`, and what else the request came with.
        asleep: where it was; None if it had not begun.
    """

    name: str
    ask: Mapping[str, Any]
    asleep: Asleep | None

    @property
    def label(self) -> str:
        """The name that its request gave it."""
        found = _NAME.fullmatch(self.name)
        return found["label"] if found else ""

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer so far."""
        return 0 if self.asleep is None else len(self.asleep.written.tokens)


class SleepFiles:
    """The files of one process; safe to use from several threads.

    Args:
        root: the folder of all processes; need not exist.
        keep_s: how long a file is kept.
        max_files: files at most.
        max_bytes: bytes of all of them; one file may have a quarter.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_s: float = KEEP_S,
        max_files: int = MAX_FILES,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ):
        self._root, self._clock, self._seal = root, clock, seal_of_environment()
        self._keep_s, self._max_files, self._max_bytes = keep_s, max_files, max_bytes
        self._folder = root / f"{os.getpid()}-{secrets.token_hex(6)}"
        self._lock: int | None = None
        self._mutex = threading.RLock()
        self._asleep: set[str] = set()
        self._running: set[str] = set()
        self._heads: dict[str, tuple[str, str]] = {}
        with self._mutex:
            self._take_over()

    @property
    def is_empty(self) -> bool:
        """Whether no answer sleeps here."""
        return not self._asleep

    def sleeping(self) -> list[Sleeper]:
        """The answers that sleep."""
        with self._mutex:
            self._expire()
            return [found for name in sorted(self._asleep) if (found := self._read(name))]

    def counts(self, owner: str | None = None) -> dict[str, int]:
        """How many answers of each model's directory sleep: an owner's, or all for None."""
        found: Counter[str] = Counter()
        with self._mutex:
            self._expire()
            for name in list(self._asleep):
                if name not in self._heads and (read := self._read(name)) is not None:
                    self._heads[name] = read.ask["owner"], read.ask["model"]
            for whose, model in (self._heads[x] for x in self._asleep if x in self._heads):
                found[model] += owner in (None, whose)
        return +found

    def find(self, label: str) -> Sleeper | None:
        """The sleeping answer that has this label."""
        with self._mutex:
            self._expire()
            names = [name for name in self._asleep if name.endswith(f"-{label}.jsonl")]
            return self._read(names[0]) if names else None

    def take(self, key: str, label: str = "") -> Sleeper | None:
        """A sleeping answer of that key, best of that label: it runs from now on.

        A durable one is its label's alone.
        """
        with self._mutex:
            self._expire()
            names = [name for name in self._asleep if name.startswith(key)]
            own = f"{key}-{label}.jsonl"
            for name in sorted(names, key=lambda name: (name != own, name)):
                found = self._read(name)
                if found is None or (name != own and found.ask.get("durable")):
                    continue
                self._asleep.discard(name)
                self._running.add(name)
                return found
        return None

    def begin(self, key: str, label: str, ask: Line) -> str | None:
        """Make the file of a running answer; its name, None if it cannot be kept."""
        name = f"{key}-{label or secrets.token_hex(8)}.jsonl"
        with self._mutex:
            data = self._encoded(name, ask)
            if not _NAME.fullmatch(name) or not self._makes_room(len(data)):
                return None
            try:
                self._write(name, data)
            except OSError as error:
                _log.warning("an answer is not kept over a restart: %s", error)
                return None
            self._running.add(name)
            return name

    def start(self, name: str, asleep: Asleep) -> bool:
        """Note how an answer begins: its prompt and seed. Whether it was written."""
        line = {"prompt": list(asleep.prompt), "seed": asleep.seed}
        return self._append(name, {"start": line}) and self.extend(name, asleep.written)

    def extend(self, name: str, written: Written) -> bool:
        """Note what an answer has got since the last time. Whether it was written."""
        return not written.tokens or self._append(name, {"written": written.to_json()})

    def put_away(self, name: str) -> None:
        """Sync a file: its answer sleeps from now on."""
        with self._mutex:
            with suppress(OSError):
                sync_path(self._folder / name)
            self._running.discard(name)
            self._asleep.add(name)

    def remove(self, name: str) -> None:
        """Remove a file: its answer has ended."""
        with self._mutex:
            self._asleep.discard(name)
            self._running.discard(name)
            self._heads.pop(name, None)
            with suppress(OSError):
                (self._folder / name).unlink()

    def close(self) -> None:
        """Release the files to the next process."""
        with self._mutex:
            if self._lock is not None:
                if not self._asleep and not self._running:
                    with suppress(OSError):
                        (self._folder / "lock").unlink()
                        self._folder.rmdir()
                os.close(self._lock)
                self._lock = None

    def _take_over(self) -> None:
        """Move files of processes that have ended here."""
        try:
            folders = [path for path in self._root.iterdir() if path.is_dir()]
        except OSError:
            return
        for folder in folders:
            with suppress(OSError):
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._move_from(folder)
                finally:
                    os.close(lock)
        self._expire()

    def _move_from(self, folder: Path) -> None:
        for path in list(folder.iterdir()):
            if _NAME.fullmatch(path.name) and path.is_file():
                self._make_folder()
                path.rename(self._folder / path.name)
                self._asleep.add(path.name)
            elif path.name != "lock":
                path.unlink()
        (folder / "lock").unlink()
        folder.rmdir()

    def _make_folder(self) -> None:
        if self._lock is not None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _expire(self) -> None:
        """Remove files that sleep for too long."""
        for name in list(self._asleep):
            try:
                age_s = self._clock() - (self._folder / name).stat().st_mtime
            except OSError:
                age_s = self._keep_s + 1
            if age_s > self._keep_s:
                self.remove(name)

    def _makes_room(self, n_bytes: int) -> bool:
        """Remove the oldest sleeping answers until one more fits; whether it does."""
        sizes: dict[str, tuple[float, int]] = {}
        for name in self._asleep | self._running:
            with suppress(OSError):
                stat = (self._folder / name).stat()
                sizes[name] = stat.st_mtime, stat.st_size
        n_all = sum(size for _, size in sizes.values())
        for name in sorted(sizes.keys() & self._asleep, key=sizes.__getitem__):
            if len(sizes) < self._max_files and n_all + n_bytes <= self._max_bytes:
                break
            n_all -= sizes.pop(name)[1]
            self.remove(name)
        fits = n_all + n_bytes <= self._max_bytes and n_bytes <= self._max_bytes // 4
        return fits and len(sizes) < self._max_files

    def _write(self, name: str, data: bytes) -> None:
        """Make a file; raises OSError."""
        self._make_folder()
        write_whole(self._folder / name, data, mode=0o600)

    def _append(self, name: str, line: Line) -> bool:
        """Append a line to a file; whether it was written."""
        data = self._encoded(name, line)
        with self._mutex:
            path = self._folder / name
            try:
                n_bytes = path.stat().st_size
                if n_bytes + len(data) > self._max_bytes // 4:
                    return False
                handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
                with os.fdopen(handle, "ab") as file:
                    file.write(data)
                return True
            except OSError as error:
                _log.warning("an answer is not kept over a restart: %s", error)
                return False

    def _lines(self, name: str) -> Iterator[Any]:
        """The whole lines of a file; raises OSError."""
        data = (self._folder / name).read_bytes()
        for line in data.split(b"\n")[:-1]:
            try:
                yield json.loads(self._decoded(name, line))
            except ValueError:
                return

    def _encoded(self, name: str, line: Line) -> bytes:
        """A line of a file: JSON, or that encrypted."""
        data = json.dumps(line, separators=(",", ":")).encode()
        if self._seal.is_on:
            data = base64.b64encode(self._seal.seal(data, f"asleep/{name}"))
        return data + b"\n"

    def _decoded(self, name: str, line: bytes) -> bytes:
        """The inverse of `_encoded`; raises ValueError."""
        if not self._seal.is_on:
            return line
        return self._seal.unseal(base64.b64decode(line, validate=True), f"asleep/{name}")

    def _read(self, name: str) -> Sleeper | None:
        """A file's answer; one that is none is removed."""
        try:
            first, *rest = list(self._lines(name)) or [None]
            asleep = None
            for line in rest:
                if "start" in line:
                    start = line["start"]
                    prompt, seed = [int(token) for token in start["prompt"]], int(start["seed"])
                    asleep = Asleep(prompt, seed)
                elif asleep is not None:
                    more = Written.from_json(line["written"])
                    asleep = Asleep(asleep.prompt, asleep.seed, asleep.written + more)
            if not isinstance(first["owner"], str) or not isinstance(first["model"], str):
                raise ValueError("no owner or model")
            return Sleeper(name, first, asleep)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("an answer that was put away cannot be read: %s", error)
            self.remove(name)
            return None
