"""What all of these tests need: a machine that can build the shim, and a folder that keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.metal import shim


@pytest.fixture(scope="session")
def shim_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pytest's cache, where there is one: the shim is compiled once for each MLX."""
    if reason := shim.why_not():
        pytest.skip(reason)
    cache = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp("metal") if cache is None else cache.mkdir("metal")
