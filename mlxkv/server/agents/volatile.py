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
from collections import Counter
from dataclasses import dataclass

from mlxkv.server.agents.lines import join_around

MAX_PIECES = 64
"""A text with more is none of an agent's head, and stays as it is."""
_TAGS = r"env|environment(?:_context|_details)?|git_status|directory_structure"
_DATE = r"(?:the )?(?:today.s date|(?:current|local) (?:date(?:(?: and |/)time)?|time))"
_FOLDER = r"(?:primary |current )?(?:working directory|workspace folder|workspace directory|cwd)"
_REPOSITORY = r"is (?:(?:the |this )?directory )?a git repo(?:sitory)?|(?:git|current) branch"
_LINE = rf"{_DATE}|{_FOLDER}|{_REPOSITORY}".replace(" ", r"[ ]")
_VOLATILE = re.compile(
    rf"""
    ^[ \t]*<(?P<tag>{_TAGS})>(?:(?!</?(?P=tag)>).)*</(?P=tag)>[ \t]*$
    | ^(?P<git>gitStatus):.*? (?=^\#\ |^</?[a-zA-Z]|\Z)
    | ^[ \t]*(?:[-*][ \t]+)?(?P<line>{_LINE})(?::|[ ]is\b)[^\n]*$
    """,
    re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_REMINDER = re.compile(
    r"(?<=<system-reminder>)(?:(?!</?system-reminder>).)*(?=</system-reminder>)", re.DOTALL
)


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
    found = list(itertools.islice(_VOLATILE.finditer(text), MAX_PIECES + 1))
    if not found or len(found) > MAX_PIECES:
        return text, []
    stops = [0, *(match.end() for match in found)]
    starts = [*(match.start() for match in found), len(text)]
    kept = join_around([text[a:b] for a, b in zip(stops, starts, strict=True)])
    pieces: list[Piece] = []
    numbers: Counter[str] = Counter()
    for match in found:
        kind = (match["tag"] or match["git"] or match["line"]).lower()
        n, numbers[kind] = numbers[kind], numbers[kind] + 1
        pieces.append(Piece(f"{kind}#{n}" if n else kind, match[0].strip("\n")))
    return kept.rstrip("\n"), pieces


def cut_reminders(text: str) -> tuple[str, list[Piece]]:
    """The same of the `<system-reminder>` blocks in a text: what a client adds to a user's."""
    pieces: list[Piece] = []
    numbers = itertools.count(1)

    def shortened(found: re.Match[str]) -> str:
        n, (kept, some) = next(numbers), cut(found[0])
        if len(pieces) + len(some) > MAX_PIECES:
            return found[0]
        pieces.extend(Piece(f"reminder {n}: {piece.kind}", piece.text) for piece in some)
        return kept + "\n" if some else kept

    return _REMINDER.sub(shortened, text), pieces
