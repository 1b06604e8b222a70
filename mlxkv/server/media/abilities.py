"""What a model takes beside text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlxkv.engine.messages import Engine
from mlxkv.errors import MlxkvError
from mlxkv.media.pixels import BUDGETS, Patches
from mlxkv.media.reader import reader_of
from mlxkv.server.model_names import LocalModel
from mlxkv.server.threads import run_in_threadpool
from mlxkv.store import resolve
from mlxkv.store.encoders import encoders_in


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a model takes.

    Args:
        kinds: `image`, `audio`.
        budgets: tokens that a picture may have, ascending, where they can be chosen.
    """

    kinds: frozenset[str] = frozenset()
    budgets: tuple[int, ...] = ()

    def budget(self, detail: str | None) -> int | None:
        """Tokens of a picture by OpenAI's `detail`; None for the model's own choice."""
        if not self.budgets or detail in (None, "auto"):
            return None
        return self.budgets[0] if detail == "low" else self.budgets[-1]


async def abilities_of(engine: Engine, model: LocalModel) -> Abilities:
    """What a model on this machine takes, by its files."""
    loaded = {each.name: Path(each.path) for each in engine.loaded()}
    return await run_in_threadpool(_by_files, model, loaded.get(model.name))


def _by_files(model: LocalModel, loaded: Path | None) -> Abilities:
    try:
        path = model.path or loaded or resolve.resolve(model.name, fetch=False)
        reader = reader_of(path)
        kinds = frozenset() if reader is None else reader.kinds & encoders_in(path)
    except MlxkvError:  # the engine tells what is wrong with it
        return Abilities()
    if reader is None:
        return Abilities()
    return Abilities(kinds, BUDGETS if isinstance(reader.images, Patches) else ())
