"""What conversations were told of their state, in memory and in a file for the next start.

A history that is lost costs KV and no correctness: the conversation is told its state as one that
is not known.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlxkv.base import durable, regular
from mlxkv.base.seal import seal_of_environment
from mlxkv.server.agents.state import Block, History
from mlxkv.server.agents.volatile import Piece

MAX_NAMES = 4096
MAX_CHARS = 16 << 20
FILE_CHARS = 512 << 10
"""Characters of distinct texts in the file, at most; the latest histories are kept."""
EVERY_S = 10.0
"""The file is written this often at most, and at the end."""
_VERSION = 1
_ALTERNATIVES = 4
_PLACE = "agent-prompts"


class StateMemory:
    """Histories by the name of the conversation up to a message.

    Args:
        file: where they are kept; None for memory alone.
        clock: seconds that only grow.
    """

    def __init__(self, file: Path | None = None, clock: Callable[[], float] = time.monotonic):
        self._file, self._clock = file, clock
        self._histories: OrderedDict[str, tuple[History, ...]] = OrderedDict()
        self._n_chars = 0
        self._seal = seal_of_environment()
        self._changed, self._written_at = False, clock()
        if file is not None:
            self._read(file)

    def get(self, name: str) -> Sequence[History]:
        """Those of a name, the latest first."""
        return self._histories.get(name, ())

    def put(self, name: str, history: History) -> None:
        """Remember what a conversation was told."""
        before = self._histories.pop(name, ())
        kept = [history, *(known for known in before if known != history)][:_ALTERNATIVES]
        self._n_chars += _n_chars(kept) - _n_chars(before)
        self._histories[name] = tuple(kept)
        while len(self._histories) > MAX_NAMES or self._n_chars > MAX_CHARS:
            self._n_chars -= _n_chars(self._histories.popitem(last=False)[1])
        self._changed = True
        if self._clock() - self._written_at >= EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the file, if there is one and something is new; a failure loses no more than it."""
        self._written_at = self._clock()
        if self._file is None or not self._changed:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            data = self._seal.seal(json.dumps(self._as_json()).encode(), _PLACE)
            durable.write_whole(self._file, data, mode=0o600)
            self._changed = False

    def _as_json(self) -> dict[str, Any]:
        """The latest histories; each text once."""
        texts: dict[str, int] = {}
        entries: list[Any] = []
        n_chars = 0
        for name, histories in reversed(self._histories.items()):
            used = {text for known in histories for text in _texts(known)}
            n_chars += sum(len(text) for text in used if text not in texts)
            if n_chars > FILE_CHARS:
                break
            for text in used:
                texts.setdefault(text, len(texts))
            shown = [
                [
                    [[block.at, texts[block.text]] for block in known.blocks],
                    [[piece.kind, texts[piece.text]] for piece in known.state],
                ]
                for known in histories
            ]
            entries.append([name, shown])
        return {"version": _VERSION, "texts": list(texts), "histories": entries[::-1]}

    def _read(self, path: Path) -> None:
        try:
            raw = json.loads(self._seal.unseal(regular.read_bytes(path), _PLACE))
            if raw["version"] != _VERSION:
                return
            texts = raw["texts"]
            found = {
                name: tuple(
                    History(
                        tuple(Block(int(at), str(texts[n])) for at, n in blocks),
                        tuple(Piece(str(kind), str(texts[n])) for kind, n in state),
                    )
                    for blocks, state in histories
                )
                for name, histories in raw["histories"]
            }
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return
        self._histories.update(found)
        self._n_chars = sum(map(_n_chars, found.values()))


def _texts(history: History) -> list[str]:
    return [*(block.text for block in history.blocks), *(piece.text for piece in history.state)]


def _n_chars(histories: Sequence[History]) -> int:
    return sum(len(text) for known in histories for text in _texts(known))
