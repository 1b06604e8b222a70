"""Weights lie in huge pages, where the system has them."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlxkv.cpu.library import library

SIZES = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
HUGE_BYTES = 2 << 20


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(x.split()[1]) << 10 for x in lines if x.startswith("AnonHugePages"))


@pytest.fixture
def ops():
    if (found := library()) is None:
        pytest.skip("the kernels are not built")
    return found


def test_arrays_side_by_side_come_into_huge_pages(ops):
    if not SIZES.exists() or int(SIZES.read_text()) != HUGE_BYTES:
        pytest.skip("this system has no huge pages of 2 MiB")
    arrays = [mx.full((HUGE_BYTES // 4 + 100,), i) for i in range(8)]
    mx.eval(arrays)
    before = huge_bytes()
    ops.huge_pages(arrays)
    until = time.monotonic() + 10
    while huge_bytes() < before + 4 * HUGE_BYTES and time.monotonic() < until:
        time.sleep(0.01)
    assert huge_bytes() >= before + 4 * HUGE_BYTES
    assert all(mx.all(x == i).item() for i, x in enumerate(arrays))


def test_what_is_not_computed_or_was_given_back_is_left(ops):
    lazy = mx.zeros((HUGE_BYTES,)) + 1
    given_back = mx.zeros((HUGE_BYTES,))
    mx.eval(given_back)
    ops.huge_pages([lazy, given_back])
    del given_back
    mx.clear_cache()
    assert mx.all(lazy == 1).item()


def test_other_things_than_arrays_are_refused(ops):
    with pytest.raises(ValueError, match=r"mx\.array"):
        ops.huge_pages([1.0])
