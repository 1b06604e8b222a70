"""No key twice in one object of JSON that a model writes.

A grammar knows the properties that a schema names, but not those that a model thinks of: it would
allow the same one again. So the text is followed here, and a token that would end a key for the
second time must not come.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_OPENS, _CLOSES = b"{[", b"}]"


class KeyFollower(Protocol):
    """Follows the keys of an answer."""

    def advance(self, token: int, data: bytes) -> None:
        """The token that came, and its bytes."""
        ...

    def without_repeats(self, allowed: np.ndarray) -> np.ndarray:
        """What of bool [n] may come; all of it where nothing would be left."""
        ...

    def fork(self) -> KeyFollower:
        """One at the same place, which goes on for itself."""
        ...


class _Place(NamedTuple):
    """Where in a JSON text one is.

    Args:
        keys: of the object that is open; None in an array, and outside of everything.
        around: the place around it.
        at_key: whether the next string is a key.
        string: what of a string has been written; None outside of one.
        is_escaped: whether a backslash stands before the next byte.
    """

    keys: frozenset[str] | None = None
    around: _Place | None = None
    at_key: bool = False
    string: bytes | None = None
    is_escaped: bool = False


class Keys:
    """The keys of one answer.

    Args:
        quoting: id -> bytes, of the tokens with a quotation mark.
        resets: tokens behind which a text begins anew.
    """

    def __init__(self, quoting: Mapping[int, bytes], resets: frozenset[int] = frozenset()):
        self._quoting, self._resets = quoting, resets
        self._ids = np.array([*quoting], np.int64)
        self._n_quotes = np.array([data.count(b'"') for data in quoting.values()], np.int64)
        self._place: _Place = _Place()

    def fork(self) -> Keys:
        return copy.copy(self)

    def advance(self, token: int, data: bytes) -> None:
        """The token that came, and its bytes."""
        self._place = _Place() if token in self._resets else _after(self._place, data)[0]

    def without_repeats(self, allowed: np.ndarray) -> np.ndarray:
        """What of bool [n] may come; all of it where nothing would be left."""
        place = self._place
        n_needed = 2 if place.string is None else 1 if place.at_key else 3
        n_needed += 0 if _has_keys(place) else 2
        able = (self._n_quotes >= n_needed) & (self._ids < len(allowed))
        ids = self._ids[able]
        ids = ids[allowed[ids].astype(bool)].tolist()
        repeats = [token for token in ids if _repeats(place, self._quoting[token])]
        if not repeats:
            return allowed
        left = allowed.copy()
        left[repeats] = False
        return left if left.any() else allowed


def _has_keys(place: _Place | None) -> bool:
    while place is not None:
        if place.keys:
            return True
        place = place.around
    return False


def _repeats(place: _Place, data: bytes) -> bool:
    """Whether these bytes bring a key that the object has."""
    if place.string is not None and place.at_key and not place.is_escaped:
        end, n = data.find(b'"'), data.count(b'"')
        rest = place.string + data[:end]
        if n < 3 and b"\\" not in rest:  # it ends one key, as it is written
            return rest.decode(errors="replace") in (place.keys or ())
    return _after(place, data)[1]


def _after(place: _Place, data: bytes) -> tuple[_Place, bool]:
    """The place behind some bytes, and whether a key came twice in them."""
    repeats = False
    for byte in data:
        if place.string is not None:
            if place.is_escaped or byte != _QUOTE:
                is_escaped = byte == _BACKSLASH and not place.is_escaped
                place = place._replace(string=place.string + bytes([byte]), is_escaped=is_escaped)
                continue
            if place.at_key and place.keys is not None:
                key = read(place.string)
                repeats |= key in place.keys
                place = place._replace(keys=place.keys | {key}, at_key=False)
            place = place._replace(string=None)
        elif byte == _QUOTE:
            place = place._replace(string=b"")
        elif byte in _OPENS:
            is_object = byte == _OPENS[0]
            place = _Place(frozenset() if is_object else None, place, is_object)
        elif byte in _CLOSES:
            place = place.around or _Place()
        elif byte == ord(","):
            place = place._replace(at_key=place.keys is not None)
    return place, repeats


def read(string: bytes) -> str:
    """What a string between quotation marks says."""
    try:
        return json.loads(b'"' + string + b'"', strict=False)
    except ValueError:
        return string.decode(errors="replace")
