"""How much is computed while there are no requests: `--idle-compute`.

- `off`: nothing.
- `light`: for an answer at most `LIGHT` tokens; pages of at most `FULL` are read on a guess.
- `full`: for an answer at most `FULL` tokens; pages are read on a guess.
- None, the default: `full`, and `light` while the machine runs on its battery.
"""

from __future__ import annotations

import sys

from mlxkv.base.power import Power
from mlxkv.errors import UsageError
from mlxkv.kv.types import STEP

CHOICES = ("off", "light", "full")
FULL = 4096
"""Tokens that are computed for an answer, at most."""
LIGHT = STEP
"""The same for `light`: one chunk."""


class IdleCompute:
    """How many tokens may be computed for an answer before its next turn comes.

    Args:
        choice: one of `CHOICES`; None for the default.
        power: of this machine.

    Raises:
        UsageError: another choice.
    """

    def __init__(self, choice: str | None = None, power: Power | None = None):
        if choice is not None and choice not in CHOICES:
            raise UsageError(
                f"must be one of {', '.join(CHOICES)}; got {choice!r}", field="idle_compute"
            )
        self._choice, self._power = choice, power or Power()
        if choice is None:
            self._power.refresh()  # so that it is known when an answer has ended

    @property
    def is_off(self) -> bool:
        """Whether nothing is computed at all."""
        return self._choice == "off"

    @property
    def choice(self) -> str:
        """What holds now, one of `CHOICES`."""
        return self._choice or ("light" if self._power.on_battery else "full")

    @property
    def read_limit(self) -> int:
        """Tokens whose pages may be read from disk before it is known which a request needs."""
        return {"off": 0, "light": FULL, "full": sys.maxsize}[self.choice]

    @property
    def limit(self) -> int:
        """Tokens for an answer that may be computed now."""
        return {"off": 0, "light": LIGHT, "full": FULL}[self.choice]
