"""Further names of models, for programs that insist on a name.

Invariants:
- An alias names a model, never another alias, and has the name of no built-in or stored model.
- Aliases lie in one file of the models folder, which is replaced as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from mlxkv.base import regular
from mlxkv.base.durable import write_whole
from mlxkv.base.paths import models_dir
from mlxkv.errors import MlxkvError, OutputError, UsageError, shortened

FILE = ".aliases.json"
"""No model has a name that starts with a dot."""
_PART = r"[A-Za-z0-9][A-Za-z0-9._@-]*"
SPELLING = re.compile(rf"{_PART}(?:[/:]{_PART})*")
_MAX_CHARS = 256


def stored_aliases() -> dict[str, str]:
    """The aliases of the models folder: the name of each, and its model.

    Raises:
        MlxkvError: the file is damaged.
    """
    path = models_dir() / FILE
    try:
        found = json.loads(regular.read_bytes(path))
    except OSError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise MlxkvError(f"{path} is damaged: it must map names to names of models; delete it")
    return found


def write_aliases(aliases: Mapping[str, str]) -> None:
    """Replace the aliases of the models folder.

    Raises:
        OutputError: the file cannot be written.
    """
    path = models_dir() / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dict(sorted(aliases.items())), indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error


def check_alias_spelling(name: str) -> None:
    """Refuse what is no name.

    Raises:
        UsageError: it is none.
    """
    if len(name) > _MAX_CHARS or not SPELLING.fullmatch(name) or name.endswith(".gguf"):
        raise UsageError(
            "an alias must be letters, digits, '.', '_', '-' and '@', in parts that '/' or ':' "
            f"joins; got {shortened(name)!r}"
        )
