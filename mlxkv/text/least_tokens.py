"""The fewest tokens that a text can have, by its length alone.

A character is part of a token, and no token that it is part of is longer than the longest of the
vocabulary that holds it, of M tokens' characters: so it counts for at least 1/M of a token. The sum
over a text is a bound below which no tokenization of it is. It holds for a BPE whose normalizers
and pre-tokenizers drop nothing; what the vocabulary has no token for counts nothing, as it may be
left out. No bound is known for other tokenizers.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from bisect import bisect
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlxkv.chat.interrupt import check_point
from mlxkv.text.pieces import NEUTRAL, SPACE, prepends, steps_of, writes_spaces

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

SIZE = 1 << 20
"""Characters that are counted at a time."""
_COMPOSED = 4
"""Characters of which a normalizer may make one where two parts of a text meet."""
_WHITE = "\t\n\v\f\r\x1c\x1d\x1e\x1f "
_BETWEEN = "\udfff"
"""Half of a pair, which is in no token."""
_NEVER = frozenset(map(chr, (0xC0, 0xC1, *range(0xF5, 0x100))))
"""Bytes that are in no UTF-8, as byte-level vocabularies write them."""
_HIGH = 128
"""Index of all that is not ASCII."""


class LeastTokens:
    """The bound for the texts of one tokenizer.

    Args:
        backend: of the tokenizer.
    """

    def __init__(self, backend: Backend):
        self._backend = backend

    def of(self, text: str) -> int:
        """Tokens that a text has at least; 0 where nothing is known."""
        if self._shares is None:
            return 0
        total = 0.0
        for start in range(0, len(text), SIZE):
            check_point()
            total += self._of_part(text[start : start + SIZE], self._shares)
        return max(0, int(total * (1 - 1e-9)))

    def _of_part(self, text: str, shares: np.ndarray) -> float:
        import numpy as np

        data = text.encode("utf-8", "surrogatepass")
        counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        ascii_counts = counts[:_HIGH].astype(np.float64)
        if not self._is_kept(text):
            # What is composed from an ASCII letter may be in a longer token than the letter.
            return float(ascii_counts.sum()) * float(shares.min()) - _COMPOSED
        # Of a byte-level vocabulary all bytes count, of others each character's first.
        n_high = int(counts[_HIGH if self._is_byte_level else 0xC0 :].sum())
        if not self._is_byte_level and (n_spaces := text.count(SPACE)):
            n_high -= n_spaces
            ascii_counts[ord(" ")] += n_spaces
        found = float(ascii_counts @ shares[:_HIGH]) + n_high * float(shares[_HIGH])
        return found - (_COMPOSED if self._forms and not text.isascii() else 0)

    def _is_kept(self, text: str) -> bool:
        """Whether the normalizers leave a text as it is, but for its ends and for spaces."""
        if text.isascii() or not self._forms:
            return True
        # A later Unicode leaves what is normalized as it is, unless a character is new.
        is_known = all(unicodedata.category(c) != "Cn" for c in set(text))
        return is_known and all(unicodedata.is_normalized(form, text) for form in self._forms)

    @cached_property
    def _forms(self) -> list[Any]:
        steps = steps_of(self._backend.normalizer) or []
        return [step["type"] for step in steps if step["type"] in NEUTRAL]

    @cached_property
    def _is_byte_level(self) -> bool:
        words = steps_of(self._backend.pre_tokenizer) or []
        return any(step.get("type") == "ByteLevel" for step in words)

    @cached_property
    def _shares(self) -> np.ndarray | None:
        """1/M of each ASCII character, and of all others; 0 for what may be left out."""
        import numpy as np
        from tokenizers.models import BPE

        model = self._backend.model
        if not isinstance(model, BPE) or not self._drops_nothing:
            return None
        if model.continuing_subword_prefix or model.end_of_word_suffix:
            return None
        added = self._backend.get_added_tokens_decoder()
        n = self._backend.get_vocab_size()
        tokens = {self._backend.id_to_token(i) or "" for i in range(n)}
        written = _written(self._is_byte_level)
        lengths = {token: len(token) for token in tokens}
        for token in added.values():  # not written in the vocabulary's alphabet
            for text in (token.content, self._normalized(token.content)):
                lengths[text] = len(text.encode() if self._is_byte_level else text)
        longest = _longest(lengths, written)
        known = _byte_level(tokens, written) if self._is_byte_level else _others(model, tokens)
        shares = np.where(known, 1.0 / longest, 0.0)
        if any(token.lstrip or token.rstrip for token in added.values()):
            shares[[ord(c) for c in _WHITE]] = 0.0
            shares[_HIGH] = 0.0
        return shares

    def _normalized(self, text: str) -> str:
        normalizer = self._backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    @property
    def _drops_nothing(self) -> bool:
        normalizers = steps_of(self._backend.normalizer)
        words = steps_of(self._backend.pre_tokenizer)
        if normalizers is None or words is None:
            return False
        return all(
            step.get("type") in NEUTRAL or writes_spaces(step) or prepends(step)
            for step in normalizers
        ) and all(map(_keeps_all, words))


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer only splits."""
    match step.get("type"):
        case "ByteLevel" | "Digits":
            return True
        case "Metaspace":
            return step.get("replacement") == SPACE
        case "Split" | "Punctuation":
            return step.get("behavior") not in (None, "Removed")
    return False


def _written(is_byte_level: bool) -> dict[str, str]:
    """How a vocabulary writes the ASCII characters that it writes otherwise."""
    if not is_byte_level:
        return {" ": SPACE}
    hidden = [*range(0x21), 0x7F]  # GPT-2's `bytes_to_unicode`
    return {chr(code): chr(0x100 + i) for i, code in enumerate(hidden)}


def _longest(lengths: Mapping[str, int], written: Mapping[str, str]) -> np.ndarray:
    """The length of the longest token with each ASCII character, and with any other."""
    import numpy as np

    falling = sorted(lengths, key=lengths.__getitem__, reverse=True)
    joined = _BETWEEN.join(falling)  # one search in it is as fast as the machine
    starts = list(itertools.accumulate((len(token) + 1 for token in falling), initial=0))

    def first_with(pattern: str) -> int:
        found = re.search(pattern, joined)
        return 1 if found is None else lengths[falling[bisect(starts, found.start()) - 1]]

    codes = [re.escape(chr(code)) for code in range(_HIGH)]
    ascii_ = [first_with(f"[{c}{written.get(chr(i), '')}]") for i, c in enumerate(codes)]
    others = first_with(f"[^\0-\x7f{_BETWEEN}{''.join(written.values())}]")
    return np.array([*ascii_, others], np.float64)


def _byte_level(tokens: set[str], written: Mapping[str, str]) -> np.ndarray:
    """Which characters are never left out of a text: those whose every byte is a token."""
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    known = [written.get(chr(code), chr(code)) in tokens for code in range(_HIGH)]
    shown = {written.get(chr(code), chr(code)) for code in range(_HIGH)} | _NEVER
    return np.array([*known, set(ByteLevel.alphabet()) - shown <= tokens])


def _others(model: BPE, tokens: set[str]) -> np.ndarray:
    """The same where a character that is no token may be written in bytes."""
    import numpy as np

    has_bytes = model.byte_fallback and all(f"<0x{code:02X}>" in tokens for code in range(256))
    named = [chr(code) if chr(code) != " " else SPACE for code in range(_HIGH)]
    return np.array([*(has_bytes or name in tokens for name in named), has_bytes])
