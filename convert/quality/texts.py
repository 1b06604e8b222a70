"""Texts to measure on: those that are shipped, or the user's; as windows of tokens."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.text.tokenizer import Tokenizer

CALIBRATION = Path(__file__).with_name("calibration.txt")
HELD_OUT = Path(__file__).with_name("held-out.txt")


def read_text(path: Path) -> str:
    """A text file of the user's.

    Raises:
        UsageError: there is none, or it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def windows(
    tokenizer: Tokenizer, text: str, n_windows: int, length: int, where: str = "the text"
) -> mx.array:
    """Windows of tokens that lie evenly over a text, `[n, length]`, n at most `n_windows`.

    Each begins with the token that the model's texts begin with, if they do.

    Raises:
        UsageError: the text is shorter than one window.
    """
    first = tokenizer.encode("")[:1]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    inside = length - len(first)
    n = min(n_windows, len(tokens) // inside)
    if n == 0:
        raise UsageError(f"{where} has {len(tokens):,} tokens; measuring takes {inside:,} at least")
    gap = (len(tokens) - inside) / max(1, n - 1)
    starts = [int(i * gap) for i in range(n)]
    return mx.array([[*first, *tokens[start : start + inside]] for start in starts])
