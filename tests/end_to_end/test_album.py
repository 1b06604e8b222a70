"""A folder of pictures as named KV: saved, asked about, and carried to another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import mlxkv
from mlxkv.cli import app
from tests.support.tiny_media import write_gemma3, write_gemma4

NAMES = ("barn.png", "cow.bmp", "dog.ppm")
NOTES, QUESTION = "Taken in May. " * 40, "Which of them is it?"


def run(*args: str) -> str:
    """What a command prints."""
    done = CliRunner().invoke(app, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def asked(*args: str) -> dict[str, Any]:
    return json.loads(run("run", "--json", "-n", "6", "--dtype", "float32", *args, QUESTION))


def album(folder: Path) -> Path:
    """Three pictures of one size, and a text."""
    folder.mkdir()
    for seed, name in enumerate(NAMES):
        levels = np.random.RandomState(seed).randint(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / name)
    (folder / "notes.txt").write_text(NOTES)
    return folder


def content_of(folder: Path) -> list[dict[str, Any]]:
    """What a user would send instead."""
    parts: list[dict[str, Any]] = []
    for name in NAMES:
        parts.append({"type": "text", "text": f"File {folder / name}:"})
        parts.append({"type": "image", "image": folder / name})
    return [*parts, {"type": "text", "text": f"File {folder / 'notes.txt'}:\n\n{NOTES}"}]


@pytest.mark.parametrize("write", [write_gemma3, write_gemma4])
def test_an_album_answers_as_its_pictures_would(write, tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    photos, model = album(tmp_path / "photos"), write(tmp_path / "models" / "eyes")
    monkeypatch.setenv("MLXKV_MODELS", str(model.parent))
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")

    saved = run("kv", "save", "album", "-m", "eyes", "--dtype", "float32", str(photos))
    card = json.loads(run("kv", "show", "album", "--json"))
    assert f"{card['tokens']:,} tokens of eyes" in saved
    assert [medium["name"] for medium in card["media"]] == list(NAMES)
    shown = run("kv", "show", "album")
    assert "pictures     3" in shown and all(name in shown for name in NAMES)

    messages = [{"role": "user", "content": content_of(photos)}]
    messages.append({"role": "user", "content": QUESTION})
    with mlxkv.load(model, dtype="float32") as llm:
        llm.pages = None
        llm._pages.update({"": None})
        expected = llm.generate(messages, max_tokens=6)
    answer = asked("--kv-from", "album")
    # The command counts the token that ends an answer; `Result.tokens` does not.
    assert answer["tokens"][: len(expected.tokens)] == expected.tokens
    assert (answer["text"], answer["finish_reason"]) == (expected.text, expected.finish_reason)
    assert answer["stats"]["prompt_tokens"] == expected.stats.prompt_tokens
    assert answer["stats"]["restored_ssd_tokens"] == card["tokens"]

    for path in (tmp_path / "kv").rglob("*.*"):  # on disk lie KV, hashes and names
        content = path.read_bytes()
        for name in NAMES:
            pixels = np.asarray(Image.open(photos / name)).tobytes()
            assert pixels[1000:1016] not in content
            assert (photos / name).read_bytes()[60:76] not in content

    (photos / NAMES[0]).unlink()  # a name needs its pictures no more
    file, key = str(tmp_path / "album.kv"), str(tmp_path / "key")
    run("kv", "keygen", key)
    run("kv", "export", "album", file, "--sign", key)
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "there"))
    assert "--trust PUBKEY" in run("kv", "import", file, "--name", "unsigned")
    run("kv", "import", file, "--trust", f"{key}.pub")
    again = asked("--kv-from", "album")
    assert again["tokens"] == answer["tokens"]
    assert again["stats"]["restored_ssd_tokens"] == card["tokens"]
