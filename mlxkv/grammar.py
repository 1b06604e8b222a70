"""Grammars that an answer has to match."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer has to match.

    Args:
        kind: `json_object`, `json_schema`, `regex`, `lark`, or `tools` (calls of functions, in the
            format of the model's family).
        text: the schema as JSON, the regex, the grammar; for `tools` a JSON object, see `tools`.
    """

    kind: str
    text: str = ""
