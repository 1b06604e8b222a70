"""What readers of media say of files that they do not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlxkv.errors import MediaError


def refusal(read: Callable[..., Any], *source: Any) -> str:
    """What a reader says of a file that it does not take: one line, the client's mistake."""
    with pytest.raises(MediaError) as caught:
        read(*source)
    text = str(caught.value)
    assert "\n" not in text and caught.value.status == 400
    return text
