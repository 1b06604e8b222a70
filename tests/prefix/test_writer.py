from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlxkv.base import time_machine
from mlxkv.kv.types import STEP
from mlxkv.prefix.on_disk import folder
from mlxkv.prefix.on_disk.folder import Folder
from mlxkv.prefix.on_disk.format import MAX_TOKENS, ROOT, PageFile, PageKey, encode, page_name
from mlxkv.prefix.on_disk.writer import PageFiles
from tests.support.page_writer import chain, leftovers, limits, opened, path_of, same, stored


def test_a_page_is_named_by_the_chain_of_all_tokens_up_to_its_end():
    first, second = b"\1\0\0\0" * 256, b"\2\0\0\0" * 3
    name = hashlib.sha256(b"0" * 32 + first).hexdigest()[:32]
    assert page_name(ROOT, first) == name
    assert page_name(name, second) == hashlib.sha256(name.encode() + second).hexdigest()[:32]


def test_a_page_is_a_step_of_the_cache():
    assert MAX_TOKENS == STEP


def test_file_names_are_parsed_back_and_others_are_not():
    key = PageKey(ROOT, "ab" * 16, 7, "window")
    assert key.file_name == f"{ROOT}.{'ab' * 16}.007.window.safetensors"
    assert PageKey.parse(key.file_name) == key
    bad = ["000", "257", "1000"]
    others = [key.file_name.replace(".007.", f".{n}.") for n in bad]
    others += [key.file_name + "x", "x" + key.file_name, key.file_name.replace("window", "half")]
    assert [PageKey.parse(name) for name in others] == [None] * len(others)


def test_no_module_of_the_disk_half_loads_mlx():
    code = (
        "import sys, mlxkv.prefix.on_disk.writer, mlxkv.saved_kv.registry; "
        "sys.exit(any(name.split('.')[0] == 'mlx' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("restart", [False, True])
def test_what_was_written_comes_back_bit_for_bit(root, restart):
    pages = chain(0, 4, parts=("full", "window"), tip=19)
    files = stored(root, pages)
    files = opened(root) if restart else files
    assert all(same(files.read(page.key), page) for page in pages)
    assert all(files.tokens(page.key) == page.tokens for page in pages)
    assert all(page.key in files for page in pages)


def test_every_dtype_and_layout_comes_back_bit_for_bit(root):
    tokens = b"\0" * 4
    key = PageKey(ROOT, page_name(ROOT, tokens), 1, "full")
    bits = np.arange(48, dtype=np.uint32).reshape(2, 3, 8) * 90_000_001
    tensors = {
        "nan payloads": (bits | 0x7F800001).view(np.float32),
        "half": bits.astype(np.uint16).view(np.float16),
        "packed": bits,
        "bytes": bits.view(np.uint8),
        "transposed": bits.astype(np.uint16).transpose(2, 0, 1),
        "strided": bits.astype(np.uint16)[:, :, ::2],
        "empty": np.zeros((1, 0, 4), np.float32),
        "scalar": np.array(3.5, np.float32),
    }
    page = PageFile(key, 0, tokens, tensors, dict.fromkeys(tensors, "uint32"))
    stored(root, [page])
    read = opened(root).read(key)
    assert read is not None
    for name, array in tensors.items():
        assert read.tensors[name].shape == array.shape
        assert read.tensors[name].dtype == array.dtype
        assert read.tensors[name].tobytes() == np.ascontiguousarray(array).tobytes()


def test_a_page_that_waits_for_the_writer_is_served_from_memory(root):
    files = stored(root, chain(0, 1))
    pages = chain(1, 2)
    with Folder(root, limits()).locked(1):
        files.write(pages)
        assert all(page.key in files for page in pages)
        assert same(files.read(pages[1].key), pages[1])
        assert files.tokens(pages[1].key) == pages[1].tokens
        assert files.children(pages[0].key.name) == [(pages[1].key.name, 256)]
        assert not path_of(root, pages[1].key).exists()
    files.flush()
    assert path_of(root, pages[1].key).exists()


def test_children_are_what_is_known_behind_a_page(root):
    trunk = chain(0, 2, parts=("full", "window"))
    forks = [chain(seed, 1, after=trunk[-1], tip=5 + seed) for seed in (1, 2)]
    files = stored(root, [*trunk, *forks[0], *forks[1]])
    for each in (files, opened(root)):
        assert each.children(ROOT) == [(trunk[0].key.name, 256)]
        expected = {(fork[0].key.name, fork[0].key.n_tokens) for fork in forks}
        assert set(each.children(trunk[-1].key.name)) == expected
        assert each.children("f" * 32) == []


def test_pages_of_another_process_are_seen_and_those_it_evicted_forgotten(root):
    first, second = opened(root), opened(root)
    pages = chain(0, 2)
    assert pages[0].key not in second
    first.write(pages)
    first.flush()
    assert pages[1].key in second and same(second.read(pages[1].key), pages[1])
    path_of(root, pages[1].key).unlink()
    assert second.read(pages[1].key) is None
    assert pages[1].key not in second
    assert second.children(pages[0].key.name) == []


def test_what_is_there_already_is_not_written_again(root):
    pages = chain(0, 3)
    files = stored(root, pages)
    before = [path_of(root, page.key).stat().st_ino for page in pages]
    charged = files.usage().written_today_bytes
    assert files.write(pages) == 0
    other = opened(root)
    assert other.write(pages) == 0
    other.flush()
    assert [path_of(root, page.key).stat().st_ino for page in pages] == before
    assert other.usage().written_today_bytes == charged


def test_two_models_do_not_see_each_other(root):
    page = chain(0, 1)[0]
    stored(root, [page])
    other = PageFiles(root, "c" * 64, limits())
    assert page.key not in other and other.read(page.key) is None
    assert same(opened(root).read(page.key), page)


def test_a_folder_that_is_only_read_is_not_made(root):
    files = opened(root)
    assert chain(0, 1)[0].key not in files
    files.close()
    assert not root.exists()


def test_removed_pages_are_gone(root):
    pages = chain(0, 2)
    files = stored(root, pages)
    files.remove(pages[1].key)
    files.remove(PageKey(ROOT, "f" * 32, 256, "full"))
    assert pages[1].key not in files and not path_of(root, pages[1].key).exists()
    assert same(files.read(pages[0].key), pages[0])


def test_files_and_folders_are_the_users_alone(root):
    before = os.umask(0)
    try:
        files = stored(root, chain(0, 2))
        files.close()
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [root, *root.rglob("*")]}
    assert len(modes) >= 9
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_a_page_appears_complete_or_not_at_all(root, monkeypatch):
    seen = []
    put = Folder.put

    def watch(self: Folder, path: Path, data: bytes, **kwargs: bool):
        put(self, path, data, **kwargs)
        if path.suffix == ".safetensors":
            seen.append(path.read_bytes() == data and leftovers(root) == [])

    def write_slowly(handle: int, data: memoryview) -> int:
        assert all(path.stat().st_size > 1000 for path in root.rglob("*.safetensors"))
        return os_write(handle, data[:1000])

    os_write = os.write
    monkeypatch.setattr(Folder, "put", watch)
    monkeypatch.setattr(folder.os, "write", write_slowly)
    stored(root, chain(0, 3, n_values=2000))
    assert seen == [True] * 3


