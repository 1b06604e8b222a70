"""The branches that a GPU takes, evaluated where the tests run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import mlx.core as mx
import pytest


@contextmanager
def gpu_branches() -> Iterator[None]:
    """Without compilation: on the CPU backend it would call a C++ compiler."""
    mx.disable_compile()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mlxkv.base.device.on_cpu", lambda: False)
            yield
    finally:
        mx.enable_compile()


Branches = Callable[[], AbstractContextManager[None]]
BRANCHES: tuple[Branches, ...] = nullcontext, gpu_branches
"""This device's and a GPU's: for hypothesis, which the fixture `branches` does not suit."""
