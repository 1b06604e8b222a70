"""Codes of other quantizers in 32-bit words."""

from __future__ import annotations

import numpy as np

_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where value i of a word of AutoAWQ's lies, in units of 4 bits."""


def from_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of rows of 32-bit words, lowest bits first: uint8 `[n, words * 32 // bits]`."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream
    found = np.unpackbits(stream, axis=1, bitorder="little")
    found = found[:, : found.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return np.packbits(found, axis=2, bitorder="little")[..., 0]


def word_by_word(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of rows of words that hold whole ones only: uint8 `[n, words * (32 // bits)]`."""
    if 32 % bits == 0:
        return from_words(words, bits)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    stream = np.ascontiguousarray(words).view(np.uint32)[..., None]
    found = stream >> shifts & np.uint32((1 << bits) - 1)
    return found.astype(np.uint8).reshape(len(words), -1)


def in_awq_order(words: np.ndarray) -> np.ndarray:
    """Codes of rows of words in AutoAWQ's order of 4 bits."""
    codes = from_words(words, 4).reshape(len(words), -1, 8)
    return codes[..., _AWQ_ORDER].reshape(len(words), -1)


def awq_codes(words: np.ndarray, bits: int, start: int, stop: int) -> np.ndarray:
    """Codes `[stop - start, in]` of AutoAWQ's words `[in, out / 8]`, some of the `out`."""
    return in_awq_order(np.asarray(words[:, start // 8 : -(-stop // 8)])).T


def gptq_codes(words: np.ndarray, bits: int, start: int, stop: int) -> np.ndarray:
    """Codes `[stop - start, in]` of AutoGPTQ's words `[in * bits / 32, out]`, some of the `out`."""
    return from_words(np.asarray(words[:, start:stop]).T, bits)
