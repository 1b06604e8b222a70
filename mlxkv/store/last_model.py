"""The name of the model that was run last, in a file of the models folder."""

from __future__ import annotations

from contextlib import suppress

from mlxkv.base import regular
from mlxkv.base.durable import write_whole
from mlxkv.base.paths import models_dir
from mlxkv.errors import MlxkvError
from mlxkv.store.refs import PathRef, locate

FILE = ".last-model"


def remember(name: str) -> None:
    """Note a model that is run; without effect where the folder cannot be written.

    Args:
        name: as for `refs.locate`; a path is made absolute.
    """
    path = models_dir() / FILE
    text = name
    with suppress(MlxkvError):  # of another machine
        ref = locate(name)
        text = str(ref.path.absolute()) if isinstance(ref, PathRef) else name
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text + "\n")


def recall() -> str | None:
    """The name of the model that was run last; None if there is none."""
    try:
        return regular.read_text(models_dir() / FILE).strip() or None
    except (OSError, ValueError):
        return None
