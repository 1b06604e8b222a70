"""pytest plugin: the branches that a GPU takes, evaluated on the CPU backend.

    python -m pytest -p tests.support.gpu_branches tests/memory/test_plan.py

The chunk is a GPU's, weights keep their dtype, products and attention are MLX's own on one stream.
Fused kernels, Metal's queue and its errors are not what runs here. `scripts/test-gpu-branches` runs
the tests for which it matters.
"""

from __future__ import annotations

import pytest

from tests.support.branches import gpu_branches

_BRANCHES = gpu_branches()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: some ask for the device at once."""
    _BRANCHES.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    _BRANCHES.__exit__(None, None, None)
