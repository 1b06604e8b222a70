"""Kernels in each instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from mlxkv.cpu.library import library

SETS = ("baseline", "avx2", "avx512")


@pytest.fixture(params=SETS)
def ops(request) -> Iterator[ModuleType]:
    """The kernels, held to an instruction set."""
    found = library()
    if found is None:
        pytest.skip("the kernels are not built")
    before = found.use(None)
    try:
        found.use(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield found
    found.use(before)
