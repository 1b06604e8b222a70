"""What agents tell of the moment inside a prompt's beginning: date, folder, state of a repository.

`cut` takes it out of a text. What it takes, always whole lines:

- `<env>`, `<environment>`, `<environment_context>`, `<environment_details>`, `<git_status>` and
  `<directory_structure>`, with all inside;
- from a line that begins with `gitStatus:` to the next heading (`# `) or tag, or to the end;
- single lines, perhaps with a list's dash: "Today's date", "Current date", "Current time",
  "Working directory", "Primary working directory", "Is directory a git repo", "Git branch", ...
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

_TAGS = r"env|environment(?:_context|_details)?|git_status|directory_structure"
_DATE = r"(?:the )?(?:today.s date|(?:current|local) (?:date(?:(?: and |/)time)?|time))"
_FOLDER = r"(?:primary |current )?(?:working directory|workspace folder|workspace directory|cwd)"
_REPOSITORY = r"is (?:(?:the |this )?directory )?a git repo(?:sitory)?|(?:git|current) branch"
_LINE = rf"{_DATE}|{_FOLDER}|{_REPOSITORY}".replace(" ", r"[ ]")
_VOLATILE = re.compile(
    rf"""
    ^[ \t]*<(?P<tag>{_TAGS})>.*?</(?P=tag)>[ \t]*$
    | ^(?P<git>gitStatus):.*? (?=^\#\ |^</?[a-zA-Z]|\Z)
    | ^[ \t]*(?:[-*][ \t]+)?(?P<line>{_LINE})(?::|[ ]is\b)[^\n]*$
    """,
    re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_REMINDER = re.compile(r"(?<=<system-reminder>).*?(?=</system-reminder>)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that was cut out.

    Args:
        kind: what it is about; two pieces of one kind are two states of one thing.
        text: the lines.
    """

    kind: str
    text: str


def cut(text: str) -> tuple[str, list[Piece]]:
    """A text without what is volatile, and that; a text without any stays as it is."""
    kept, pieces, at = "", [], 0
    for found in _VOLATILE.finditer(text):
        between = text[at : found.start()]
        kept = _joined(kept, between) if pieces else between
        kind = (found["tag"] or found["git"] or found["line"]).lower()
        n = sum(piece.kind.partition("#")[0] == kind for piece in pieces)
        pieces.append(Piece(f"{kind}#{n}" if n else kind, found[0].strip("\n")))
        at = found.end()
    if not pieces:
        return text, []
    return _joined(kept, text[at:]).rstrip("\n"), pieces


def cut_reminders(text: str) -> tuple[str, list[Piece]]:
    """The same of the `<system-reminder>` blocks in a text: what a client adds to a user's."""
    pieces: list[Piece] = []
    numbers = itertools.count(1)

    def shortened(found: re.Match[str]) -> str:
        n, (kept, some) = next(numbers), cut(found[0])
        pieces.extend(Piece(f"reminder {n}: {piece.kind}", piece.text) for piece in some)
        return kept + "\n" if some else kept

    return _REMINDER.sub(shortened, text), pieces


def _joined(before: str, after: str) -> str:
    """Texts on either side of what was cut out, with the empty lines of one side."""
    if not before:
        return after.lstrip("\n")
    head, tail = before.rstrip("\n"), after.lstrip("\n")
    return head + "\n" * max(len(before) - len(head), len(after) - len(tail)) + tail
