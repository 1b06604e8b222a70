"""What conversations were told is known after a restart, bounded, and never an error."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from mlxkv.server.agents import state_memory
from mlxkv.server.agents.state import Block, History
from mlxkv.server.agents.state_memory import EVERY_S, StateMemory
from mlxkv.server.agents.volatile import Piece


def history(text: str, at: int = 1) -> History:
    return History((Block(at, f"<{text}>"),), (Piece("git", text),))


def test_the_next_start_knows_what_was_saved(tmp_path: Path):
    file = tmp_path / "kv" / "told.json"
    memory = StateMemory(file)
    memory.put("a", history("1"))
    memory.put("a", history("2", 3))
    memory.put("b", history("1"))
    memory.save()
    again = StateMemory(file)
    assert again.get("a") == (history("2", 3), history("1"))
    assert again.get("b") == (history("1"),)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["told.json"]


def test_it_saves_by_itself_but_not_each_time(tmp_path: Path):
    now, file = [0.0], tmp_path / "told.json"
    memory = StateMemory(file, lambda: now[0])
    memory.put("a", history("1"))
    assert not file.exists()
    now[0] = EVERY_S
    memory.put("b", history("1"))
    assert len(json.loads(file.read_text())["histories"]) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "texts": [], "histories": [["a", [[[[0, 4]], []]]]]}',
        b'{"version": 1, "texts": ["x"], "histories": [["a", 7]]}',
    ],
)
def test_a_file_that_cannot_be_read_is_as_none(tmp_path: Path, content: bytes):
    file = tmp_path / "told.json"
    file.write_bytes(content)
    memory = StateMemory(file)
    assert memory.get("a") == ()
    memory.put("a", history("1"))
    memory.save()
    assert StateMemory(file).get("a") == (history("1"),)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path):
    (tmp_path / "kv").write_text("a file")
    memory = StateMemory(tmp_path / "kv" / "told.json")
    memory.put("a", history("1"))
    memory.save()
    assert memory.get("a") == (history("1"),)


def test_the_oldest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state_memory, "MAX_NAMES", 2)
    memory = StateMemory()
    for name in "abac":
        memory.put(name, history(name))
    assert [bool(memory.get(name)) for name in "abc"] == [True, False, True]


def test_texts_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state_memory, "MAX_CHARS", 1000)
    memory = StateMemory()
    for i in range(50):
        memory.put(str(i), history(f"{i:0100}"))
    assert [i for i in range(50) if memory.get(str(i))] == [46, 47, 48, 49]


def test_the_file_has_each_text_once_and_the_latest(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(state_memory, "FILE_CHARS", 450)
    file = tmp_path / "told.json"
    memory = StateMemory(file)
    for i in range(6):
        memory.put(str(i), history(f"{i // 2:0100}"))
    memory.save()
    again = StateMemory(file)
    assert [i for i in range(6) if again.get(str(i))] == [2, 3, 4, 5]
    assert len(json.loads(file.read_text())["texts"]) == 4
