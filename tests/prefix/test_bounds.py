from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxkv.errors import UsageError
from mlxkv.prefix import eviction
from mlxkv.prefix.eviction import DiskLimits
from mlxkv.prefix.on_disk import folder
from mlxkv.prefix.on_disk import writer as page_files
from mlxkv.prefix.on_disk.folder import Folder
from mlxkv.prefix.on_disk.writer import PageFiles
from tests.support.page_writer import (
    FINGERPRINT,
    chain,
    folder_bytes,
    frozen_bytes,
    leftovers,
    limits,
    opened,
    same,
    stored,
    stored_keys,
)
from tests.support.paths import ROOT

GIB = 1 << 30


def test_everything_in_the_folder_stays_under_the_cap(root):
    cap = 600_000
    files = opened(root, cap)
    for seed in range(40):
        files.write(chain(seed, 3, n_values=5_000))
        files.flush()
        assert folder_bytes(root) <= cap
    usage = files.usage()
    assert usage.n_bytes >= folder_bytes(root) and usage.n_bytes <= cap
    assert usage.n_pages == len(stored_keys(root)) >= 10
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
    command = [
        sys.executable,
        "-m",
        "tests.support.page_writer",
        "write",
        str(root),
        "80",
        str(cap),
    ]
    writers = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, cwd=ROOT) for seed in (1, 2)
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
    trunk = chain(0, 2, n_values=50_000)
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
    monkeypatch.setattr(folder, "file_system", lambda _: system)
    files = PageFiles(root, FINGERPRINT, limits(free=900 * 4096))
    pages = chain(0, 40, n_values=2_000)
    files.write(pages)
    files.flush()
    size = eviction.reserved_bytes(pages[0].bound_bytes)
    assert len(stored_keys(root)) == 100 * 4096 // size
    refused = 40 - len(stored_keys(root))
    assert files.usage().refused == {"free space": refused}
    system.f_bavail = 899
    files.write(chain(1, 1))
    files.flush()
    assert files.usage().refused == {"free space": refused + 1}


def test_no_more_than_the_budget_is_written_in_a_day(root, monkeypatch):
    pages = chain(0, 12, n_values=2_000)
    budget = 5 * eviction.reserved_bytes(pages[0].bound_bytes)
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
    monkeypatch.setattr(folder.time, "time", lambda: tomorrow)
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
        patch.setattr(folder.os, "write", fill)
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

    monkeypatch.setattr(folder.os, "open", read_only)
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
        waiting = threading.Thread(target=lambda: files.write(pages, wait=True))
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


def test_a_writer_goes_on_behind_what_it_cannot_write(root, monkeypatch, caplog):
    files = stored(root, chain(0, 1))

    def fail(*_: object):
        raise BaseException("a mistake of ours")

    with monkeypatch.context() as patch:
        patch.setattr(page_files.ModelFiles, "encode", fail)
        files.write(chain(1, 2))
        files.flush()
    assert "a mistake of ours" in caplog.text, "the mistake is not hidden"
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


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_none(root, monkeypatch):
    stored(root, chain(0, 1))
    flock = folder.fcntl.flock
    replaced = []

    def late(handle: int, operation: int) -> None:
        if not replaced:
            replaced.append(handle)
            (root / "lock").unlink()
            (root / "lock").touch()
        flock(handle, operation)

    monkeypatch.setattr(folder.fcntl, "flock", late)
    with Folder(root, limits()).locked(5):
        assert replaced
        with pytest.raises(TimeoutError), Folder(root, limits()).locked(0):
            pass


def test_a_process_that_dies_gives_the_lock_back(root):
    code = (
        "import sys, time; from pathlib import Path; "
        "from mlxkv.prefix.on_disk.folder import Folder; "
        "from tests.support.page_writer import limits\n"
        f"with Folder(Path({str(root)!r}), limits()).locked(1):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(TimeoutError), Folder(root, limits()).locked(0.02):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with Folder(root, limits()).locked(5):
        pass


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
    monkeypatch.setattr(eviction, "file_system", lambda _: system)
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
