"""What tests of pages on disk share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of pages that does not exist yet."""
    return tmp_path / "kv"
