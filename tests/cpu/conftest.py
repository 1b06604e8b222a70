"""Kernels in each instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from mlxkv.cpu.library import library

SETS = ("baseline", "avx2", "avx512")


def held_to(name: str) -> Iterator[ModuleType]:
    """The kernels while they are held to an instruction set."""
    found = library()
    if found is None:
        pytest.skip("the kernels are not built")
    before = found.use(None)
    try:
        found.use(name)
    except ValueError:
        pytest.skip(f"this machine has no {name}")
    yield found
    found.use(before)


@pytest.fixture(params=SETS)
def ops(request) -> Iterator[ModuleType]:
    """The kernels, held to an instruction set."""
    yield from held_to(request.param)
