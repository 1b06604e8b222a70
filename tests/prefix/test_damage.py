from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from mlxkv.prefix.on_disk import folder as page_folder
from mlxkv.prefix.on_disk.format import (
    MAX_PAGE_BYTES,
    DamagedPage,
    PageFile,
    PageKey,
    decode,
    encode,
)
from mlxkv.prefix.on_disk.writer import PageFiles
from tests.support.page_writer import FINGERPRINT, chain, limits, opened, path_of, same, stored


def n_descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def miss_and_removed(root: Path, key: PageKey) -> bool:
    files = opened(root)
    known = key in files
    return known and files.read(key) is None and not path_of(root, key).exists()


def test_a_page_cut_anywhere_is_a_miss_and_removed(root):
    page = chain(0, 1)[0]
    stored(root, [page])
    path = path_of(root, page.key)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 1}
    for n_bytes in sorted(cuts | set(range(0, len(whole), 41))):
        path.write_bytes(whole[:n_bytes])
        assert miss_and_removed(root, page.key), n_bytes
    for n_more in (1, 8, 4096):
        path.write_bytes(whole + bytes(n_more))
        assert miss_and_removed(root, page.key), n_more


def test_a_page_with_any_byte_changed_is_a_miss_and_removed(root):
    page = chain(0, 1, n_values=200)[0]
    files = stored(root, [page])
    path = path_of(root, page.key)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # The library fills the header up with blanks, which say nothing.
    blanks = range(len(whole[:header].rstrip(b" ")), header)
    rng = random.Random(0)
    for _ in range(600):
        at = rng.randrange(len(whole))
        if at in blanks:
            continue
        damaged = bytearray(whole)
        damaged[at] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        assert page.key in files
        assert files.read(page.key) is None, at
        assert not path.exists() and page.key not in files


def test_no_bit_of_a_header_changes_what_is_read():
    page = chain(0, 1)[0]
    whole = encode(page, FINGERPRINT)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in range(header):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            try:
                read, fingerprint = decode(bytes(damaged), page.key)
            except DamagedPage:
                continue
            assert same(read, page) and fingerprint == FINGERPRINT
            assert whole[at : at + 1] == b" "


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_bytes_of_any_kind_are_no_page_and_no_error(data, length):
    key = chain(0, 1)[0].key
    for whole in (
        data,
        length.to_bytes(8, "little") + data,
        len(data).to_bytes(8, "little") + data,
    ):
        with pytest.raises(DamagedPage):
            decode(whole, key)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_headers_of_any_kind_are_no_page_and_no_error(value):
    key = chain(0, 1)[0].key
    for raw in (value, {"__metadata__": value}, {"a": value}):
        text = json.dumps(raw).encode()
        with pytest.raises(DamagedPage):
            decode(len(text).to_bytes(8, "little") + text, key)


def test_headers_that_cannot_be_read_give_no_tokens_and_are_removed(root):
    page = chain(0, 1)[0]
    path = path_of(root, page.key)
    files = stored(root, [page])
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    huge = (1 << 62).to_bytes(8, "little") + whole[8:]
    for damaged in (
        b"",
        whole[:5],
        whole[: header - 20],
        huge,
        whole.replace(b"tokens", b"takens"),
    ):
        path.write_bytes(damaged)
        assert page.key in files
        assert files.tokens(page.key) is None
        assert not path.exists()


def rewritten(page: PageFile, **entries: str) -> bytes:
    """A page's file with other metadata, and a checksum that agrees with it."""
    from mlxkv.prefix.on_disk import format

    whole = encode(page, FINGERPRINT)
    length = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + length])["__metadata__"] | entries
    metadata.pop("sha256")
    tensors = load(whole)
    return save(tensors, {**metadata, "sha256": format._checksum(metadata, tensors)})


def test_a_checksum_that_agrees_is_not_enough(root):
    page, other = chain(0, 2)
    path = path_of(root, page.key)
    stored(root, [page])
    assert decode(rewritten(page), page.key)[0].start == page.start
    wrong = {
        "older format": rewritten(page, format="0"),
        "newer format": rewritten(page, format="2"),
        "another model": rewritten(page, fingerprint="c" * 64),
        "the same beginning of a fingerprint": rewritten(page, fingerprint=FINGERPRINT[:-1] + "0"),
        "another parent": rewritten(page, parent="1" * 32),
        "another part": rewritten(page, part="window"),
        "other tokens": rewritten(page, tokens=rewritten_tokens(other)),
        "no position": rewritten(page, start="-1"),
        "position that is no number": rewritten(page, start="x"),
        "one entry more": rewritten(page, more="x"),
        "another page": encode(other, FINGERPRINT),
    }
    for what, data in wrong.items():
        path.write_bytes(data)
        assert miss_and_removed(root, page.key), what


def rewritten_tokens(page: PageFile) -> str:
    import base64

    return base64.b64encode(page.tokens).decode()


def test_a_file_under_another_name_is_a_miss_and_removed(root):
    page, other = chain(0, 2, parts=("full",))
    stored(root, [page])
    names = [
        PageKey(page.key.parent, "1" * 32, 256, "full"),
        PageKey("1" * 32, page.key.name, 256, "full"),
        PageKey(page.key.parent, page.key.name, 255, "full"),
        PageKey(page.key.parent, page.key.name, 256, "window"),
        other.key,
    ]
    for name in names:
        path_of(root, name).write_bytes(path_of(root, page.key).read_bytes())
        assert miss_and_removed(root, name), name


def test_a_file_of_another_models_folder_is_a_miss_and_removed(root):
    page = chain(0, 1)[0]
    stored(root, [page])
    files = PageFiles(root, "c" * 64, limits())
    folder = root / "pages" / ("c" * 32)
    folder.mkdir()
    (folder / page.key.file_name).write_bytes(path_of(root, page.key).read_bytes())
    assert page.key in files and files.read(page.key) is None
    assert not (folder / page.key.file_name).exists()


def test_what_is_no_plain_file_is_a_miss_and_leads_nowhere(root, tmp_path):
    page, second = chain(0, 2)
    stored(root, [page, second])
    path = path_of(root, page.key)
    path.unlink()
    path.symlink_to(path_of(root, second.key))
    assert miss_and_removed(root, page.key) and path_of(root, second.key).exists()
    os.mkfifo(path)
    assert miss_and_removed(root, page.key)
    with path.open("wb") as file:
        file.truncate(MAX_PAGE_BYTES + 1)
    assert miss_and_removed(root, page.key)
    path.mkdir()
    files = opened(root)
    n_open = n_descriptors()
    assert files.read(page.key) is None and files.tokens(page.key) is None
    assert n_descriptors() == n_open


def test_a_sector_that_cannot_be_read_is_damage(root, monkeypatch):
    page = chain(0, 1)[0]
    files = stored(root, [page])

    class Bad:
        def __init__(self, handle: int, *_: object, **__: object):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *_: object):
            os.close(self.handle)

        def readall(self) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(page_folder.os, "fdopen", Bad)
    assert files.read(page.key) is None
    assert not path_of(root, page.key).exists()


def test_a_page_that_cannot_be_opened_now_is_a_miss_and_stays(root, monkeypatch):
    page = chain(0, 1)[0]
    files = stored(root, [page])

    def refuse(*_: object):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(page_folder.os, "open", refuse)
        assert files.read(page.key) is None
    assert same(files.read(page.key), page)
