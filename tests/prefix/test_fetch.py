"""Pages are read before they are needed, within bounds, and given up if they are not."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from mlxkv.prefix.on_disk import fetch
from mlxkv.prefix.on_disk.fetch import PageFetcher
from mlxkv.prefix.on_disk.format import PageFile, PageKey

N_BYTES = 1024


def page(key: PageKey) -> PageFile:
    return PageFile(key, 0, b"", {"0.0": np.zeros(N_BYTES, np.uint8)}, {"0.0": "uint8"})


KEYS = [PageKey("", f"{i:032x}", 256, "full") for i in range(4)]


class Disk:
    """Reads pages, counts them, and waits where it is told to."""

    def __init__(self) -> None:
        self.read_keys: list[PageKey] = []
        self.may_read = threading.Event()
        self.may_read.set()

    def read(self, key: PageKey) -> PageFile | None:
        self.read_keys.append(key)
        assert self.may_read.wait(10)
        if key == KEYS[3]:
            raise OSError("damaged")
        return page(key)


@pytest.fixture
def disk() -> Disk:
    return Disk()


def test_what_was_fetched_is_given_once(disk):
    fetcher = PageFetcher(disk.read)
    fetcher.fetch(KEYS[:2], 10 * N_BYTES)
    fetcher.fetch(KEYS[:2], 10 * N_BYTES)
    fetcher.settle()
    assert disk.read_keys == KEYS[:2]
    found = fetcher.take(KEYS[0])
    assert found is not None and found.key == KEYS[0]
    assert fetcher.take(KEYS[0]) is None and fetcher.take(KEYS[2]) is None


def test_a_guess_makes_way_for_what_a_request_needs(disk):
    fetcher = PageFetcher(disk.read)
    fetcher.fetch(KEYS[:2], 2 * N_BYTES, is_guess=True)
    fetcher.settle()
    fetcher.fetch(KEYS[1:3], 2 * N_BYTES)
    fetcher.settle()
    assert disk.read_keys == KEYS[:3] and fetcher.nbytes == 2 * N_BYTES
    assert [fetcher.take(key) is not None for key in KEYS[:3]] == [False, True, True]


def test_what_was_taken_is_counted_once(disk):
    fetcher = PageFetcher(disk.read)
    fetcher.fetch(KEYS[:2], 10 * N_BYTES)
    fetcher.settle()
    fetcher.take(KEYS[0])
    n_bytes, seconds = fetcher.spent()
    assert n_bytes == N_BYTES and seconds > 0
    assert fetcher.spent() == (0, 0.0)
    assert fetcher.clear() == N_BYTES and fetcher.nbytes == 0


def test_no_more_than_the_bound_is_held_and_its_beginning(disk):
    fetcher = PageFetcher(disk.read)
    fetcher.fetch(KEYS[:3], 2 * N_BYTES - 1)
    fetcher.settle()
    assert [fetcher.take(key) is not None for key in KEYS[:3]] == [True, False, False]
    fetcher.fetch(KEYS[:1], 0)
    fetcher.settle()
    assert fetcher.take(KEYS[0]) is None


def test_a_page_that_cannot_be_read_is_not_held_and_the_next_is(disk, caplog):
    fetcher = PageFetcher(disk.read)
    fetcher.fetch([KEYS[3], KEYS[0]], 10 * N_BYTES)
    fetcher.settle()
    assert fetcher.take(KEYS[3]) is None and fetcher.take(KEYS[0]) is not None
    assert "a page was not fetched" in caplog.text


def reading(disk, keys: list[PageKey]) -> PageFetcher:
    """One that has begun to read the first page, and waits in it for `may_read`."""
    disk.may_read.clear()
    fetcher = PageFetcher(disk.read)
    fetcher.fetch(keys, 10 * N_BYTES)
    while not disk.read_keys:
        pass
    return fetcher


def test_a_page_that_is_being_read_is_waited_for_and_not_read_twice(disk):
    fetcher = reading(disk, KEYS[:2])
    assert fetcher.take(KEYS[1]) is None  # not begun: its prompt reads it
    found: list[Any] = []
    taker = threading.Thread(target=lambda: found.append(fetcher.take(KEYS[0])))
    taker.start()
    disk.may_read.set()
    taker.join(10)
    fetcher.settle()
    assert [each.key for each in found] == KEYS[:1] == disk.read_keys


def test_what_no_prompt_takes_is_given_up_and_the_thread_ends(disk, monkeypatch):
    monkeypatch.setattr(fetch, "KEEP_S", 0.01)
    fetcher = PageFetcher(disk.read)
    for _ in range(2):
        fetcher.fetch(KEYS[:1], 10 * N_BYTES)
        thread = fetcher._thread
        if thread is not None:
            thread.join(10)
            assert not thread.is_alive()
        assert fetcher.take(KEYS[0]) is None and fetcher._held_bytes == 0


def test_clearing_reads_no_more(disk):
    fetcher = reading(disk, KEYS[:3])
    fetcher.clear()
    disk.may_read.set()
    fetcher.settle()
    assert disk.read_keys == KEYS[:1] and fetcher.take(KEYS[1]) is None
