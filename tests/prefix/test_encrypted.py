"""Pages and names that are encrypted at rest: found with their key alone, and evicted without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlxkv.errors import UsageError
from mlxkv.prefix.on_disk.writer import PageFiles
from mlxkv.saved_kv.gc import gc
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.saved_kv.registry import KVNames
from tests.support.page_writer import FINGERPRINT, chain, limits, opened, same, stored

KEY, OTHER = "11" * 32, "22" * 32
PAGES = chain(0, 3, parts=("full", "window"), tip=77)
TEXT = "the quick brown fox"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    use(monkeypatch, KEY)


def use(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("MLXKV_KV_KEY", key)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    stored(tmp_path / "kv", PAGES)
    return tmp_path / "kv"


def named(name: str = "book", **fields: object) -> NamedKV:
    tokens = b"".join(page.tokens for page in PAGES if page.key.part == "full")
    made = NamedKV(name, FINGERPRINT, "gemma3:270m", len(tokens) // 4,
                   tuple(page.key for page in PAGES), TEXT, None, tokens, 1.7e9, False, "native",
                   "bfloat16")  # fmt: skip
    return replace(made, **fields)  # pyright: ignore[reportArgumentType]


def files_of(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def test_pages_come_back_with_the_key_in_the_next_process_too(root):
    files = opened(root)
    assert all(same(files.read(page.key), page) for page in PAGES)
    assert all(files.tokens(page.key) == page.tokens for page in PAGES)
    assert {name for name, _ in files.children(PAGES[0].key.name)} == {PAGES[2].key.name}


def test_nothing_on_disk_shows_a_text_its_hashes_or_the_model(root):
    names = KVNames(root, limits())
    names.save(named())
    shown = b"".join(
        str(path).encode() + path.read_bytes() for path in root.rglob("*") if path.is_file()
    )
    hidden = [TEXT, FINGERPRINT[:32], *(page.key.name for page in PAGES)]
    assert not [text for text in hidden if text.encode() in shown]
    assert PAGES[0].tokens not in shown and PAGES[0].tensors["3.0"].tobytes() not in shown
    assert names.load("book") == named()


@pytest.mark.parametrize("other", [OTHER, ""])
def test_another_key_or_none_is_a_miss_that_removes_nothing(root, monkeypatch, other):
    KVNames(root, limits()).save(named())
    before = files_of(root)
    use(monkeypatch, other)
    files = opened(root)
    assert [files.read(page.key) for page in PAGES] == [None] * len(PAGES)
    assert not any(page.key in files for page in PAGES)
    report = gc(root, limits())
    assert report.damaged == 0 and files_of(root) == before
    names = KVNames(root, limits())
    assert names.list() == [] and names.n_locked() == 1
    with pytest.raises(UsageError, match="'book' is encrypted with another key: set MLXKV_KV_KEY"):
        names.load("book")
    use(monkeypatch, KEY)
    assert KVNames(root, limits()).load("book") == named()
    use(monkeypatch, other)
    names.remove("book")
    assert names.n_locked() == 0


def test_pages_of_a_lost_key_are_evicted_in_their_turn_and_named_ones_last(root, monkeypatch):
    more = chain(5, 3)
    files = stored(root, more)
    KVNames(root, limits()).save(named(pinned=True))
    mine = {files.at.path(page.key) for page in PAGES}
    use(monkeypatch, "")
    report = gc(root, limits(cap=1))
    assert report.evicted == len(more) and report.damaged == 0
    assert {str(path) for path in files_of(root)} == mine


def test_a_file_in_the_place_of_another_is_damaged(root):
    files = opened(root)
    full = [page for page in PAGES if page.key.part == "full"]
    first, second = (Path(files.at.path(page.key)) for page in full[:2])
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert gc(root, limits()).damaged == 2
    first.write_bytes(b)
    assert opened(root).read(full[0].key) is None and not first.exists()


def test_a_changed_file_is_a_miss_and_removed(root):
    path = Path(opened(root).at.path(PAGES[0].key))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert opened(root).read(PAGES[0].key) is None and not path.exists()


def test_plain_pages_are_not_found_with_a_key_and_stay(tmp_path, monkeypatch):
    use(monkeypatch, "")
    root = tmp_path / "kv"
    stored(root, PAGES)
    use(monkeypatch, KEY)
    assert opened(root).read(PAGES[0].key) is None
    assert gc(root, limits()).damaged == 0 and len(files_of(root)) == len(PAGES)
    stored(root, PAGES)
    assert len(files_of(root)) == 2 * len(PAGES)


def test_an_export_is_plain_and_an_import_is_encrypted_again(root, tmp_path, monkeypatch):
    names = KVNames(root, limits())
    names.save(named())
    names.export("book", tmp_path / "x")
    use(monkeypatch, OTHER)
    there = tmp_path / "there"
    taken = KVNames(there, limits()).import_(tmp_path / "x")
    data = b"".join(path.read_bytes() for path in there.rglob("*") if path.is_file())
    assert TEXT.encode() not in data and PAGES[0].tokens not in data
    use(monkeypatch, "")
    KVNames(there, limits()).remove("book")  # not trusted: its pages go, also without the key
    assert files_of(there) == []
    use(monkeypatch, OTHER)
    KVNames(there, limits()).trust(KVNames(there, limits()).import_(tmp_path / "x"))
    assert KVNames(there, limits()).load("book") == replace(taken, quarantine="")
    assert all(same(PageFiles(there, FINGERPRINT, limits()).read(p.key), p) for p in PAGES)


def test_a_damaged_manifest_is_removed_with_its_key_and_stays_without(root, monkeypatch):
    KVNames(root, limits()).save(named())
    path = root / "names" / "book.json"
    path.rename(root / "names" / "other.json")  # another name's: what is sealed says so
    use(monkeypatch, OTHER)
    assert gc(root, limits()).damaged == 0
    use(monkeypatch, KEY)
    assert gc(root, limits()).damaged == 1
