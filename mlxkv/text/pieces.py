"""Where a long text can be cut so that its parts, encoded alone, give the ids of the whole.

Encoding takes some 150 bytes for each of a text, and cannot be ended midway: so a long text is
encoded in parts. A text is cut before a single space or line break between a letter or digit and a
letter, if one of these holds:

- No word goes over such a place: every expression that the tokenizer splits by is one of those
  below, none of which joins a letter or digit with white space behind it. They look at nothing
  before a word and, but for the end of white space, at nothing behind it.
- The tokenizer is a BPE, and no token of its vocabulary holds the character before the place and
  the white space: then no merge goes over it, and merges left and right of it do not depend on
  each other.

Normalizers must leave such a place alone, and no added token may reach over it. A tokenizer of
which that is not known gets its texts whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from mlxkv.chat.interrupt import check_point

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

SIZE = 65_536
"""Characters of a part, if it can be cut there: 0.2 s at most, and 15 MiB."""
FREE = 4096
"""Characters from which on `tokenizers` is called such that other threads run meanwhile."""
SPACE = "\u2581"
"""How SentencePiece writes a space."""
NEUTRAL = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
"""Normalizers that leave ASCII letters, common Chinese characters and white space as they are."""

_LETTERS = "A-Za-z\u4e00-\u9fa5"

_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_STARTS = frozenset(
    {
        r"\s+",
        r" ?\p{L}+",
        rf"{_BEFORE}\p{{L}}+",
        rf"{_BEFORE}[\p{{L}}\p{{M}}]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        *(rf"{_BEFORE}{_UPPER}*{_LOWER}+{ending}" for ending in ("", f"{_ENDINGS}?")),
        *(rf"{_BEFORE}{_UPPER}+{_LOWER}*{ending}" for ending in ("", f"{_ENDINGS}?")),
    }
)
"""Alternatives of which one begins a word at every such place."""
_OTHERS = frozenset(
    {
        _ENDINGS,
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
        *(r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r" ?\p{N}+", "[0-9][0-9][0-9]"),
        r" ?[^\s\p{L}\p{N}]+",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"[\p{P}\$\+<=>\^~\|]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)"),
    }
)


@cache  # compiling it is felt in a start, and few texts are as long
def _cut() -> re.Pattern[str]:
    """White space between two letters, the first of which may be a digit."""
    return re.compile(rf"(?<=[0-9{_LETTERS}])[ \n](?=[{_LETTERS}])")


@cache
def _at_edge() -> re.Pattern[str]:
    """A letter or digit at the start or the end of a text."""
    return re.compile(rf"^[0-9{_LETTERS}]|[0-9{_LETTERS}]$")


@dataclass(frozen=True, slots=True)
class _Rule:
    """Where a tokenizer's texts can be cut.

    Args:
        left: for each white space, the characters that it can be cut behind; None for all letters
            and digits.
        skips: whether the white space is left out: the tokenizer puts one before each part.
    """

    left: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    skips: bool = False


class Pieces:
    """Cuts the texts of one tokenizer, and encodes the parts without adding special tokens.

    Args:
        backend: of the tokenizer.
    """

    def __init__(self, backend: Backend):
        self._backend = backend

    def encode(self, text: str, start: int = 0) -> Iterator[tuple[int, int, Encoding]]:
        """Encode what is behind `start`, part by part: (start, end, its encoding)."""
        for at, end in self.of(text, start, len(text)):
            yield at, end, encode_free(self._backend, text[at:end])

    def of(self, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of `text[start:end]`: (start, end)."""
        while start < end:
            check_point()
            stop, skipped = self._next_cut(text, start, end)
            yield start, stop
            start = stop + skipped

    def _next_cut(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Where the part that begins at `start` ends, and how many characters to skip there."""
        if end - start < 2 * SIZE or not self._rule.left:
            return end, 0
        at = start + SIZE
        while at < end:
            # A place at the window's end is found with the next one.
            for found in _cut().finditer(text, at, min(at + SIZE, end)):
                place = found.start()
                left = self._rule.left.get(text[place], frozenset())
                if left is None or text[place - 1] in left:
                    return place, int(self._rule.skips)
            at += SIZE - 1
            check_point()
        return end, 0

    @cached_property
    def _rule(self) -> _Rule:
        rule = _rule_of(self._backend)
        return _Rule() if _added_tokens_reach_over(self._backend, rule) else rule


def encode_free(backend: Backend, text: str) -> Encoding:
    """Encode a text; other threads run while a long one is encoded."""
    if len(text) < FREE:
        return backend.encode(text, add_special_tokens=False)
    return backend.encode_batch([text], add_special_tokens=False)[0]


def steps_of(part: Any) -> list[dict[str, Any]] | None:
    """The steps of a normalizer or pre-tokenizer as its JSON; None if that is not known."""
    if part is None:
        return []
    try:
        state = json.loads(part.__getstate__())
    except Exception:  # one that was written in Python
        return None
    return list(_flat(state))


def _flat(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = state.get("normalizers") or state.get("pretokenizers")
    if state.get("type") != "Sequence" or inner is None:
        yield state
        return
    for step in inner:
        yield from _flat(step)


def writes_spaces(step: Mapping[str, Any]) -> bool:
    """Whether a normalizer writes spaces as SentencePiece does, and changes nothing else."""
    is_space = step.get("pattern") == {"String": " "}
    return step.get("type") == "Replace" and is_space and step.get("content") == SPACE


def prepends(step: Mapping[str, Any]) -> bool:
    """Whether a normalizer puts SentencePiece's space before a text."""
    return step.get("type") == "Prepend" and step.get("prepend") == SPACE


def _rule_of(backend: Backend) -> _Rule:
    normalizers, words = steps_of(backend.normalizer), steps_of(backend.pre_tokenizer)
    if normalizers is None or words is None:
        return _Rule()
    skips = any(map(prepends, normalizers))
    writes = any(map(writes_spaces, normalizers))
    known = (
        step.get("type") in NEUTRAL or writes_spaces(step) or prepends(step) for step in normalizers
    )
    if not all(known) or (skips and not writes):
        return _Rule()
    splits = meta = False
    for step in words:
        match step:
            case {"type": "ByteLevel"}:
                splits |= bool(step.get("use_regex", True))
            case {"type": "Digits"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}} if writes:
                pass  # no space is left
            case {"type": "Split", "pattern": {"Regex": str(pattern)}}:
                branches = frozenset(_branches(pattern))
                is_plain = step.get("behavior") == "Isolated" and not step.get("invert")
                if not is_plain or not branches <= _STARTS | _OTHERS:
                    return _Rule()
                splits |= not branches.isdisjoint(_STARTS)
            case {"type": "Metaspace", "replacement": "\u2581"}:
                meta = True
                if step.get("split", True):
                    return _Rule() if skips else _Rule({" ": None})
            case _:
                return _Rule()
    if splits:
        return _Rule() if skips or writes or meta else _Rule({" ": None, "\n": None})
    return _merge_rule(backend, skips, writes, meta)


