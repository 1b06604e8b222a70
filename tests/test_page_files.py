from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from mlxkv import page_files, page_folder, page_room
from mlxkv.cache import STEP
from mlxkv.errors import UsageError
from mlxkv.page_files import ROOT, DiskLimits, PageFile, PageFiles, PageKey, page_name
from mlxkv.page_folder import Folder
from mlxkv.page_format import MAX_TOKENS, DamagedPage, decode, encode
from mlxkv.page_room import Stored, eviction_order
from tests.page_writer import (
    FINGERPRINT,
    chain,
    folder_bytes,
    frozen_bytes,
    leftovers,
    limits,
    same,
    stored_keys,
)

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of pages that does not exist yet."""
    return tmp_path / "kv"


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


def n_descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def miss_and_removed(root: Path, key: PageKey) -> bool:
    files = opened(root)
    known = key in files
    return known and files.read(key) is None and not path_of(root, key).exists()


# What a page is called, and what comes back


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
        "import sys, mlxkv.page_files, mlxkv.kv_names; "
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


# Damage


def test_a_page_cut_anywhere_is_a_miss_and_removed(root):
    page = chain(0, 1)[0]
    stored(root, [page])
    path = path_of(root, page.key)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 1}
    for n_bytes in sorted(cuts | set(range(0, len(whole), 41))):
        path.write_bytes(whole[:n_bytes])
        assert miss_and_removed(root, page.key), n_bytes
    for n_more in (1, 8, 4096):
        path.write_bytes(whole + bytes(n_more))
        assert miss_and_removed(root, page.key), n_more


def test_a_page_with_any_byte_changed_is_a_miss_and_removed(root):
    page = chain(0, 1, n_values=200)[0]
    files = stored(root, [page])
    path = path_of(root, page.key)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # The library fills the header up with blanks, which say nothing.
    blanks = range(len(whole[:header].rstrip(b" ")), header)
    rng = random.Random(0)
    for _ in range(600):
        at = rng.randrange(len(whole))
        if at in blanks:
            continue
        damaged = bytearray(whole)
        damaged[at] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        assert page.key in files
        assert files.read(page.key) is None, at
        assert not path.exists() and page.key not in files


def test_no_bit_of_a_header_changes_what_is_read():
    page = chain(0, 1)[0]
    whole = encode(page, FINGERPRINT)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in range(header):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            try:
                read, fingerprint = decode(bytes(damaged), page.key)
            except DamagedPage:
                continue
            assert same(read, page) and fingerprint == FINGERPRINT
            assert whole[at : at + 1] == b" "


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_bytes_of_any_kind_are_no_page_and_no_error(data, length):
    key = chain(0, 1)[0].key
    for whole in (
        data,
        length.to_bytes(8, "little") + data,
        len(data).to_bytes(8, "little") + data,
    ):
        with pytest.raises(DamagedPage):
            decode(whole, key)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_headers_of_any_kind_are_no_page_and_no_error(value):
    key = chain(0, 1)[0].key
    for raw in (value, {"__metadata__": value}, {"a": value}):
        text = json.dumps(raw).encode()
        with pytest.raises(DamagedPage):
            decode(len(text).to_bytes(8, "little") + text, key)


def test_headers_that_cannot_be_read_give_no_tokens_and_are_removed(root):
    page = chain(0, 1)[0]
    path = path_of(root, page.key)
    files = stored(root, [page])
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    huge = (1 << 62).to_bytes(8, "little") + whole[8:]
    for damaged in (
        b"",
        whole[:5],
        whole[: header - 20],
        huge,
        whole.replace(b"tokens", b"takens"),
    ):
        path.write_bytes(damaged)
        assert page.key in files
        assert files.tokens(page.key) is None
        assert not path.exists()


def rewritten(page: PageFile, **entries: str) -> bytes:
    """A page's file with other metadata, and a checksum that agrees with it."""
    from mlxkv import page_format

    whole = encode(page, FINGERPRINT)
    length = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + length])["__metadata__"] | entries
    metadata.pop("sha256")
    tensors = load(whole)
    return save(tensors, {**metadata, "sha256": page_format._checksum(metadata, tensors)})


