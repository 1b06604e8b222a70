"""Pages between RAM and their files: written as views of one array, read into one array."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.kv.types import KV_TYPES, CacheSpec
from mlxkv.prefix.layout import FULL, WINDOW, Kinds, token_bytes
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.on_disk.format import PageFile, PageKey, page_name
from mlxkv.prefix.on_disk.part import Part
from mlxkv.prefix.on_disk.writer import PageFiles
from tests.prefix.test_part import FLOATS, assert_same, filled, read
from tests.support.page_writer import FINGERPRINT, limits

SPECS = [CacheSpec(2, 64, 64, 40), CacheSpec(2, 64, 32), CacheSpec(2, 64, 64, 40)]
KINDS = Kinds.of(SPECS)
assert KINDS is not None
every_type = pytest.mark.parametrize("kv_type", KV_TYPES)
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=("float32", "bfloat16", "float16"))


@pytest.fixture
def files(tmp_path: Path) -> PageFiles:
    return PageFiles(tmp_path / "kv", FINGERPRINT, limits())


@pytest.fixture
def disk(files) -> PageDisk:
    assert KINDS is not None
    return PageDisk(files, KINDS, "float32")


def key_of(n_tokens: int, part: str) -> tuple[PageKey, bytes]:
    """The name of a first page of so many tokens, and the tokens."""
    tokens, root = token_bytes(range(n_tokens)), "0" * 32
    return PageKey(root, page_name(root, tokens), n_tokens, part), tokens


@every_float
@every_type
@pytest.mark.parametrize(("n_tokens", "part", "layers"), [(256, FULL, [1]), (39, WINDOW, [0, 2])])
def test_a_part_comes_back_from_its_file_bit_for_bit(disk, kv_type, dtype, n_tokens, part, layers):
    caches = filled([CacheSpec(2, 64, SPECS[i].v_dim) for i in layers], kv_type, dtype)
    kv = Part.of(read(caches, 0, n_tokens))
    mx.eval(kv.words)
    key, tokens = key_of(n_tokens, part)
    disk.write([(key, 0, tokens, kv)])
    disk.flush()
    page = disk.read(key)
    assert page is not None
    got_tokens, got = page
    assert got_tokens == tokens and got.layout == kv.layout
    assert_same(got.slices(), read(caches, 0, n_tokens))


@every_float
@every_type
def test_what_is_written_is_the_parts_own_memory(disk, monkeypatch, kv_type, dtype):
    """A copy would have to be evaluated, one for each array of each layer."""
    written: list[PageFile] = []
    monkeypatch.setattr(disk.files, "write", lambda pages, **_: written.extend(pages))
    kv = Part.of(read(filled([SPECS[1]], kv_type, dtype), 0, 256))
    mx.eval(kv.words)
    key, tokens = key_of(256, FULL)
    disk.write([(key, 0, tokens, kv)])
    words = np.asarray(kv.words)
    (page,) = written
    assert len(page.tensors) == 2 * (1 if kv_type == "native" else 3)
    assert all(np.shares_memory(words, tensor) for tensor in page.tensors.values())
    assert sum(tensor.nbytes for tensor in page.tensors.values()) == kv.nbytes


@every_float
def test_a_file_has_a_tensor_for_each_array_of_each_layer(disk, files, dtype):
    """As before parts were one array each: what lies on disk from then stays valid."""
    caches = filled([SPECS[0], SPECS[2]], "native", dtype)
    kv = Part.of(read(caches, 280, 300))
    mx.eval(kv.words)
    key, tokens = key_of(20, WINDOW)
    disk.write([(key, 280, tokens, kv)])
    disk.flush()
    file = files.read(key)
    assert file is not None
    name = str(dtype).rpartition(".")[2]
    assert dict(file.dtypes) == dict.fromkeys(("0.0", "0.1", "2.0", "2.1"), name)
    for i, cache in zip((0, 2), caches, strict=True):
        for j, x in enumerate(cache.read(280, 300).arrays):
            bits = x.view(mx.uint16) if dtype == mx.bfloat16 else x
            np.testing.assert_array_equal(file.tensors[f"{i}.{j}"], np.array(bits))


DAMAGE = {
    "no-tensor": ({}, {}),
    "three-dimensions": ({"1.1": np.zeros((2, 20, 4), np.float32)}, {"1.1": "float32"}),
    "fewer-tokens": ({"1.1": np.zeros((1, 2, 19, 4), np.float32)}, {"1.1": "float32"}),
    "unknown-dtype": ({"1.1": np.zeros((1, 2, 20, 4), np.int8)}, {"1.1": "int8"}),
    "another-dtype": ({"1.1": np.zeros((1, 2, 20, 4), np.uint16)}, {"1.1": "float32"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_of_other_tensors_is_a_miss_and_removed(disk, files, damage):
    """Each with a checksum that agrees: whatever wrote it, it is no page of this model."""
    key, tokens = key_of(20, FULL)
    rest = {"1.0": np.zeros((1, 2, 20, 4), np.float32)}, {"1.0": "float32"}
    if damage == "no-tensor":
        rest = {"7.0": rest[0]["1.0"]}, {"7.0": "float32"}
    tensors, dtypes = ({**a, **b} for a, b in zip(rest, DAMAGE[damage], strict=True))
    files.write([PageFile(key, 0, tokens, tensors, dtypes)])
    files.flush()
    assert key in disk
    assert disk.read(key) is None
    assert key not in disk
