from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlxkv.errors import CheckpointError, ModelNotFound
from mlxkv.prefix import fingerprint as module
from mlxkv.prefix.fingerprint import fingerprint

TICK_S = 0.05
"""More than the tick of a file system's clock: a hash is kept only of files older than that."""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "kv" / "fingerprints.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory of two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for i in (1, 2):
        array = np.arange(3000, dtype=np.float32) * i
        save_file({f"w{i}": array}, folder / f"model-0000{i}-of-00002.safetensors")
    time.sleep(TICK_S)
    return folder


def taken(model: Path, cache: Path, *, dtype: str = "bfloat16", kv_type: str = "native") -> str:
    return fingerprint(model, dtype=dtype, kv_type=kv_type, cache=cache)


def shard(model: Path, i: int = 2) -> Path:
    return model / f"model-0000{i}-of-00002.safetensors"


def flip(path: Path, at: int = -1) -> None:
    """Change one byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(at, 2 if at < 0 else 0)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, one for each block."""
    names: list[str] = []
    original = module._hash

    def count(file: Path, start: int, n_bytes: int) -> str:
        names.append(file.name)
        return original(file, start, n_bytes)

    monkeypatch.setattr(module, "_hash", count)
    return names


def test_a_copy_elsewhere_has_the_same_fingerprint(model, cache, tmp_path):
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(model, copy)
    (copy / "README.md").write_text("says nothing about the weights")
    assert taken(copy, cache) == taken(model, cache) == taken(model, tmp_path / "other.json")
    assert len(taken(model, cache)) == 64


