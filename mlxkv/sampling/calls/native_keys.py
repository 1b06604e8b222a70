"""No key twice in one object of a call whose arguments are not JSON.

As in `json_keys`: a grammar knows the properties that a schema names, and where a schema leaves an
object open, a token that would end a key for the second time must not come.

- `GemmaKeys`: `call:N{K:V,...}`, keys bare or between two tokens.
- `PairKeys`: keys between tags, which are tokens (GLM) or text (Qwen's XML). A value that may be a
  list or an object is JSON; other values are raw text, in which braces say nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from mlxkv.parsers.json_schema import argument_kinds
from mlxkv.sampling.calls.tool_call_grammar import GEMMA_QUOTES, Calls
from mlxkv.sampling.json_keys import KeyFollower, Keys, read

_NO_TOKEN = -1
_LONGEST_TAG = 32
TakesJson = Callable[[str, str], bool]
"""Whether the argument of this name, of this function, may be a list or an object."""


def without(allowed: np.ndarray, repeats: Collection[int]) -> np.ndarray:
    """What may come without some tokens; all of it where nothing would be left."""
    left = allowed.copy()
    left[[token for token in repeats if token < len(left)]] = False
    return left if left.any() else allowed


class Pieces:
    """The bytes of a vocabulary's tokens.

    Args:
        data: by id.
    """

    def __init__(self, data: Sequence[bytes]):
        self._data = data
        self._holding: dict[bytes, np.ndarray] = {}

    def __getitem__(self, token: int) -> bytes:
        return self._data[token]

    def holding(self, part: bytes) -> np.ndarray:
        """The tokens that have a part."""
        if part not in self._holding:
            found = [token for token, data in enumerate(self._data) if part in data]
            self._holding[part] = np.array(found, np.int64)
        return self._holding[part]


def _able(ids: np.ndarray, allowed: np.ndarray) -> list[int]:
    ids = ids[ids < len(allowed)]
    return ids[allowed[ids].astype(bool)].tolist()


class _Place(NamedTuple):
    """Where in Gemma's notation one is.

    Args:
        keys: of the object that is open; None in a list, and outside of everything.
        around: the place around it.
        at_key: whether a key comes next.
        word: what of a key has been written.
        string: whether a string between two tokens is open.
        json: what of a string between quotation marks has been written; None outside of one.
    """

    keys: frozenset[str] | None = None
    around: _Place | None = None
    at_key: bool = False
    word: bytes = b""
    string: bool = False
    json: bytes | None = None


class GemmaKeys:
    """The keys of calls in Gemma's notation.

    Args:
        pieces: of the vocabulary.
        quote: the token around strings.
        resets: other tokens that mark calls, behind which a text begins anew.
        content: follows JSON that may come in place of calls.
    """

    def __init__(self, pieces: Pieces, quote: int, resets: Collection[int], content: Keys | None):
        self._pieces, self._quote = pieces, quote
        self._resets, self._content = frozenset(resets) - {quote}, content
        self._place = _Place()

    def fork(self) -> GemmaKeys:
        twin = copy.copy(self)
        twin._content = None if self._content is None else self._content.fork()
        return twin

    def advance(self, token: int, data: bytes) -> None:
        """The token that came, and its bytes."""
        place = self._place
        if token in self._resets:
            self._place, self._content = _Place(), None
        elif self._content is not None:
            self._content.advance(token, data)
        elif token == self._quote:
            word = place.word if place.string else b""
            self._place = place._replace(string=not place.string, word=word)
        else:
            self._place = _gemma_after(place, data)[0]

    def without_repeats(self, allowed: np.ndarray) -> np.ndarray:
        """What of bool [n] may come; all of it where nothing would be left."""
        place = self._place
        if self._content is not None:
            return self._content.without_repeats(allowed)
        if place.string:
            is_known = place.at_key and place.word.decode(errors="replace") in (place.keys or ())
            return without(allowed, [self._quote]) if is_known else allowed
        able = [t for t in _able(self._pieces.holding(b":"), allowed) if t != self._quote]
        repeats = [token for token in able if _gemma_after(place, self._pieces[token])[1]]
        return without(allowed, repeats) if repeats else allowed


def _gemma_after(place: _Place, data: bytes) -> tuple[_Place, bool]:
    """The place behind some bytes, and whether a key came twice in them."""
    if place.string:
        return (place._replace(word=place.word + data) if place.at_key else place), False
    repeats = False
    for byte in data:
        if place.json is not None:
            text = place.json + bytes([byte])
            n_slashes = len(place.json) - len(place.json.rstrip(b"\\"))
            if byte != ord('"') or n_slashes % 2:
                place = place._replace(json=text)
                continue
            word = read(place.json).encode(errors="replace")
            place = place._replace(json=None, word=word)
        elif byte == ord('"'):
            place = place._replace(json=b"")
        elif byte in b"{[":
            is_object = byte == ord("{")
            place = _Place(frozenset() if is_object else None, place, is_object)
        elif byte in b"}]":
            place = place.around or _Place()
        elif byte == ord(","):
            place = place._replace(at_key=place.keys is not None, word=b"")
        elif byte == ord(":") and place.at_key and place.keys is not None:
            key = place.word.decode(errors="replace")
            repeats |= key in place.keys
            place = place._replace(keys=place.keys | {key}, at_key=False, word=b"")
        elif place.at_key:
            place = place._replace(word=place.word + bytes([byte]))
    return place, repeats


class Tags(NamedTuple):
    """The tags of a call, as bytes.

    Args:
        call: before the function's name.
        key: before a key; behind a name stands `named`, or this.
        keyed: behind a key.
        value: before a value; empty where it is a part of `keyed`.
        ends: behind a value.
        named: behind a name; empty where the first pair ends it.
    """

    call: bytes
    key: bytes
    keyed: bytes
    value: bytes
    ends: bytes
    named: bytes = b""


GLM = Tags(b"<tool_call>", b"<arg_key>", b"</arg_key>", b"<arg_value>", b"</arg_value>")
XML = Tags(b"<function=", b"<parameter=", b">\n", b"", b"\n</parameter>\n", b">\n")


class _Pairs(NamedTuple):
    """Where in a call one is.

    Args:
        function: its name.
        keys: that it has.
        key: the one whose value comes; None before a key.
        text: what has been written since the last tag.
        before: the tag that ended there.
        is_fresh: whether a value has begun and has no text yet.
        is_json: whether a value is being written that is JSON.
    """

    function: str = ""
    keys: frozenset[str] = frozenset()
    key: str | None = None
    text: bytes = b""
    before: bytes = b""
    is_fresh: bool = False
    is_json: bool = False


class PairKeys:
    """The keys of calls whose arguments are pairs of tags.

    Args:
        pieces: of the vocabulary; of tags that are tokens, their text.
        tags: of the format.
        inner: follows what is JSON.
        takes_json: which values may be.
        content: whether JSON may come in place of calls.
    """

    def __init__(
        self,
        pieces: Pieces,
        tags: Tags,
        inner: Callable[[], Keys],
        takes_json: TakesJson,
        content: bool,
    ):
        self._pieces, self._tags, self._takes_json = pieces, tags, takes_json
        self._new_inner, self._inner = inner, inner()
        self._place = _Pairs(is_json=content)

    def fork(self) -> PairKeys:
        twin = copy.copy(self)
        twin._inner = self._inner.fork()
        return twin

    def advance(self, token: int, data: bytes) -> None:
        """The token that came, and its bytes."""
        for i in range(len(data)):
            self._place = self._after(data[i : i + 1])

    def without_repeats(self, allowed: np.ndarray) -> np.ndarray:
        """What of bool [n] may come; all of it where nothing would be left."""
        place, tags = self._place, self._tags
        if place.is_json:
            return self._inner.without_repeats(allowed)
        ends = tags.keyed.rstrip(b"\n")
        ids = self._pieces.holding(ends if place.before == tags.key else tags.key.strip(b"<"))
        repeats = [token for token in _able(ids, allowed) if self._repeats(self._pieces[token])]
        return without(allowed, repeats) if repeats else allowed

    def _repeats(self, data: bytes) -> bool:
        """Whether these bytes end a key that the call has."""
        text = self._place.text + data
        if self._place.before != self._tags.key:
            if self._tags.key not in text:
                return False
            text = text.rpartition(self._tags.key)[2]
        end = self._tags.keyed.rstrip(b"\n")
        return end in text and _name(text.partition(end)[0]) in self._place.keys

    def _after(self, byte: bytes) -> _Pairs:
        """The place behind one more byte."""
        place, tags = self._place, self._tags
        if place.is_json:
            self._inner.advance(_NO_TOKEN, byte)
        text = place.text + byte
        if place.before == tags.key:
            if not text.endswith(tags.keyed):
                return place._replace(text=text)
            key = _name(text[: -len(tags.keyed)])
            is_value = not tags.value
            keyed = _Pairs(place.function, place.keys | {key}, key, before=tags.keyed)
            return keyed._replace(before=tags.value, is_fresh=True) if is_value else keyed
        if place.key is not None:
            return self._in_value(place, text, byte)
        if text.endswith(tags.call):
            return _Pairs(before=tags.call)
        if text.endswith(tags.key):
            name = text[: -len(tags.key)] if place.before == tags.call else b""
            return _Pairs(_name(name) or place.function, place.keys, before=tags.key)
        if place.before == tags.call:
            if tags.named and text.endswith(tags.named):
                return _Pairs(_name(text[: -len(tags.named)]))
            return place._replace(text=text)
        return place._replace(text=text[-_LONGEST_TAG:])

    def _in_value(self, place: _Pairs, text: bytes, byte: bytes) -> _Pairs:
        """The same behind a key."""
        tags = self._tags
        if place.before == tags.keyed:
            if text.endswith(tags.value):
                return place._replace(text=b"", before=tags.value, is_fresh=True)
        elif text.endswith(tags.ends):
            return _Pairs(place.function, place.keys)
        elif place.is_fresh and not byte.isspace():
            is_json = byte in (b"{", b"[")
            is_json = is_json and self._takes_json(place.function, place.key or "")
            if is_json:
                self._inner = self._new_inner()
                self._inner.advance(_NO_TOKEN, byte)
            place = place._replace(is_fresh=False, is_json=is_json)
        return place._replace(text=text[-_LONGEST_TAG:])


def _name(text: bytes) -> str:
    return text.decode(errors="replace").strip()


def follower(
    name: str,
    calls: Calls,
    pieces: Pieces,
    new: Callable[[], Keys],
    named: Collection[int],
    id_of: Callable[[str], int | None],
) -> KeyFollower | None:
    """What follows the keys of calls in a format; None where their arguments are JSON.

    Args:
        name: of the format.
        calls: which may come.
        pieces: of the vocabulary.
        new: makes what follows JSON.
        named: the tokens that mark calls.
        id_of: a token by its text.
    """
    has_content = calls.content is not None
    if name in GEMMA_QUOTES:
        quote = id_of(GEMMA_QUOTES[name])
        assert quote is not None
        return GemmaKeys(pieces, quote, named, new() if has_content else None)
    tags = {"glm": GLM, "qwen_xml": XML}.get(name)
    if tags is None:
        return None
    schemas = dict(calls.tools)

    def takes_json(function: str, key: str) -> bool:
        kinds = argument_kinds(schemas.get(function, True), key)
        return not kinds.isdisjoint(("array", "object"))

    return PairKeys(pieces, tags, new, takes_json, has_content)
