"""compressed-tensors' integers, packed into 32-bit words along a row.

A word holds whole codes only (`32 // bits` of them); since its version 0.20 codes of 3, 5, 6 and 7
bits follow each other without a gap. For rows of more than 32 values the number of words tells all
of these apart, but for 7 bits in whole words, of which a word holds four, as it does of 8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .arrays import ArrayReader, Rows
from .matrices import Integers, Matrix
from .words import from_words, word_by_word


@dataclass(frozen=True, slots=True)
class _Packing:
    """How codes lie in words."""

    bits: int
    has_gaps: bool

    def n_words(self, n: int) -> int:
        """Words of n codes."""
        return -(-n // (32 // self.bits)) if self.has_gaps else -(-n * self.bits // 32)

    def codes(self, words: np.ndarray) -> np.ndarray:
        """Codes of rows of words, uint8, and perhaps some of the last word that are none."""
        unpack: Callable[[np.ndarray, int], np.ndarray]
        unpack = word_by_word if self.has_gaps else from_words
        return unpack(words, self.bits)


_PACKINGS = [_Packing(bits, has_gaps) for bits in range(2, 9) for has_gaps in (False, True)]


def packed_integers(reader: ArrayReader, stem: str) -> Matrix:
    """The matrix of a module.

    Raises:
        WeightsError: its arrays do not fit together, or may hold codes of several sizes and the
            config does not say which.
    """
    name, scale, zero = (f"{stem}.weight_{end}" for end in ("packed", "scale", "zero_point"))
    words, shape = reader.array(name), reader.array(f"{stem}.weight_shape").tolist()
    scales = reader.shape(scale)
    if words.ndim != 2 or len(shape) != 2 or not all(n > 0 for n in shape):
        raise reader.error(name, "is not a packed matrix")
    n_out, n_in = shape
    fitting = [each for each in _PACKINGS if words.shape == (n_out, each.n_words(n_in))]
    groups = len(scales) == 2 and scales[0] == n_out and scales[1]
    if not fitting or words.dtype.itemsize != 4 or not groups or n_in % scales[1]:
        raise reader.error(name, f"is {list(words.shape)}, which does not fit {shape}")
    packing = _chosen(reader, stem, fitting)
    reader.array(scale)
    zeros = _zeros(reader, zero, scales, packing)
    order = reader.order(f"{stem}.weight_g_idx", n_in, scales[1], n_in // scales[1])

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = packing.codes(np.asarray(words[start:stop]))[:, :n_in]
        return codes, reader.floats(scale, np.s_[start:stop]), zeros(start, stop)

    dtype = reader.scale_dtype(scale, zero not in reader.infos)
    # MLX has no 7 bits: the same codes at 8.
    width = 8 if packing.bits == 7 else packing.bits
    label, group = f"int{packing.bits}", n_in // scales[1]
    return Integers((n_out, n_in), label, width, group, read, order, dtype)


def _chosen(reader: ArrayReader, stem: str, fitting: list[_Packing]) -> _Packing:
    """Of packings that fit the shapes, the one of the config's bits, without gaps first."""
    sizes = sorted({each.bits for each in fitting})
    stated = stated_bits(reader.settings, stem)
    may = [bits for bits in sizes if bits in stated] if len(sizes) > 1 else sizes
    if len(may) != 1:
        of_shape, of_config = (" or ".join(map(str, found)) for found in (sizes, sorted(stated)))
        raise reader.error(
            f"{stem}.weight_packed",
            f"may hold codes of {of_shape} bits, and the config says {of_config or 'no number'}",
        )
    return next(each for each in fitting if each.bits == may[0])


def stated_bits(settings: Mapping[str, Any], module: str) -> set[int]:
    """What the config says of a module's bits: of groups that name it; where none does, of all that
    name a class, since a checkpoint does not say a module's.
    """
    groups = settings.get("config_groups")
    named, of_class = set[int](), set[int]()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            continue
        bits, targets = group["weights"].get("num_bits"), group.get("targets")
        for target in targets if isinstance(targets, list) else ():
            if isinstance(target, str) and type(bits) is int:
                if _names(target, module):
                    named.add(bits)
                elif target.isidentifier():
                    of_class.add(bits)
    return named or of_class


def _names(target: str, module: str) -> bool:
    """Whether a target is the module's name, or an expression (`re:...`) that matches it."""
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error:
        return False


def _zeros(reader: ArrayReader, name: str, shape: tuple[int, ...], packing: _Packing) -> Rows:
    """Codes of zero of each row's groups, `[n, groups]`: packed along the rows, or as they are."""
    middle = 1 << (packing.bits - 1)
    if name not in reader.infos:
        return lambda start, stop: np.full((stop - start, shape[1]), middle, np.float32)
    zeros = reader.array(name)
    if zeros.dtype == np.int8 and zeros.shape == shape:
        return lambda start, stop: zeros[start:stop].astype(np.float32) + middle
    if zeros.dtype.itemsize != 4 or zeros.shape != (packing.n_words(shape[0]), shape[1]):
        raise reader.error(name, f"is {list(zeros.shape)}, which does not fit {list(shape)}")
    return partial(_unpacked_rows, zeros, packing)


def _unpacked_rows(zeros: np.ndarray, packing: _Packing, start: int, stop: int) -> np.ndarray:
    unit = 32 // packing.bits if packing.has_gaps else 32  # rows that fill whole words
    first = start // unit * unit
    words = np.asarray(zeros[packing.n_words(first) : packing.n_words(stop)])
    return packing.codes(words.T).T[start - first :][: stop - start].astype(np.float32)