def test_links_to_the_files_have_the_same_fingerprint(model, cache, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for path in model.iterdir():
        (links / path.name).symlink_to(path)
    assert taken(links, cache) == taken(model, cache)


@pytest.mark.parametrize("which", ["config.json", "model-00001-of-00002.safetensors"])
def test_one_changed_byte_gives_another(model, cache, which):
    before = taken(model, cache)
    if which == "config.json":
        (model / which).write_text('{"model_type": "llamb"}')
    else:
        flip(model / which)
    assert taken(model, cache) != before


def test_dtype_kv_type_and_format_each_give_another(model, cache, monkeypatch):
    seen = {taken(model, cache), taken(model, cache, dtype="float32")}
    of_layers = "q8", "k8v4", "k8v4,1=q8", "k8v4,2=q8"
    seen |= {taken(model, cache, kv_type=kv_type) for kv_type in of_layers}
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    assert len(seen | {taken(model, cache)}) == 7


def test_shards_that_swap_their_names_give_another(model, cache):
    before = taken(model, cache)
    shard(model, 1).rename(model / "x")
    shard(model, 2).rename(shard(model, 1))
    (model / "x").rename(shard(model, 2))
    assert taken(model, cache) != before


def test_the_second_call_reads_no_weights(model, cache, hashed):
    first = taken(model, cache)
    assert sorted(hashed) == sorted([shard(model, 1).name, shard(model, 2).name, "config.json"])
    hashed.clear()
    opened = []
    real_open = os.open

    def watch(path, *args, **kwargs):
        opened.append(path)
        return real_open(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", watch)
        patch.setattr(module, "open_weights", lambda _: pytest.fail("headers were read"))
        assert taken(model, cache) == first
        assert taken(model, cache, kv_type="q4") != first
    assert hashed == [] and not [path for path in opened if Path(path).is_relative_to(model)]


def test_only_files_that_the_model_uses_count_and_a_new_one_is_seen(model, cache, hashed):
    before = taken(model, cache)
    array = np.zeros(4, np.float32)
    save_file({"other": array}, model / "adapter.safetensors")
    assert taken(model, cache) == before
    save_file({"w3": array}, model / "model-00003.safetensors")
    assert taken(model, cache) != before


def test_another_file_of_the_same_size_and_time_is_seen(model, cache):
    before = taken(model, cache)
    path = shard(model)
    about = path.stat()
    assert about.st_ino in [entry[-1] for entry in module._signature(model)]
    other = path.with_name("other")
    shutil.copy(path, other)
    flip(other)
    os.utime(other, ns=(about.st_atime_ns, about.st_mtime_ns))
    other.rename(path)
    assert path.stat().st_size == about.st_size and path.stat().st_mtime_ns == about.st_mtime_ns
    assert taken(model, cache) != before


def test_a_file_changed_in_place_and_set_back_is_told_by_its_change_of_status(model, cache):
    before = taken(model, cache)
    path = shard(model)
    about = path.stat()
    time.sleep(TICK_S)
    flip(path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (about.st_ino, about.st_mtime_ns)
    assert taken(model, cache) != before


def test_the_hash_of_files_that_just_changed_is_not_kept(model, cache, monkeypatch):
    flip(shard(model))
    changed = shard(model).stat().st_ctime_ns

    def taken_after(age_ns: int) -> None:
        clock = SimpleNamespace(time_ns=lambda: changed + age_ns, time=time.time)
        monkeypatch.setattr(module, "time", clock)
        taken(model, cache)

    taken_after(5_000_000)
    assert not cache.exists(), "one more change in the same tick would not show"
    taken_after(50_000_000)
    assert cache.exists()


@pytest.mark.parametrize(("age_s", "settled"), [(1.5, False), (2.5, True)])
def test_times_in_whole_seconds_must_be_older(age_s, settled):
    now = 1_700_000_010_500_000_000
    changed = (now - int(age_s * 1e9)) // 10**9 * 10**9
    assert module._settled([["a", 1, changed, changed, 7]], now) is settled


def test_a_file_that_changes_while_it_is_hashed_is_not_kept(model, cache, monkeypatch):
    original = module._content

    def change(folder: Path) -> str:
        content = original(folder)
        flip(shard(model))
        return content

    monkeypatch.setattr(module, "_content", change)
    taken(model, cache)
    assert not cache.exists()


def test_the_result_does_not_depend_on_threads_or_chunks_and_blocks_are_hashed_apart(
    model, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(module, "_MAX_THREADS", 3)
    result = taken(model, cache)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(module, "_MAX_THREADS", 1)
    assert taken(model, tmp_path / "b.json") == result
    parts = []
    for path in sorted(model.iterdir()):
        data = path.read_bytes()
        for start in range(0, len(data), 1000):
            block = data[start : start + 1000]
            parts.append([path.name, start, len(block), hashlib.sha256(block).hexdigest()])
    content = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    expected = json.dumps([module.FORMAT_VERSION, content, "bfloat16", "native"])
    assert result == hashlib.sha256(expected.encode()).hexdigest()


def test_packed_kv_in_another_layout_has_another_fingerprint(model, cache):
    """Pages of the layout before, keys and values apart, were named after the format alone."""
    taken(model, cache)
    content = json.loads(cache.read_bytes())[str(model.resolve())]["content"]
    for kv_type in ("q8", "q4"):
        before = json.dumps([module.FORMAT_VERSION, content, "bfloat16", kv_type])
        assert taken(model, cache, kv_type=kv_type) != hashlib.sha256(before.encode()).hexdigest()


def test_the_cache_is_private_and_forgets_directories_that_are_gone(model, cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    time.sleep(TICK_S)
    taken(copy, cache)
    shutil.rmtree(copy)
    taken(model, cache)
    assert list(json.loads(cache.read_text())) == [str(model.resolve())]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.parent.stat().st_mode) == 0o700
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"%s": 3}', '{"%s": {"files": []}}'])
def test_a_damaged_cache_is_made_anew(model, cache, text, tmp_path):
    expected = taken(model, tmp_path / "other.json")
    cache.parent.mkdir()
    cache.write_text(text.replace("%s", str(model.resolve())))
    assert taken(model, cache) == expected
    assert str(model.resolve()) in json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_only_costs_time(model, tmp_path):
    (tmp_path / "file").write_text("")
    assert taken(model, tmp_path / "file" / "x.json") == taken(model, tmp_path / "y.json")


def test_no_model_is_an_error(tmp_path, cache):
    with pytest.raises(ModelNotFound):
        taken(tmp_path / "none", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound):
        taken(tmp_path / "empty", cache)


def test_a_file_that_cannot_be_read_is_an_error(model, cache):
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        taken(model, cache)


def test_a_file_that_shrinks_is_an_error(model):
    with pytest.raises(CheckpointError, match="shrank"):
        module._hash(shard(model), 0, 1 << 20)


def test_weights_written_by_mlx_are_hashed_too(tmp_path, cache):
    folder = tmp_path / "mlx"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    mx.save_safetensors(str(folder / "model.safetensors"), {"w": mx.zeros((3,), mx.bfloat16)})
    assert len(taken(folder, cache)) == 64


def test_killed_writers_of_the_cache_leave_nothing_for_long(model, cache):
    cache.parent.mkdir()
    stale = cache.with_name(f".{cache.name}.0badcafe")
    stale.write_text("")
    os.utime(stale, (1, 1))
    fresh = cache.with_name(f".{cache.name}.12345678")
    fresh.write_text("another process is writing it")
    taken(model, cache)
    assert not stale.exists() and fresh.exists()
