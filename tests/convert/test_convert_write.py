"""The writer: bounded memory, and nothing that looks finished unless it is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.convert import convert, write
from mlxkv.convert.quality.measure import Measure
from mlxkv.errors import CheckpointError, OutputError
from tests.support import tiny
from tests.support.gguf_files import write_model
from tests.support.paths import ROOT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        **options,
    )


def sparse_checkpoint(folder: Path, n_layers: int, n_shards: int) -> int:
    """A sharded float32 Llama of zeros, holes on the disk; the bytes of its tensors.

    Each shard is a file cut to its size: the file system stores nothing for it, the reader sees
    zeros.
    """
    config = tiny.llama_config(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=65536,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tiny.tensor_shapes(config)
    weight_map, total = {}, 0
    for i in range(n_shards):
        header: dict[str, Any] = {}
        offset = 0
        for name in list(shapes)[i::n_shards]:
            n_bytes = 4 * int(np.prod(shapes[name]))
            header[name] = {
                "dtype": "F32",
                "shape": list(shapes[name]),
                "data_offsets": [offset, offset + n_bytes],
            }
            offset += n_bytes
            weight_map[name] = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


MEASURED = """
import resource, sys
from mlxkv.convert import convert
import mlx.core as mx, numpy, safetensors, json, mlxkv.models.loader, mlxkv.models.llama
mx.eval(mx.quantize(mx.zeros((64, 64))))
def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = peak()
convert(sys.argv[1], sys.argv[2], **eval(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.parametrize("options", ["dict(quantize='affine4')", "dict(dtype='float16')"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, options: str):
    """870 MB of tensors, the largest two of 268 MB: what the process grows by is less than half of
    one of them, a few blocks of rows (4 MiB each) whatever the sizes."""
    total = sparse_checkpoint(tmp_path / "hf", n_layers=8, n_shards=4)
    assert total > 870e6
    done = run(MEASURED, str(tmp_path / "hf"), str(tmp_path / "out"), options)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120e6
    shutil.rmtree(tmp_path / "out")


def test_blocks_of_rows_give_what_the_whole_tensor_gives(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    gguf = write_model(tmp_path / "a.gguf", tiny.llama_config(), lambda name: "Q8_0")
    for start, options in (
        (source, {"quantize": "nvfp4"}),
        (gguf, {}),
        (gguf, {"quantize": "none"}),
    ):
        convert(start, tmp_path / "whole", overwrite=True, **options)
        monkeypatch.setattr(write, "BLOCK_BYTES", 2000)  # 7 rows of 64 float32 values
        convert(start, tmp_path / "blocks", overwrite=True, **options)
        monkeypatch.undo()
        whole, blocks = (tmp_path / n / "model.safetensors" for n in ("whole", "blocks"))
        assert whole.read_bytes() == blocks.read_bytes()


def test_arrays_are_aligned_to_their_values(tmp_path: Path, source: Path):
    convert(source, tmp_path / "out", quantize="nvfp4", dtype="bfloat16")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "mlx"}
    sizes = {"U32": 4, "BF16": 2, "U8": 1}
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert all(e["data_offsets"][0] % sizes[e["dtype"]] == 0 for e in header.values())


KILLED = """
import sys, time
from mlxkv.convert import convert
def wait(step):
    if step.done_bytes > step.total_bytes // 2:
        print("half", flush=True)
        time.sleep(60)
convert(sys.argv[1], sys.argv[2], progress=wait)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(
    tmp_path: Path, source: Path, number: int
):
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None
    with process, process.stdout as out:
        assert out.readline() == "half\n"
        assert any(name.startswith(".out.partial-") for name in names(tmp_path))
        with pytest.raises(OutputError, match="another conversion is writing it"):
            convert(source, tmp_path / "out")
        process.send_signal(number)
        process.wait(30)
    left = names(tmp_path)
    assert "out" not in left
    if number == signal.SIGINT:
        assert left == ["hf"]
    convert(source, tmp_path / "out")
    assert names(tmp_path) == ["hf", "out"]
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]


FULL = """
import resource, signal, sys
from mlxkv.convert import convert
from mlxkv.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    convert(sys.argv[1], sys.argv[2])
except OutputError as error:
    print(error)
    sys.exit(6)
"""


def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing(tmp_path: Path, source: Path):
    done = run(FULL, str(source), str(tmp_path / "out"))
    assert done.returncode == 6, done.stderr
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'out'}: cannot be written: File too large; nothing was kept"
    ]
    assert names(tmp_path) == ["hf"]


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, "_write_block", full)
    with pytest.raises(OutputError, match=r"out: cannot be written: No space left on device"):
        convert(source, tmp_path / "out")
    assert names(tmp_path) == ["hf"]


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    for quantize in (None, "auto"):  # which measures for minutes: asked for before
        monkeypatch.setattr(Measure, "calibration", lambda *_: pytest.fail("it was measured"))
        with pytest.raises(OutputError, match=r"out: needs \d.* KiB, and .* has 1 B free"):
            convert(source, tmp_path / "out", quantize=quantize)
    assert names(tmp_path) == ["hf"]


def test_an_output_that_exists_is_refused_before_the_source_is_opened(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match=r"out: exists already: choose another output"):
        convert(tmp_path / "no such source", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file: exists and is not a folder"):
        convert(tmp_path / "no such source", tmp_path / "file")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path: Path, source: Path):
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b" / "out") == names(tmp_path / "out")


def test_overwrite_replaces_only_when_the_new_one_is_complete(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    convert(source, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_block", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, tmp_path / "out", dtype="bfloat16", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    convert(source, tmp_path / "out", dtype="bfloat16", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert names(tmp_path) == ["hf", "out"]


def test_a_source_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, source: Path):
    cut = False

    def shrink(_: Any) -> None:
        nonlocal cut
        if not cut:
            with (source / "model.safetensors").open("rb+") as file:
                file.truncate(5000)
            cut = True

    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        convert(source, tmp_path / "out", progress=shrink)
    assert names(tmp_path) == ["hf"]


def test_a_plan_of_the_same_source_is_made_without_reading_a_weight(tmp_path: Path):
    sparse_checkpoint(tmp_path / "hf", n_layers=8, n_shards=4)
    before = mx.get_peak_memory()
    start = time.process_time()
    convert(tmp_path / "hf", tmp_path / "out", quantize="affine4", dry_run=True)
    assert time.process_time() - start < 5
    assert mx.get_peak_memory() - before < 1e6


def test_on_macos_a_model_leaves_the_drives_cache_before_it_has_its_name(
    tmp_path: Path, source: Path, monkeypatch
):
    seen: list[tuple[object, bool]] = []
    out = tmp_path / "out"
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: seen.append((command, out.exists())))
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(("fsync", out.exists())))
    convert(source, out)
    n_files = len(names(out))
    assert seen == [*[("fsync", False)] * n_files, (51, False), (51, True)]
