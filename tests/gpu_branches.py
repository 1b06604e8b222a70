"""pytest plugin: the branches that a GPU takes, evaluated on the CPU backend.

    python -m pytest -p tests.gpu_branches tests/test_planner.py

The chunk is a GPU's, weights keep their dtype, products and attention are MLX's own on one stream.
Fused kernels, Metal's queue and its errors are not what runs here. `scripts/test-gpu-branches` runs
the tests for which it matters.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxkv import device, sampling


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: some ask for the device at once."""
    mx.disable_compile()  # the CPU backend's compiler takes seconds a function
    device.on_cpu = lambda: False
    sampling._on_cpu = lambda: False
    device.core_streams = lambda: (mx.default_stream(mx.default_device()),)