def test_a_checksum_that_agrees_is_not_enough(root):
    page, other = chain(0, 2)
    path = path_of(root, page.key)
    stored(root, [page])
    assert decode(rewritten(page), page.key)[0].start == page.start
    wrong = {
        "older format": rewritten(page, format="0"),
        "newer format": rewritten(page, format="2"),
        "another model": rewritten(page, fingerprint="c" * 64),
        "the same beginning of a fingerprint": rewritten(page, fingerprint=FINGERPRINT[:-1] + "0"),
        "another parent": rewritten(page, parent="1" * 32),
        "another part": rewritten(page, part="window"),
        "other tokens": rewritten(page, tokens=rewritten_tokens(other)),
        "no position": rewritten(page, start="-1"),
        "position that is no number": rewritten(page, start="x"),
        "one entry more": rewritten(page, more="x"),
        "another page": encode(other, FINGERPRINT),
    }
    for what, data in wrong.items():
        path.write_bytes(data)
        assert miss_and_removed(root, page.key), what


def rewritten_tokens(page: PageFile) -> str:
    import base64

    return base64.b64encode(page.tokens).decode()


def test_a_file_under_another_name_is_a_miss_and_removed(root):
    page, other = chain(0, 2, parts=("full",))
    stored(root, [page])
    names = [
        PageKey(page.key.parent, "1" * 32, 256, "full"),
        PageKey("1" * 32, page.key.name, 256, "full"),
        PageKey(page.key.parent, page.key.name, 255, "full"),
        PageKey(page.key.parent, page.key.name, 256, "window"),
        other.key,
    ]
    for name in names:
        path_of(root, name).write_bytes(path_of(root, page.key).read_bytes())
        assert miss_and_removed(root, name), name


def test_a_file_of_another_models_folder_is_a_miss_and_removed(root):
    page = chain(0, 1)[0]
    stored(root, [page])
    files = PageFiles(root, "c" * 64, limits())
    folder = root / "pages" / ("c" * 32)
    folder.mkdir()
    (folder / page.key.file_name).write_bytes(path_of(root, page.key).read_bytes())
    assert page.key in files and files.read(page.key) is None
    assert not (folder / page.key.file_name).exists()


def test_what_is_no_plain_file_is_a_miss_and_leads_nowhere(root, tmp_path):
    page, second = chain(0, 2)
    stored(root, [page, second])
    path = path_of(root, page.key)
    path.unlink()
    path.symlink_to(path_of(root, second.key))
    assert miss_and_removed(root, page.key) and path_of(root, second.key).exists()
    os.mkfifo(path)
    assert miss_and_removed(root, page.key)
    with path.open("wb") as file:
        file.truncate(1 << 42)
    assert miss_and_removed(root, page.key)
    path.mkdir()
    files = opened(root)
    n_open = n_descriptors()
    assert files.read(page.key) is None and files.tokens(page.key) is None
    assert n_descriptors() == n_open


def test_a_sector_that_cannot_be_read_is_damage(root, monkeypatch):
    page = chain(0, 1)[0]
    files = stored(root, [page])

    class Bad:
        def __init__(self, handle: int, *_: object, **__: object):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *_: object):
            os.close(self.handle)

        def readall(self) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(page_folder.os, "fdopen", Bad)
    assert files.read(page.key) is None
    assert not path_of(root, page.key).exists()


def test_a_page_that_cannot_be_opened_now_is_a_miss_and_stays(root, monkeypatch):
    page = chain(0, 1)[0]
    files = stored(root, [page])

    def refuse(*_: object):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(page_folder.os, "open", refuse)
        assert files.read(page.key) is None
    assert same(files.read(page.key), page)


