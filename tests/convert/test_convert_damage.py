"""Damaged checkpoints: one line that names the file and what is wrong, and nothing left behind."""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxkv.convert import convert
from mlxkv.convert.gguf.file import open_gguf
from mlxkv.convert.gguf.model import gguf_config, gguf_weights
from mlxkv.convert.gguf.tokenizer import gguf_tokenizer
from mlxkv.errors import CheckpointError, MlxkvError, ModelNotFound, UnsupportedModel
from tests.support import tiny
from tests.support.gguf_files import write_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small Q4_0 model, as bytes."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    config = tiny.llama_config(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    return write_model(path, config, lambda _: "Q4_0").read_bytes()


def refused(folder: Path, data: bytes, message: str, error: type[MlxkvError] = CheckpointError):
    path = folder / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(error) as raised:
        convert(path, folder / "out")
    text = str(raised.value)
    assert str(path) in text
    assert "\n" not in text
    assert message in text
    assert sorted(p.name for p in folder.iterdir()) == ["model.gguf"]


def replaced(data: bytes, at: int, layout: str, value: int) -> bytes:
    return data[:at] + struct.pack(layout, value) + data[at + struct.calcsize(layout) :]


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path):
    with pytest.raises(ModelNotFound, match=r"no\.gguf"):
        convert(tmp_path / "no.gguf", tmp_path / "out")


def test_an_empty_file_is_named(tmp_path: Path):
    refused(tmp_path, b"", "not a GGUF file")


def test_a_file_of_another_kind_is_named(tmp_path: Path):
    refused(tmp_path, b"PK\x03\x04" + bytes(100), "not a GGUF file")


def test_every_truncation_is_named(tmp_path: Path, whole: bytes):
    for size in [4, 8, 23, 24, 40, *range(100, len(whole), 997), len(whole) - 1]:
        refused(tmp_path, whole[:size], "truncated")


@pytest.mark.parametrize("version", [0, 1, 4, 77])
def test_other_versions_are_refused(tmp_path: Path, whole: bytes, version: int):
    data = replaced(whole, 4, "<I", version)
    refused(tmp_path, data, f"version {version} is not supported", UnsupportedModel)


def test_big_endian_files_are_refused(tmp_path: Path, whole: bytes):
    data = replaced(whole, 4, ">I", 3)
    refused(tmp_path, data, "big-endian", UnsupportedModel)


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [2**63, 2**40, 10**6])
def test_absurd_counts_are_refused_before_anything_is_allocated(
    tmp_path: Path, whole: bytes, at: int, count: int
):
    refused(tmp_path, replaced(whole, at, "<Q", count), "the header claims")


@pytest.mark.parametrize("length", [2**63, 2**32, 5000])
def test_an_absurd_string_length_is_refused(tmp_path: Path, whole: bytes, length: int):
    refused(tmp_path, replaced(whole, 24, "<Q", length), "the name of key 0 claims")


def test_an_absurd_array_length_is_refused(tmp_path: Path, whole: bytes):
    at = whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    refused(tmp_path, replaced(whole, at, "<Q", 2**50), "'tokenizer.ggml.tokens' claims")
    refused(tmp_path, replaced(whole, at, "<Q", 2**20), "'tokenizer.ggml.tokens' claims")


def tensor_entry(data: bytes) -> int:
    """Where the entry of 'blk.0.attn_q.weight' goes on after its name."""
    return data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")


def test_a_lying_tensor_table_is_refused(tmp_path: Path, whole: bytes):
    at = tensor_entry(whole)
    refused(tmp_path, replaced(whole, at, "<I", 2**31), "dimensions")
    refused(tmp_path, replaced(whole, at + 4, "<Q", 2**60), "truncated or damaged")
    refused(tmp_path, replaced(whole, at + 4, "<Q", 31), "must be a multiple of 32")
    refused(tmp_path, replaced(whole, at + 4, "<Q", 0), "whose last dimension")
    refused(tmp_path, replaced(whole, at + 20, "<I", 250), "has type 250, which")
    refused(tmp_path, replaced(whole, at + 24, "<Q", 2**63), "truncated or damaged")
    refused(tmp_path, replaced(whole, at + 24, "<Q", 1), "not aligned")
    refused(tmp_path, replaced(whole, at + 24, "<Q", 0), "overlap")


