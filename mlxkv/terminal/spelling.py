"""Fields as the command line spells them, for errors."""

from __future__ import annotations

from collections.abc import Mapping

from mlxkv.errors import Spelling


class Options(Spelling):
    """Options of a command.

    Args:
        names: field -> option or argument; None for `mlxkv run`, which has nearly all of them.
    """

    def __init__(self, names: Mapping[str, str] | None = None):
        self._names = names

    def name(self, field: str) -> str | None:
        if self._names is None:
            return f"--{field.replace('_', '-')}"
        return self._names.get(field)

    def setting(self, field: str, value: object) -> str | None:
        name = self.name(field)
        return name if name is None or value is True else f"{name} {value}"


RUN = Options()