# Whose it is, and how it is written


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
    monkeypatch.setattr(page_folder.os, "write", write_slowly)
    stored(root, chain(0, 3, n_values=2000))
    assert seen == [True] * 3


def test_only_named_kv_is_synced(root, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(page_folder.os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    files = stored(root, chain(0, 2))
    assert synced == []
    files.write(chain(1, 2), keep=True)
    files.flush()
    assert len(synced) == 2 + 3  # two pages; their folder, the one above it, and the root
    synced.clear()
    files.write(chain(0, 2), keep=True)  # here already, but so far a power cut could have taken it
    files.flush()
    assert len(synced) == 2 + 3


def test_named_kv_is_written_again_where_the_page_that_is_there_is_damaged(root):
    pages = chain(0, 3)
    files = stored(root, pages)
    path = path_of(root, pages[1].key)
    path.write_bytes(path.read_bytes()[:-1])
    files.write(pages, keep=True)
    files.flush()
    assert all(same(opened(root).read(page.key), page) for page in pages)


# Bounds


def test_everything_in_the_folder_stays_under_the_cap(root):
    cap = 600_000
    files = opened(root, cap)
    for seed in range(40):
        files.write(chain(seed, 3, n_values=5_000))
        files.flush()
        assert folder_bytes(root) <= cap
    usage = files.usage()
    assert usage.n_bytes >= folder_bytes(root) and usage.n_bytes <= cap
    assert usage.n_pages == len(stored_keys(root)) >= 20
    assert all(same(files.read(page.key), page) for page in chain(39, 3, n_values=5_000))
    assert all(page.key not in files for page in chain(0, 3, n_values=5_000))
    assert usage.refused == {}


def test_what_others_put_there_counts_against_the_cap(root):
    files = stored(root, chain(0, 1), cap=1 << 20)
    (root / "names" / "big.json").write_bytes(b"\0" * 950_000)
    pages = chain(1, 20, n_values=2_000)
    files.write(pages)
    files.flush()
    assert folder_bytes(root) <= 1 << 20
    assert 0 < len(stored_keys(root)) < 20
    assert files.usage().refused["cap"] > 0


def test_two_processes_together_stay_under_the_cap(root):
    cap = 1_000_000
    command = [sys.executable, "-m", "tests.page_writer", "write", str(root), "80", str(cap)]
    writers = [
        subprocess.Popen(
            [*command, str(seed)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
        )
        for seed in (1, 2)
    ]
    most = n_looks = 0
    while all(writer.poll() is None for writer in writers):
        most = max(most, frozen_bytes(root, [writer.pid for writer in writers]))
        n_looks += 1
        time.sleep(0.002)
    refused = [json.loads(writer.communicate()[0]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0] and refused == [{}, {}]
    assert n_looks > 20 and cap // 2 < most <= cap and folder_bytes(root) <= cap
    files = opened(root)
    assert all(files.read(key) is not None for key in stored_keys(root))
    assert leftovers(root) == []


def test_a_cap_that_was_lowered_is_kept_from_the_next_write_on(root):
    stored(root, chain(0, 30, n_values=5_000))
    files = stored(root, chain(1, 1), cap=400_000)
    assert folder_bytes(root) <= 400_000
    assert same(files.read(chain(1, 1)[0].key), chain(1, 1)[0])


def test_a_cap_too_small_for_anything_makes_no_folder(root):
    files = opened(root, 10_000)
    assert files.write(chain(0, 1)) == 0
    files.close()
    assert not root.exists() and files.usage().refused == {"cap": 1}


def test_a_page_is_not_written_where_those_before_it_were_refused(root, monkeypatch):
    trunk = chain(0, 2, n_values=100_000)
    leaf = chain(1, 1, after=trunk[-1], tip=3)
    files = opened(root, 700_000)
    files.write([*trunk, *leaf])
    files.flush()
    assert [key.name for key in stored_keys(root)] == [trunk[0].key.name]
    assert files.usage().refused == {"cap": 2}
    assert trunk[1].key not in files and leaf[0].key not in files
    assert files.children(trunk[0].key.name) == []


def test_free_space_is_left_on_the_file_system(root, monkeypatch):
    system = SimpleNamespace(f_bavail=1000, f_frsize=4096, f_blocks=10_000)
    monkeypatch.setattr(page_folder, "file_system", lambda _: system)
    files = PageFiles(root, FINGERPRINT, limits(free=900 * 4096))
    pages = chain(0, 40, n_values=2_000)
    files.write(pages)
    files.flush()
    size = page_room.reserved_bytes(pages[0].bound_bytes)
    assert len(stored_keys(root)) == 100 * 4096 // size
    refused = 40 - len(stored_keys(root))
    assert files.usage().refused == {"free space": refused}
    system.f_bavail = 899
    files.write(chain(1, 1))
    files.flush()
    assert files.usage().refused == {"free space": refused + 1}


def test_no_more_than_the_budget_is_written_in_a_day(root, monkeypatch):
    pages = chain(0, 12, n_values=2_000)
    budget = 5 * page_room.reserved_bytes(pages[0].bound_bytes)
    files = PageFiles(root, FINGERPRINT, limits(daily=budget))
    files.write(pages[:3])
    files.flush()
    again = PageFiles(root, FINGERPRINT, limits(daily=budget))  # another process, the same day
    again.write(pages[3:])
    again.flush()
    assert len(stored_keys(root)) == 5 and again.usage().refused == {"daily budget": 7}
    assert again.usage().written_today_bytes == budget
    again.write(chain(1, 2), keep=True)
    again.flush()
    assert len(stored_keys(root)) == 7, "named KV was asked for"
    tomorrow = time.time() + 86_400
    monkeypatch.setattr(page_folder.time, "time", lambda: tomorrow)
    assert again.usage().written_today_bytes == 0
    again.write(pages[5:])
    again.flush()
    assert len(stored_keys(root)) == 12


def test_a_damaged_budget_file_is_an_empty_one(root):
    files = stored(root, chain(0, 1))
    for text in ("", "[]", '{"day": 1}', '{"day": 1, "bytes": "x"}', "\0"):
        (root / "written.json").write_text(text)
        assert files.usage().written_today_bytes == 0
    files.write(chain(1, 1))
    files.flush()
    assert files.usage().written_today_bytes > 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_no_error_and_leaves_nothing_half(root, monkeypatch, code):
    files = stored(root, chain(0, 1))
    n_left = [4]

    def fill(handle: int, data: memoryview) -> int:
        n_left[0] -= 1
        if n_left[0] < 0:
            raise OSError(code, os.strerror(code))
        return os_write(handle, data[: len(data) // 2 + 1])

    os_write = os.write
    pages = chain(1, 5)
    with monkeypatch.context() as patch:
        patch.setattr(page_folder.os, "write", fill)
        files.write(pages)
        files.flush()
    assert leftovers(root) == []
    assert files.usage().refused == {f"disk: {os.strerror(code)}": 5}
    assert [page.key in files for page in pages] == [False] * 5
    files.write(pages)
    files.flush()
    assert all(same(files.read(page.key), page) for page in pages)


def test_a_read_only_folder_is_no_error(root, monkeypatch):
    pages = chain(0, 3)
    stored(root, pages)
    os_open = os.open

    def read_only(path: str | Path, flags: int, *mode: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return os_open(path, flags, *mode)

    def refuse(*_: object, **__: object):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(page_folder.os, "open", read_only)
    for name in ("unlink", "utime", "rename"):
        monkeypatch.setattr(os, name, refuse)
    files = opened(root)
    assert all(same(files.read(page.key), page) for page in pages)
    files.used([page.key for page in pages])
    files.write(chain(1, 2))
    files.close()
    assert files.usage().refused == {"disk: Read-only file system": 2}
    files.remove(pages[0].key)


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    files = PageFiles(tmp_path / "file" / "kv", FINGERPRINT, limits())
    files.write(chain(0, 2))
    files.close()
    assert files.usage().refused == {"disk: Not a directory": 2}
    assert files.read(chain(0, 2)[0].key) is None


def test_a_process_that_stopped_while_it_held_the_lock_is_not_waited_for_long(root, monkeypatch):
    monkeypatch.setattr(page_files, "LOCK_WAIT_S", 0.05)
    files = stored(root, chain(0, 1))
    with Folder(root, limits()).locked(1):
        files.write(chain(1, 2))
        files.flush()
    assert files.usage().refused == {"another process holds the folder": 2}
    assert chain(1, 2)[0].key not in files


def test_a_full_queue_refuses_pages_and_makes_named_kv_wait(root, monkeypatch):
    pages = chain(0, 6)
    monkeypatch.setattr(page_files, "QUEUE_BYTES", 2 * pages[0].nbytes)
    files = opened(root)
    Folder(root, limits()).root.mkdir()
    taken = []

    def offered():
        for page in pages:
            taken.append(page)
            yield page

    with Folder(root, limits()).locked(1):
        assert files.write(offered()) == 2 * pages[0].nbytes
        assert len(taken) == 3, "no page is computed that there is no room for"
        waiting = threading.Thread(target=lambda: files.write(pages, keep=True))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join()
    files.close()
    assert len(stored_keys(root)) == 6 and files.usage().refused == {"queue": 1}


def test_closing_twice_and_writing_after_it_is_no_error(root):
    files = stored(root, chain(0, 1))
    files.close()
    files.close()
    assert files.write(chain(1, 1)) == 0
    files.flush()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_writer_that_died(root, monkeypatch):
    files = stored(root, chain(0, 1))

    def fail(*_: object):
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patch:
        patch.setattr(page_files, "encode", fail)
        files.write(chain(1, 2))
        files.flush()
    assert files.usage().refused == {"internal error": 2}
    files.write(chain(1, 2))
    files.close()
    assert len(stored_keys(root)) == 3


def test_leftovers_of_a_dead_process_go_at_the_next_start(root):
    stored(root, chain(0, 1))
    (root / "tmp" / "1-2-3").write_bytes(b"\0" * 100_000)
    before = opened(root, 1).usage().n_bytes
    assert before > 100_000, "they count until then"
    opened(root)
    assert leftovers(root) == []


def test_what_a_living_process_is_writing_does_not_go(root):
    stored(root, chain(0, 1))
    with Folder(root, limits()).locked(1):
        (root / "tmp" / "1-2-3").write_bytes(b"\0")
        opened(root)
        assert leftovers(root) == ["1-2-3"]


def test_a_lock_file_that_was_deleted_does_not_let_two_in(root):
    stored(root, chain(0, 1))
    with Folder(root, limits()).locked(1):
        (root / "lock").unlink()
        with Folder(root, limits()).locked(1):
            pass
        new = Folder(root, limits())
        with new.locked(1), pytest.raises(TimeoutError), Folder(root, limits()).locked(0):
            pass


def test_a_process_that_dies_gives_the_lock_back(root):
    code = (
        "import sys, time; from pathlib import Path; from mlxkv.page_folder import Folder; "
        "from tests.page_writer import limits\n"
        f"with Folder(Path({str(root)!r}), limits()).locked(1):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(TimeoutError), Folder(root, limits()).locked(0.02):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with Folder(root, limits()).locked(5):
        pass


# Limits of a machine


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (100 * GIB, DiskLimits(10 * GIB, 5 * GIB, 10 * GIB)),
        (8000 * GIB, DiskLimits(64 * GIB, 20 * GIB, 800 * GIB)),
    ],
)
def test_limits_follow_the_file_system(monkeypatch, root, size, expected):
    monkeypatch.delenv("MLXKV_KV_DISK", raising=False)
    system = SimpleNamespace(f_frsize=1024, f_blocks=size // 1024)
    monkeypatch.setattr(page_room, "file_system", lambda _: system)
    assert DiskLimits.for_folder(root) == expected


@pytest.mark.parametrize(
    ("text", "cap"), [("20GiB", 20 * GIB), ("500MB", 500_000_000), ("0", 0), (" 0 ", 0)]
)
def test_the_cap_can_be_chosen(monkeypatch, root, text, cap):
    monkeypatch.setenv("MLXKV_KV_DISK", text)
    assert DiskLimits.for_folder(root / "not" / "there").cap_bytes == cap


@pytest.mark.parametrize("text", ["much", "-1", "0x10", "20 QiB"])
def test_a_cap_that_is_no_size_is_an_error_that_names_the_variable(monkeypatch, root, text):
    monkeypatch.setenv("MLXKV_KV_DISK", text)
    with pytest.raises(UsageError, match="MLXKV_KV_DISK must be a size like 20GiB"):
        DiskLimits.for_folder(root)


# What goes first


def entries(pages: Sequence[PageFile], used: int, model: str = "m") -> list[Stored]:
    return [Stored(model, page.key, 10, used) for page in pages]


def order(
    pages: Sequence[Stored],
    near: int | None = 0,
    wanted: Sequence[Stored] = (),
    named: dict[tuple[str, str], bool] | None = None,
) -> list[PageKey]:
    return [page.key for page in eviction_order(pages, wanted, {"m": near}, named or {})]


def keys(*pages: PageFile) -> list[PageKey]:
    return [page.key for page in pages]


def test_the_least_recently_used_goes_first_and_a_chain_from_its_end():
    old, new = chain(0, 3), chain(1, 2)
    assert order(entries(new, 5) + entries(old, 4)) == keys(*old[::-1], *new[::-1])


def test_a_trunk_counts_as_used_when_a_page_behind_it_was():
    trunk = chain(0, 2)
    leaf, other = chain(1, 1, after=trunk[-1]), chain(2, 2)
    pages = entries(trunk, 1) + entries(leaf, 9) + entries(other, 5)
    assert order(pages) == keys(*other[::-1], *leaf, *trunk[::-1])


def test_of_one_page_the_window_part_goes_first():
    pages = chain(0, 2, parts=("full", "window"))
    full, window = pages[::2], pages[1::2]
    assert order(entries(pages, 1), near=9) == keys(window[1], full[1], window[0], full[0])


@pytest.mark.parametrize("near", [0, 1, 2])
def test_window_parts_that_no_tip_or_fork_needs_go_before_all_else(near):
    trunk = chain(0, 6, parts=("full", "window"))
    fork = trunk[5]  # the window part of the third page: two go on behind it
    branch = chain(1, 4, parts=("full", "window"), after=fork)
    windows, branch_windows = trunk[1::2], branch[1::2]
    first = order(entries(trunk, 1) + entries(branch, 9), near=near)
    expected = [
        *windows[3 : 5 - near],  # in front of one tip: the least recently used
        *branch_windows[: 3 - near],  # in front of the other
        *windows[: 2 - near],  # in front of the fork: used as lately as what is behind it
    ]
    n = len(expected)
    assert set(first[:n]) == set(keys(*expected))
    assert all(key.part == "full" or key in keys(*windows, *branch_windows) for key in first[n:])
    assert first[:n][: len(windows[3 : 5 - near])] == keys(*windows[3 : 5 - near][::-1])


def test_window_parts_of_a_model_whose_reach_is_not_known_are_all_needed():
    pages = chain(0, 3, parts=("full", "window"))
    assert order(entries(pages, 1), near=None) == order(entries(pages, 1), near=99)


def test_named_kv_goes_last_and_pinned_never():
    plain, named, pinned = chain(0, 1), chain(1, 2), chain(2, 2)
    names = {("m", page.key.file_name): False for page in named}
    names |= {("m", page.key.file_name): True for page in pinned}
    pages = entries(pinned, 1) + entries(named, 2) + entries(plain, 99)
    assert order(pages, named=names) == keys(*plain, *named[::-1])
    other_model = entries(chain(1, 1), 1, model="n")
    assert order(other_model, named=names) == keys(*chain(1, 1))


def test_what_is_written_does_not_push_out_what_it_continues():
    trunk = chain(0, 3, parts=("full", "window"))
    leaf, other = chain(1, 1, after=trunk[-1]), chain(2, 1)
    gone = order(entries(trunk, 1) + entries(other, 5), near=0, wanted=entries(leaf, 9))
    far = [page for page in trunk if page.key.part == "window"][::-1]
    assert gone == keys(*far, *other), "only window parts that it does not need"


def test_pages_whose_trunk_is_gone_and_names_in_a_circle_are_ordered_too():
    pages = chain(0, 4)
    circle = [
        Stored("m", PageKey("a" * 32, "b" * 32, 256, "full"), 1, 3),
        Stored("m", PageKey("b" * 32, "a" * 32, 256, "full"), 1, 4),
        Stored("m", PageKey("c" * 32, "c" * 32, 256, "full"), 1, 5),
    ]
    some = order(entries(pages[2:], 1) + circle, wanted=circle[2:])
    assert some == [*keys(*pages[2:][::-1]), circle[0].key, circle[1].key]


@given(st.data())
def test_every_page_goes_before_those_it_continues_whatever_their_times(data):
    pages: list[PageFile] = []
    for seed in range(data.draw(st.integers(1, 12))):
        after = data.draw(st.sampled_from([None, *pages]))
        pages += chain(seed, 1, after=after)
    used = [data.draw(st.integers(0, 5)) for _ in pages]
    stored = [Stored("m", page.key, 1, at) for page, at in zip(pages, used, strict=True)]
    gone = order(stored)
    place = {key.name: i for i, key in enumerate(gone)}
    assert sorted(place) == sorted(page.key.name for page in pages)
    for page in pages:
        if page.key.parent != ROOT:
            assert place[page.key.name] < place[page.key.parent]


def test_pages_that_were_used_stay_and_the_others_go(root):
    a, b = chain(0, 3, n_values=5_000), chain(1, 3, n_values=5_000)
    files = stored(root, [*a, *b])
    aged(root, a, 100)
    aged(root, b, 50)
    files.used([page.key for page in a])
    small = opened(root, folder_bytes(root) + 40_000)
    small.write(chain(2, 2, n_values=5_000))
    small.flush()
    gone = [page for page in (*a, *b) if not path_of(root, page.key).exists()]
    assert gone and gone == b[-len(gone) :]


def test_how_far_windows_reach_is_known_to_other_processes(root):
    pages = chain(0, 6, parts=("full", "window"), n_values=5_000)
    stored(root, pages, window_pages=1)
    other = PageFiles(root, "c" * 64, limits(folder_bytes(root) + 40_000))
    other.write(chain(1, 2, n_values=5_000))
    other.flush()
    gone = [page.key for page in pages if not path_of(root, page.key).exists()]
    far = [page.key for page in pages if page.key.part == "window"][:4]
    assert gone and set(gone) <= set(far)


def test_pinned_pages_stay_and_new_ones_are_refused_instead(root):
    pages = chain(0, 8, n_values=5_000)
    files = stored(root, pages)
    manifest = {"fingerprint": FINGERPRINT, "pinned": True,
                "keys": [page.key.file_name for page in pages]}  # fmt: skip
    (root / "names" / "a.json").write_text(json.dumps(manifest))
    small = opened(root, folder_bytes(root))
    small.write(chain(1, 2, n_values=5_000))
    small.flush()
    assert small.usage().refused == {"cap": 2}
    assert all(same(files.read(page.key), page) for page in pages)
    (root / "names" / "a.json").write_text(json.dumps(manifest | {"pinned": False}))
    small.write(chain(1, 2, n_values=5_000))
    small.flush()
    assert all(page.key in stored_keys(root) for page in chain(1, 2, n_values=5_000))
