"""Where a write fails midway nothing is half there: what was there stays, no draft is left behind,
and the message is one line. RLIMIT_FSIZE makes real writes fail at a byte, as a full disk does."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mlxkv
from mlxkv.base import durable
from mlxkv.bench import report
from mlxkv.convert import convert
from mlxkv.errors import OutputError
from mlxkv.prefix import fingerprint
from mlxkv.saved_kv.registry import KVNames
from mlxkv.store import aliases, last_model
from mlxkv.store.derive import derive
from tests.support.command_line import chat_model


@contextmanager
def full_after(n_bytes: int) -> Iterator[None]:
    """No file may be written past so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """A folder in which everything has been written once."""
    home = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MODELS", "KV"):
            patch.setenv(f"MLXKV_{name}", str(home / name.lower()))
        patch.setenv("MLXKV_KV_DISK", "64MiB")
        path = chat_model(home / "models/m")
        convert(path, home / "made")
        aliases.write_aliases({"a": "m"})
        last_model.remember("m")
        report.write({"a": 1}, home / "report.json")
        with mlxkv.load(path, dtype="float32") as llm:
            llm.save_kv("name", "a" * 600)
        KVNames(home / "kv").export("name", home / "name.kv")
        yield home


def content(home: Path) -> dict[str, bytes]:
    """All files but locks and the day's count of written bytes."""
    return {
        str(file.relative_to(home)): file.read_bytes()
        for file in sorted(home.rglob("*"))
        if file.is_file() and "lock" not in file.name and file.name != "written.json"
    }


def save_other(home: Path) -> None:
    with mlxkv.load(home / "models/m", dtype="float32") as llm:
        llm.save_kv("other", "b" * 600)


WRITES: dict[str, Callable[[Path], object]] = {
    "aliases": lambda home: aliases.write_aliases({"b": "m" * 3000}),
    "report": lambda home: report.write({"a": "b" * 3000}, home / "report.json"),
    "new report": lambda home: report.write({"a": "b" * 3000}, home / "other.json"),
    "kv save": save_other,
    "kv export": lambda home: KVNames(home / "kv").export("name", home / "other.kv"),
    "kv import": lambda home: KVNames(home / "kv").import_(home / "name.kv", name="other"),
    "convert": lambda home: convert(home / "models/m", home / "out"),
    "convert over": lambda home: convert(home / "models/m", home / "made", overwrite=True),
    "derive": lambda home: derive(home / "models/m", "other", quantize="q8"),
}


@pytest.mark.parametrize("n_bytes", [0, 1000])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_fails_leaves_nothing_half(home, name, n_bytes):
    before = content(home)
    with full_after(n_bytes), pytest.raises(OutputError) as caught:
        WRITES[name](home)
    assert "\n" not in str(caught.value)
    after = content(home)
    assert {file for file in after if file not in before} == set()
    assert after == before


@pytest.mark.parametrize("n_bytes", [0, 5])
def test_what_may_fail_in_silence_keeps_what_was_there(home, n_bytes):
    before = content(home)
    with full_after(n_bytes):
        last_model.remember("a-longer-name-than-before")
        fingerprint._remember(home / "kv" / "fingerprints.json", str(home), [], "0" * 64)
    assert content(home) == before
    assert last_model.recall() == "m"


def test_a_file_that_is_replaced_keeps_its_permissions_and_its_link(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    durable.write_whole(tmp_path / "link", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    durable.write_whole(Path("/dev/null"), "nowhere")