def test_numbers_that_make_no_model_are_refused(tmp_path: Path, whole: bytes):
    for key in ("block_count", "embedding_length", "attention.head_count", "attention.key_length"):
        at = whole.index(b"llama." + key.encode()) + len("llama." + key) + 4
        for value in (0, 2**31, 2**32 - 1):
            path = tmp_path / "model.gguf"
            path.write_bytes(replaced(whole, at, "<I", value))
            with pytest.raises(CheckpointError, match=r"model\.gguf"):
                convert(path, tmp_path / "out")


def test_damaged_values_are_found_when_they_are_written(tmp_path: Path):
    config = tiny.llama_config()
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    path = write_model(tmp_path / "model.gguf", config, weights=weights)
    refused(tmp_path, path.read_bytes(), "blk.1.ffn_up.weight: holds NaN")


def test_values_past_float16_are_not_turned_into_infinity(tmp_path: Path):
    config = tiny.llama_config()
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    path = write_model(tmp_path / "model.gguf", config, weights=weights)
    with pytest.raises(CheckpointError, match="past the range of float16; try dtype='bfloat16'"):
        convert(path, tmp_path / "out", dtype="float16")
    convert(path, tmp_path / "out", dtype="bfloat16")


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def only_our_errors(act: Callable[[], object], label: str) -> None:
    try:
        act()
    except MlxkvError as error:
        assert "\n" not in str(error), label
    except Exception as error:
        raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error


def test_a_damaged_gguf_gives_an_mlxkv_error_or_a_model_and_nothing_else(
    tmp_path: Path, whole: bytes
):
    """600 files with bytes flipped, cut or filled in, most of them in the header."""
    path = tmp_path / "model.gguf"
    header = whole.index(b"blk.0.attn_q.weight") + 2000
    before = peak_bytes()

    def read_all() -> None:
        file = open_gguf(path)
        config = gguf_config(file)
        for weight in gguf_weights(file, config).values():
            weight.rows(0, 1 if len(weight.shape) < 2 else weight.row_step)
        gguf_tokenizer(file)

    for seed in range(600):
        rng = random.Random(seed)
        data = bytearray(whole)
        end = header if rng.random() < 0.9 else len(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(4, end)
            n = rng.choice((1, 1, 2, 4, 8))
            filler = rng.choice((b"\xff", b"\x00", b"\x80", bytes([rng.randrange(256)])))
            data[at : at + n] = filler * n
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        act = (lambda: convert(path, tmp_path / "out", dry_run=True)) if seed % 4 == 0 else read_all
        only_our_errors(act, f"seed {seed}")
    assert peak_bytes() - before < 200 << 20


def test_a_damaged_safetensors_directory_gives_an_mlxkv_error_or_a_model(tmp_path: Path):
    """200 directories with a header, an index or a config damaged."""
    config = tiny.llama_config(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    folder = tiny.write_checkpoint(tmp_path / "hf", config, shards=2)
    files = sorted(folder.iterdir())
    wholes = {file: file.read_bytes() for file in files}
    before = peak_bytes()
    for seed in range(200):
        rng = random.Random(seed)
        file = rng.choice(files)
        data = bytearray(wholes[file])
        for _ in range(rng.choice((1, 2, 4))):
            at = rng.randrange(min(len(data), 1500))
            data[at] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(data)
        only_our_errors(lambda: convert(folder, tmp_path / "out", dry_run=True), f"seed {seed}")
        file.write_bytes(wholes[file])
    assert peak_bytes() - before < 200 << 20


def test_a_missing_shard_is_named(tmp_path: Path):
    folder = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: missing"):
        convert(folder, tmp_path / "out")


def test_pickled_weights_are_refused(tmp_path: Path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.llama_config()))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(MlxkvError, match="pickled weights can run code"):
        convert(folder, tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="pickled weights can run code"):
        convert(folder / "pytorch_model.bin", tmp_path / "out")


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path):
    with pytest.raises(ModelNotFound, match=r"neither config\.json nor a GGUF file"):
        convert(tmp_path, tmp_path / "out")
