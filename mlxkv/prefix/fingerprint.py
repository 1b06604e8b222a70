"""A hash of all that KV depends on: the bytes of the weights and of config.json, adapters, the
compute dtype, the layout of the KV and the format of the files.

The weights are read once: their hash is kept until the files' sizes, times or inodes change.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxkv.base import durable, regular
from mlxkv.checkpoint.weights import open_weights
from mlxkv.errors import CheckpointError
from mlxkv.kv.types import layout_of
from mlxkv.prefix.on_disk.format import FORMAT_VERSION

BLOCK_BYTES = 64 << 20
"""Bytes that one thread hashes at a time. The hash depends on it."""
_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 8
_STALE_S = 600.0
"""Age from which a temporary file is one of a dead process."""
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"

Signature = list[list[str | int]]
"""[name, size, mtime_ns, ctime_ns, inode] of each file that the hash depends on."""


def fingerprint(
    model_dir: Path, *, dtype: str, kv_type: str, cache: Path, adapters: str = ""
) -> str:
    """Hex SHA-256 of all that KV depends on: equal for a copy, different for any changed byte.

    Args:
        model_dir: a model directory.
        dtype: MLX's name of the dtype that it computes in.
        kv_type: format of the KV, by layer or for all.
        cache: JSON file that keeps the hashes of directories; need not exist or be writable.
        adapters: names those that change the model, `nn.model.CausalLM.adapter_key`.

    Raises:
        ModelNotFound: no weights in the directory.
        CheckpointError: a file cannot be read, or its header is wrong.
    """
    directory = str(model_dir.resolve())
    signature = _signature(model_dir)
    content = _recall(cache, directory, signature)
    if content is None:
        before = time.time_ns()
        content = _content(model_dir)
        if signature == _signature(model_dir) and _settled(signature, before):
            _remember(cache, directory, signature, content)
    parts = [FORMAT_VERSION, content, dtype, layout_of(kv_type)]
    parts += [adapters] if adapters else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _signature(model_dir: Path) -> Signature:
    """The signature of every file that the hash may depend on.

    The inode and the status change time show a replacement, or a change, with the same size and
    modification time.
    """
    found: Signature = []
    try:
        with os.scandir(model_dir) as entries:
            for entry in entries:
                if entry.name.endswith(".safetensors") or entry.name in (_INDEX, _CONFIG):
                    about = entry.stat()
                    times = about.st_mtime_ns, about.st_ctime_ns
                    found.append([entry.name, about.st_size, *times, about.st_ino])
    except OSError:
        return []  # opening the weights says what is wrong
    return sorted(found, key=lambda entry: str(entry[0]))


def _settled(signature: Signature, before_ns: int) -> bool:
    """Whether a later change of any file would show in its times.

    A file that changes twice within one tick of its file system's clock has the same times after
    both. The tick is some milliseconds, or up to two seconds where all times are whole seconds.
    """
    times = [int(value) for entry in signature for value in entry[2:4]]
    coarse = all(value % 1_000_000_000 == 0 for value in times)
    return max(times, default=0) < before_ns - (2_000_000_000 if coarse else 20_000_000)


def _content(model_dir: Path) -> str:
    """Hash of the hashes of all blocks of all files that the model uses."""
    files = sorted({*open_weights(model_dir).files, model_dir / _CONFIG})
    try:
        blocks = [
            (file, start, min(BLOCK_BYTES, size - start))
            for file in files
            for size in [file.stat().st_size]
            for start in range(0, max(size, 1), BLOCK_BYTES)
        ]
        # Hashing and reading both let go of the interpreter's lock.
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            hashes = list(pool.map(lambda block: _hash(*block), blocks))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error
    parts = [
        [file.name, start, n_bytes, digest]
        for (file, start, n_bytes), digest in zip(blocks, hashes, strict=True)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _hash(file: Path, start: int, n_bytes: int) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    with regular.open_file(file) as opened:
        opened.seek(start)
        while n_bytes:
            view = memoryview(buffer)[: min(n_bytes, _CHUNK_BYTES)]
            n_read = opened.readinto(view)
            if not n_read:
                raise CheckpointError(f"{file}: shrank while it was read")
            digest.update(view[:n_read])
            n_bytes -= n_read
    return digest.hexdigest()


def _recall(cache: Path, directory: str, signature: Signature) -> str | None:
    entry = _load(cache).get(directory)
    if not isinstance(entry, dict) or entry.get("files") != signature:
        return None
    content = entry.get("content")
    return content if isinstance(content, str) and len(content) == 64 else None


def _load(cache: Path) -> dict[str, Any]:
    try:
        raw = json.loads(regular.read_bytes(cache))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _remember(cache: Path, directory: str, signature: Signature, content: str) -> None:
    """Add an entry, and drop those of removed directories; ignores errors, which only cost time."""
    entries: Mapping[str, Any] = {
        name: entry for name, entry in _load(cache).items() if Path(name).is_dir()
    }
    entries = {**entries, directory: {"files": signature, "content": content}}
    with suppress(OSError):
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for other in cache.parent.glob(f".{cache.name}.*"):
            if other.stat().st_mtime < time.time() - _STALE_S:
                other.unlink()
        durable.write_whole(cache, json.dumps(entries), mode=0o600)