def test_only_named_kv_is_synced(root, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(folder.os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    files = stored(root, chain(0, 2))
    assert synced == []
    files.write(chain(1, 2), keep=True)
    files.flush()
    assert len(synced) == 2 + 3  # two pages; their folder, the one above it, and the root
    synced.clear()
    files.write(chain(0, 2), keep=True)  # here already, but so far a power cut could have taken it
    files.flush()
    assert len(synced) == 2 + 3


def test_on_macos_the_drives_cache_is_emptied_after_the_pages_of_a_name(root, monkeypatch):
    synced = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: synced.append(command))
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append("fsync"))
    files = stored(root, chain(0, 2))
    assert synced == []
    files.write(chain(1, 2), keep=True)
    files.flush()
    assert synced == ["fsync"] * 2 + [51] * 3  # two pages; their folder, the one above, the root
    synced.clear()
    files.write(chain(1, 2), keep=True)  # here already
    files.flush()
    assert synced == ["fsync"] * 2 + [51] * 3


def test_pages_are_kept_out_of_backups_and_names_are_not(root, monkeypatch):
    excluded = []
    monkeypatch.setattr(time_machine, "exclude", excluded.append)
    files = stored(root, chain(0, 2))
    assert excluded == [root / "pages", root / "tmp"]
    files.write(chain(1, 2))
    files.flush()
    assert excluded == [root / "pages", root / "tmp"]  # once a process is enough
    opened(root)
    assert excluded == [root / "pages", root / "tmp"] * 2  # a folder of an earlier version, too


def test_named_kv_is_written_again_where_the_page_that_is_there_is_damaged(root):
    pages = chain(0, 3)
    files = stored(root, pages)
    path = path_of(root, pages[1].key)
    path.write_bytes(path.read_bytes()[:-1])
    files.write(pages, keep=True)
    files.flush()
    assert all(same(opened(root).read(page.key), page) for page in pages)


def test_named_kv_is_written_again_where_another_models_page_lies(root):
    page = chain(0, 1)[0]
    files = stored(root, [page])
    path_of(root, page.key).write_bytes(encode(page, "c" * 64))
    files.write([page], keep=True)
    files.flush()
    assert same(opened(root).read(page.key), page)
