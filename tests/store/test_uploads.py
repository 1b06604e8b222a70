"""Files that clients send, and the adapters that they are."""

import hashlib
import io
import os

import pytest

from mlxkv.base import durable
from mlxkv.errors import OutputError, UsageError
from mlxkv.store import adapter_names, uploads

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path))
    return tmp_path / ".uploads"


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def sent(content: bytes) -> str:
    upload = uploads.Upload(digest_of(content), len(content))
    upload.write(content)
    upload.finish()
    upload.close()
    return digest_of(content)


def test_a_file_has_its_name_when_a_power_cut_leaves_it_whole(monkeypatch):
    path, noted = uploads.path_of(digest_of(b"new")), []
    monkeypatch.setattr(
        durable, "sync", lambda handle: noted.append((os.fstat(handle).st_size, path.exists()))
    )
    sent(b"new")
    assert noted == [(3, False)]


def test_two_files_of_one_name_are_refused_and_neither_is_written_to():
    files = {f"a/{CONFIG}": sent(b"{}"), WEIGHTS: sent(b"0"), f"b/{CONFIG}": sent(b"other")}
    with pytest.raises(UsageError, match=f"must have one {CONFIG}"), uploads.adapters_of(files):
        pass
    for content in (b"{}", b"0", b"other"):
        assert uploads.path_of(digest_of(content)).read_bytes() == content


def test_files_are_so_many_adapters_at_most_with_those_beside_them():
    digest = sent(b"GGUF")
    files = {f"{i}.gguf": digest for i in range(adapter_names.MOST)}
    with uploads.adapters_of(files) as refs:
        assert [ref.path.read_bytes() for ref in refs] == [b"GGUF"] * adapter_names.MOST
    with pytest.raises(UsageError, match="8 at most; got 9"), uploads.adapters_of(files, 1):
        pass


def test_an_upload_that_the_disk_has_no_room_for_leaves_nothing(folder):
    upload = uploads.Upload(digest_of(b"."))
    upload._file.close()
    upload._file = open("/dev/full", "wb")  # noqa: PTH123, SIM115
    upload.write(b".")
    with pytest.raises(OutputError, match="No space left"):
        for _ in range(io.DEFAULT_BUFFER_SIZE):
            upload.write(b".")
    upload.close()
    assert not [*folder.iterdir()]


def test_what_a_killed_process_left_is_removed_when_it_is_old(folder):
    sent(b"new")
    for name in (".work-killed", ".work-new"):
        (folder / name).mkdir()
        (folder / name / WEIGHTS).touch()
    os.utime(folder / ".work-killed", (0, 0))
    sent(b"newer")
    assert {path.name for path in folder.glob(".*")} == {".work-new"}