def _merge_rule(backend: Backend, skips: bool, writes: bool, meta: bool) -> _Rule:
    """The rule of a BPE whose words go over such places."""
    from tokenizers.models import BPE

    model = backend.model
    if not isinstance(model, BPE) or model.dropout or model.ignore_merges:
        return _Rule()
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return _Rule()
    blanks = {" ": SPACE if writes or meta else " "}
    if not (skips or meta):
        blanks["\n"] = "\n"
    tokens = [backend.id_to_token(i) or "" for i in range(backend.get_vocab_size())]
    known, left = frozenset(token for token in tokens if len(token) == 1), {}
    for blank, written in blanks.items():
        if written in known:
            joined = re.compile(f".(?={written})", re.DOTALL)
            left[blank] = known - {c for token in tokens for c in joined.findall(token)}
    return _Rule(left, skips)


def _added_tokens_reach_over(backend: Backend, rule: _Rule) -> bool:
    """Whether an added token may hold a place to cut at, or take the white space there."""
    for token in backend.get_added_tokens_decoder().values():
        at_edge = _at_edge().search(token.content) is not None
        takes = token.lstrip or token.rstrip or token.single_word or rule.skips
        if _cut().search(token.content) or (takes and at_edge):
            return True
    return False


def _branches(pattern: str) -> Iterator[str]:
    """The alternatives of an expression."""
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    start = depth = 0
    in_class = escaped = False
    for i, c in enumerate(pattern):
        if escaped:
            escaped = False
        elif c == "\\":
            escaped = True
        elif in_class:
            in_class = c != "]"
        elif c == "[":
            in_class = True
        elif c in "()":
            depth += 1 if c == "(" else -1
        elif c == "|" and depth == 0:
            yield pattern[start:i]
            start = i + 1
    yield pattern[start:]
