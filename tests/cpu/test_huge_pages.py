"""Weights lie in huge pages, where the system has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxkv.cpu.library import library

SIZES = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
HUGE_BYTES = 2 << 20
ASK = """
import time
from pathlib import Path
import mlx.core as mx
from mlxkv.cpu.library import library

def huge_bytes():
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(x.split()[1]) << 10 for x in lines if x.startswith("AnonHugePages"))

arrays = [mx.full(((2 << 20) // 4 + 100,), i) for i in range(8)]
mx.eval(arrays)
before = huge_bytes()
library().huge_pages(arrays)
until = time.monotonic() + 20
while huge_bytes() < before + (8 << 20) and time.monotonic() < until:
    time.sleep(0.01)
assert all(mx.all(x == i).item() for i, x in enumerate(arrays))
print(huge_bytes() - before)
"""
"""Bytes that come into huge pages, of eight arrays that lie side by side."""


@pytest.fixture
def ops():
    if (found := library()) is None:
        pytest.skip("the kernels are not built")
    return found


def test_arrays_side_by_side_come_into_huge_pages(ops):
    if not SIZES.exists() or int(SIZES.read_text()) != HUGE_BYTES:
        pytest.skip("this system has no huge pages of 2 MiB")
    # In a process of its own: what others here gave back lies in huge pages already.
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 4 * HUGE_BYTES


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
