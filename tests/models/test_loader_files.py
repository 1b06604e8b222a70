"""Damaged weight files: each is one line that names the file."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.errors import MlxkvError, ModelNotFound, UnsupportedModel, WeightsError
from mlxkv.models.loader import load_model
from tests.support.loading import FILE, NORM, ONE_LAYER, logits, refused
from tests.support.tiny import write_checkpoint

# Files


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(file: Path, header: Any, body: bytes, size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path, ONE_LAYER)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 1000, 4000, -1])
def test_a_truncated_file_is_one_line_naming_the_file(checkpoint, kept):
    file = checkpoint / FILE
    file.write_bytes(file.read_bytes()[:kept])
    refused(checkpoint, str(file))


def test_a_file_with_something_behind_its_end_is_refused(checkpoint):
    file = checkpoint / FILE
    file.write_bytes(file.read_bytes() + b"more")
    refused(checkpoint, str(file))


@pytest.mark.parametrize(
    "content",
    [
        b"<html><title>404</title></html>" * 20,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n",
        b"\x00" * 64,
        b"\xff" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        b"\x80\x04\x95PK\x03\x04" * 10,
    ],
    ids=["html", "lfs", "zeros", "ones", "huge", "large", "empty", "list", "null", "pickle"],
)
def test_a_file_that_is_not_safetensors_is_one_line(checkpoint, content):
    (checkpoint / FILE).write_bytes(content)
    refused(checkpoint, str(checkpoint))


LIES = {
    "past-the-end": {"data_offsets": [0, 10**9]},
    "past-any-end": {"data_offsets": [0, 2**64 - 1]},
    "backwards": {"data_offsets": [256, 0]},
    "negative": {"data_offsets": [-256, 0]},
    "overlapping": {"data_offsets": [0, 256]},
    "shape-too-big": {"shape": [65]},
    "shape-overflows": {"shape": [2**62, 8]},
    "shape-negative": {"shape": [-64]},
    "shape-text": {"shape": "64"},
    "dtype-narrow": {"dtype": "F16"},
    "dtype-wide": {"dtype": "F64"},
    "dtype-unknown": {"dtype": "F7"},
    "dtype-number": {"dtype": 32},
    "no-offsets": {"data_offsets": None},
    "offsets-text": {"data_offsets": ["0", "256"]},
    "offsets-three": {"data_offsets": [0, 128, 256]},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_one_line_naming_the_file(checkpoint, lie):
    file = checkpoint / FILE
    header, body = header_of(file)
    header[NORM] = {**header[NORM], **lie}
    # The other tensors keep their places, so [0, 256] is somebody else's.
    if lie.get("data_offsets") == [0, 256]:
        assert (
            sorted(v["data_offsets"] for k, v in header.items() if k != "__metadata__")[0][0] == 0
        )
    write_header(file, header, body)
    refused(checkpoint, str(file))


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length_is_one_line_naming_the_file(checkpoint, size):
    file = checkpoint / FILE
    header, body = header_of(file)
    write_header(file, header, body, size)
    refused(checkpoint, str(file))


def test_a_tensor_of_a_dtype_that_mlx_lacks_is_named(checkpoint):
    file = checkpoint / FILE
    header, body = header_of(file)
    start = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    header["extra"] = {"dtype": "F64", "shape": [1], "data_offsets": [start, start + 8]}
    write_header(file, header, body + bytes(8))
    refused(checkpoint, str(file), "extra", "F64", error=UnsupportedModel)


def test_flipped_and_cut_headers_load_or_fail_with_an_error_of_ours(checkpoint):
    """A few hundred damaged files: no crash, no hang, no foreign exception."""
    file = checkpoint / FILE
    whole = file.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(8 + size) if rng.random() < 0.9 else rng.randrange(8)
            data[at] = rng.randrange(256)
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        file.write_bytes(bytes(data))
        try:
            model = load_model(checkpoint)
            mx.eval(model(mx.array([[1, 2]])))
            outcomes["loaded"] += 1
        except MlxkvError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 300


INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write_checkpoint(tmp_path, ONE_LAYER, shards=3)


def edit_index(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((path / INDEX).read_text())
    edit(index)
    (path / INDEX).write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "model-00002-of-00003.safetensors")


def test_a_truncated_shard_is_named(sharded):
    file = sharded / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refused(sharded, str(file))


def test_shards_without_their_index_load(tmp_path, sharded):
    (sharded / INDEX).unlink()
    expected = logits(load_model(write_checkpoint(tmp_path / "one", ONE_LAYER)))
    np.testing.assert_array_equal(logits(load_model(sharded)), expected)


def test_an_index_that_puts_a_tensor_into_the_wrong_shard_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    wrong = next(file for file in set(index.values()) if file != index[NORM])
    edit_index(sharded, lambda i: i["weight_map"].update({NORM: wrong}))
    refused(sharded, wrong, NORM)


@pytest.mark.parametrize(
    "value", ["../x.safetensors", "/etc/passwd", "", "..", ".", 3, None, {}, []]
)
def test_an_index_may_name_files_beside_it_only(sharded, value):
    edit_index(sharded, lambda i: i["weight_map"].update({NORM: value}))
    refused(sharded, INDEX)


@pytest.mark.parametrize(
    "content", ["", "x", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}']
)
def test_a_damaged_index_is_one_line_naming_it(sharded, content):
    (sharded / INDEX).write_text(content)
    refused(sharded, INDEX)


def test_a_tensor_that_the_index_forgets_is_missing(sharded):
    edit_index(sharded, lambda i: i["weight_map"].pop(NORM))
    refused(sharded, NORM, error=WeightsError)


def test_the_same_tensor_in_two_files_is_refused(tmp_path):
    write_checkpoint(tmp_path, ONE_LAYER)
    mx.save_safetensors(str(tmp_path / "model-extra.safetensors"), {NORM: mx.ones(64)})
    refused(tmp_path, NORM)


def test_a_directory_without_weights_says_what_is_there_instead(tmp_path):
    write_checkpoint(tmp_path, ONE_LAYER)
    (tmp_path / FILE).unlink()
    refused(tmp_path, str(tmp_path), error=ModelNotFound)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "pickle", error=ModelNotFound)


def test_no_such_directory(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", error=ModelNotFound)


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "model.gguf", error=MlxkvError)
