"""SentencePiece's BPE as its paper and source describe it, written for tests: slow and plain.

Symbols are characters; again and again the neighbours whose concatenation is the piece with the
highest score are joined, the leftmost of equals. User-defined pieces are found first, the longest
at each position, and are never joined. What is no piece becomes its bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Reference:
    """Encodes with a vocabulary of pieces, scores and types.

    Args:
        raw_user_defined: user-defined pieces hold plain spaces, as in a GGUF file.
    """

    def __init__(self, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]):
        self.scores = scores
        self.normal = {t: i for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k == 1}
        self.user = {
            t.replace(" ", "\u2581"): i
            for i, (t, k) in enumerate(zip(tokens, types, strict=True))
            if k == USER_DEFINED
        }
        self.longest = max(map(len, self.user), default=0)
        self.bytes = {t: i for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k == BYTE}
        self.unknown = types.index(UNKNOWN) if UNKNOWN in types else 0

    def encode(self, text: str, add_prefix: bool = False) -> list[int]:
        text = text.replace(" ", "\u2581")
        if add_prefix and text:
            text = "\u2581" + text
        ids: list[int] = []
        plain = ""
        at = 0
        while at < len(text):
            for n in range(min(self.longest, len(text) - at), 0, -1):
                if text[at : at + n] in self.user:
                    ids += self._join(plain)
                    ids.append(self.user[text[at : at + n]])
                    plain, at = "", at + n
                    break
            else:
                plain += text[at]
                at += 1
        return ids + self._join(plain)

    def _join(self, text: str) -> list[int]:
        symbols = list(text)
        after = list(range(1, len(text) + 1))
        before = list(range(-1, len(text) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left < 0 or right >= len(symbols):
                return
            joined = symbols[left] + symbols[right]
            if joined in self.normal:
                heapq.heappush(queue, (-self.scores[self.normal[joined]], left, right, joined))

        for i in range(len(text) - 1):
            consider(i, i + 1)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if symbols[left] + symbols[right] != joined or not symbols[left] or not symbols[right]:
                continue
            if after[left] != right:
                continue
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [i for symbol in symbols if symbol for i in self._ids(symbol)]

    def _ids(self, symbol: str) -> list[int]:
        if symbol in self.normal:
            return [self.normal[symbol]]
        if self.bytes:
            return [self.bytes[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return [self.unknown]
