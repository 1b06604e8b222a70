"""Room on a disk is asked for first, in words that tell two sizes apart."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

import mlxkv
from mlxkv.base.disk import check_space
from mlxkv.base.units import told_apart
from mlxkv.errors import OutputError
from mlxkv.generation.session import Session
from mlxkv.saved_kv.registry import KVNames
from mlxkv.store.hub import PART
from mlxkv.store.hub_fetch import fetch_checkpoint
from mlxkv.store.hub_files import HubFile, Listing
from mlxkv.store.resolve import silent
from tests.support.command_line import chat_model


@pytest.mark.parametrize(
    ("more", "less", "texts"),
    [
        (11 << 20, 10 << 20, ("11.0 MiB", "10.0 MiB")),
        ((1 << 30) + 1, 1 << 30, ("1,073,741,825 bytes", "1,073,741,824 bytes")),
        (5, 5, ("5 B", "5 B")),
    ],
)
def test_two_sizes_never_read_the_same_unless_they_are(more, less, texts):
    assert told_apart(more, less) == texts


def has_free(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=n_bytes))


def test_a_folder_that_is_not_there_yet_is_on_its_parents_disk(tmp_path, monkeypatch):
    has_free(monkeypatch, 100)
    check_space(tmp_path / "a/b", 100, "it", "do so")
    with pytest.raises(OutputError) as caught:
        check_space(tmp_path / "a/b", 101, "it", "do so")
    assert str(caught.value) == f"it needs 101 B, and {tmp_path} has 100 B free: do so"


def test_kv_that_cannot_fit_is_not_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "200KiB")
    computed = []
    monkeypatch.setattr(Session, "prefill", lambda *_, **__: computed.append(1))
    with (
        mlxkv.load(chat_model(tmp_path / "m"), dtype="float32") as llm,
        pytest.raises(OutputError, match=r"of 512 tokens does not fit .* room for 1\d\d KiB at"),
    ):
        llm.save_kv("name", "a" * 512)
    assert not computed and not KVNames(tmp_path / "kv").list()


def test_an_export_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "64MiB")
    with mlxkv.load(chat_model(tmp_path / "m"), dtype="float32") as llm:
        llm.save_kv("name", "a" * 300)
    has_free(monkeypatch, 1000)
    names = KVNames(tmp_path / "kv")
    with pytest.raises(OutputError, match=r"out\.kv: needs .* has 1000 B free"):
        names.export("name", tmp_path / "out.kv")
    assert not (tmp_path / "out.kv").exists()


def test_a_download_asks_for_the_room_of_what_it_lacks(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    sizes = {"model.safetensors": 900, "model.bin": 9000, "config.json": None}
    files = {name: HubFile(name, size, name) for name, size in sizes.items()}
    listing = Listing("a/b", None, "c" * 40, files)
    has_free(monkeypatch, 899)
    with pytest.raises(OutputError, match=r"downloading a/b needs 900 B, .* has 899 B free"):
        fetch_checkpoint(listing, silent)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"model.safetensors{PART}").write_bytes(bytes(100))
    has_free(monkeypatch, 799)
    with pytest.raises(OutputError, match="needs 800 B"):
        fetch_checkpoint(listing, silent)
