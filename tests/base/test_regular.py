"""A pipe, a socket, a device or a folder in place of a file is one line at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlxkv.base import regular
from mlxkv.commands.inputs import answer_format, read
from mlxkv.convert import convert
from mlxkv.errors import CheckpointError, MlxkvError, UsageError
from mlxkv.models.loader import lay_out
from mlxkv.sampling.params import recommended
from mlxkv.saved_kv import signature
from mlxkv.saved_kv.archive import open_archive
from mlxkv.server.edge.api_keys import read_keys
from mlxkv.store.info import describe
from mlxkv.store.settings import effective
from mlxkv.text.tokenizer import Tokenizer
from tests.support.command_line import chat_model


@pytest.fixture
def pipe(tmp_path) -> Path:
    """A named pipe that nothing writes into: opening it to read would wait for ever."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_what_is_no_file_is_named(tmp_path, pipe):
    with pytest.raises(regular.NotAFile, match="a pipe, not a file"):
        regular.open_file(pipe)
    with pytest.raises(regular.NotAFile, match="a device, not a file"):
        regular.read_bytes(Path("/dev/zero"))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        with pytest.raises(regular.NotAFile, match="a socket, not a file"):
            regular.read_bytes(tmp_path / "s")
    with pytest.raises(IsADirectoryError):
        regular.read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        regular.read_bytes(tmp_path / "missing")


def test_a_file_that_becomes_a_pipe_in_between_is_not_waited_for(tmp_path, pipe, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    stat = file.stat()
    monkeypatch.setattr(os, "stat", lambda *_, **__: stat)
    with pytest.raises(regular.NotAFile):
        regular.open_file(pipe)


def test_text_has_its_line_ends_as_newlines(tmp_path):
    (tmp_path / "text").write_bytes(b"a\r\nb\rc\n")
    assert regular.read_text(tmp_path / "text") == "a\nb\nc\n"


def put(pipe: Path, at: Path) -> None:
    at.unlink(missing_ok=True)
    at.parent.mkdir(exist_ok=True)
    at.symlink_to(pipe)


NAMES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "generation_config.json", "mlxkv.json",
         "model.safetensors.index.json")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_in_place_of_a_models_file_is_an_error_at_once(tmp_path, pipe, name):
    path = chat_model(tmp_path / "m")
    put(pipe, path / name)
    with pytest.raises(MlxkvError, match=f"{name}.*pipe, not a file"):
        layout = lay_out(path)
        describe("m", path, layout)
        Tokenizer.from_dir(path)
        effective(path)
        recommended(path)


def test_a_pipe_in_place_of_a_readme_is_left_out(tmp_path, pipe):
    path = chat_model(tmp_path / "m")
    put(pipe, path / "README.md")
    assert describe("m", path, lay_out(path)).license == ""


@pytest.mark.parametrize("name", ["m.gguf", "model.safetensors"])
def test_a_pipe_in_place_of_what_is_converted_is_an_error_at_once(tmp_path, pipe, name):
    path = chat_model(tmp_path / "m")
    put(pipe, path / name)
    with pytest.raises(MlxkvError):
        convert(path / name if name == "m.gguf" else path, tmp_path / "out")


def test_a_pipe_in_place_of_what_a_command_reads_is_an_error_at_once(pipe):
    with pytest.raises(UsageError, match="a pipe, not a file"):
        read([str(pipe)])
    with pytest.raises(UsageError, match="a pipe, not a file"):
        answer_format(str(pipe))
    with pytest.raises(CheckpointError, match="a pipe, not a file"), open_archive(pipe):
        pass
    with pytest.raises(CheckpointError, match="a pipe, not a file"):
        signature._digest(pipe)
    with pytest.raises(UsageError, match="a pipe, not a file"):
        read_keys(pipe)


def test_a_pipe_that_the_shell_has_opened_is_read():
    reader, writer = os.pipe()
    os.write(writer, b"from a command")
    os.close(writer)
    try:
        assert read([f"/dev/fd/{reader}"]) == "from a command"
    finally:
        os.close(reader)
