"""The fake engine with models that come and go."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mlxkv.engine.messages import Ask, Loaded
from mlxkv.errors import MlxkvError
from tests.support.command_line import chat_model
from tests.support.fake_engine import MODEL, FakeAnswer, FakeEngine, serving

STORED = "tiny:1k"
"""A model of the models folder."""


class LoadingEngine(FakeEngine):
    """Knows `fake`, which is loaded, and the models folder's `STORED`.

    Attributes:
        loads: (name, keep_alive_s) of what was loaded by name.
        unloads: names of what was to go.
        load_error: what loading raises.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As new."""
        super().__init__()
        self.models = {MODEL}
        self.loads: list[tuple[str, float | None]] = []
        self.unloads: list[str] = []
        self.load_error: MlxkvError | None = None

    def submit(self, ask: Ask) -> FakeAnswer:
        if ask.model in self.models and ask.model != MODEL:
            answer = super().submit(dataclasses.replace(ask, model=MODEL))
            self.asks[-1] = ask
            return answer
        return super().submit(ask)

    async def load(
        self, model: str, keep_alive_s: float | None = None, path: Path | None = None
    ) -> Path:
        if self.load_error is not None:
            raise self.load_error
        self.loads.append((model, keep_alive_s))
        self.models.add(model)
        return path or Path("models", model)

    async def unload(self, model: str, path: Path | None = None) -> bool:
        self.unloads.append(model)
        found = model in self.models
        self.models.discard(model)
        return found

    def loaded(self, owner: str | None = None) -> list[Loaded]:
        (one,) = super().loaded()
        until = datetime(2030, 1, 1, tzinfo=UTC)
        return [
            dataclasses.replace(one, name=name, size_bytes=5000, context=4096, until=until)
            for name in sorted(self.models)
        ]


@pytest.fixture(scope="module")
def made_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = chat_model(tmp_path_factory.mktemp("made") / "tiny-1k")
    record = {"name": STORED, "source": "gguf", "origin": "tiny.gguf", "license": "MIT"}
    (folder / "mlxkv.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def models(made_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with one model."""
    folder = tmp_path / "models"
    shutil.copytree(made_model, folder / made_model.name)
    monkeypatch.setenv("MLXKV_MODELS", str(folder))
    monkeypatch.setattr("mlxkv.store.hub.cached_repos", lambda *_: [])
    monkeypatch.setattr("mlxkv.store.hub.snapshots", lambda *_: [])
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[LoadingEngine, str]]:
    engine = LoadingEngine()
    with serving(engine) as found:
        yield engine, found


@pytest.fixture
def engine(server: tuple[LoadingEngine, str]) -> LoadingEngine:
    """The engine of the server, as new."""
    server[0].reset()
    return server[0]


@pytest.fixture
def address(server: tuple[LoadingEngine, str], engine: LoadingEngine, models: Path) -> str:
    return server[1]
