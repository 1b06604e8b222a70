from __future__ import annotations

import fcntl
import io
import json
import os
import random
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxkv.errors import CheckpointError, MlxkvError, OutputError, UsageError
from mlxkv.prefix.on_disk import folder
from mlxkv.prefix.on_disk.format import PageFile, encode
from mlxkv.prefix.on_disk.writer import PageFiles
from mlxkv.saved_kv.gc import GcReport, gc
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.saved_kv.registry import KVNames
from tests.support.page_writer import (
    FINGERPRINT,
    chain,
    folder_bytes,
    leftovers,
    limits,
    opened,
    path_of,
    same,
    stored,
)

PAGES = chain(0, 3, parts=("full", "window"), tip=77)
MESSAGES = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "é 漢 \ud800"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that holds `PAGES`."""
    stored(tmp_path / "kv", PAGES)
    return tmp_path / "kv"


def named(name: str = "book", pages: list[PageFile] = PAGES, **fields: object) -> NamedKV:
    tokens = b"".join(page.tokens for page in pages if page.key.part == "full")
    keys = tuple(page.key for page in pages)
    made = NamedKV(name, FINGERPRINT, "gemma3:270m", len(tokens) // 4, keys, "the text", MESSAGES,
                   tokens, 1.7e9, False, "native", "bfloat16")  # fmt: skip
    return replace(made, **fields)  # pyright: ignore[reportArgumentType]


def names(root: Path, cap: int = 1 << 40) -> KVNames:
    return KVNames(root, limits(cap))


def exported(root: Path, file: Path) -> bytes:
    names(root).save(named())
    names(root).export("book", file)
    return file.read_bytes()


# Names


def test_a_name_means_what_was_saved_under_it_in_the_next_process_too(root):
    names(root).save(named())
    assert names(root).load("book") == named()
    assert names(root).missing(named()) == []
    assert [saved.name for saved in names(root).list()] == ["book"]


def test_a_text_that_is_no_conversation_is_saved_as_one(root):
    names(root).save(named(messages=None))
    assert names(root).load("book").messages is None


def test_names_are_listed_in_order_and_damaged_ones_left_out(root):
    for name in ("b", "a", "c"):
        names(root).save(named(name))
    (root / "names" / "b.json").write_text("{")
    assert [saved.name for saved in names(root).list()] == ["a", "c"]


def test_a_name_that_is_taken_is_replaced_only_where_that_is_asked_for(root):
    names(root).save(named())
    with pytest.raises(UsageError, match="'book' is already saved; `mlxkv kv rm book`"):
        names(root).save(named(text="other"))
    names(root).save(named(text="other"), replace=True)
    assert names(root).load("book").text == "other"


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", ".hidden", "-a", "a b", "x" * 101])
def test_what_can_be_no_name_is_refused_everywhere(root, name, tmp_path):
    store = names(root)
    acts = [store.load, store.remove, store.pin, store.unpin, store.is_pinned]
    acts.append(lambda name: store.save(named(name), replace=True))
    acts.append(lambda name: store.export(name, tmp_path / "x"))
    for act in acts:
        with pytest.raises(UsageError, match="a saved KV's name has letters"):
            act(name)


def lookups(store: KVNames, folder: Path) -> list[Callable[[str], object]]:
    """All that takes the name of something saved."""
    return [
        store.load,
        store.remove,
        store.pin,
        store.unpin,
        lambda name: store.export(name, folder / "x"),
    ]


def assert_unknown(store: KVNames, folder: Path, name: str) -> None:
    """All of them say that there is none, and suggest `book`."""
    said = rf"no KV is saved as '{name}'; did you mean book\?"
    for lookup in lookups(store, folder):
        with pytest.raises(UsageError, match=said):
            lookup(name)


def test_an_unknown_name_is_an_error_that_suggests_one(root, tmp_path):
    store = names(root)
    store.save(named())
    assert_unknown(store, tmp_path, "bock")
    with pytest.raises(UsageError, match="`mlxkv kv ls` lists them"):
        store.load("zzz")


@pytest.fixture
def apfs(root, monkeypatch):
    """A folder where `BOOK` opens what is listed as `book`, as it does where case is ignored."""
    (root / "names").mkdir(exist_ok=True)
    (root / "names" / "BOOK.json").symlink_to("book.json")
    listdir, scandir = os.listdir, os.scandir

    @contextmanager
    def scan(path: Any) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(path) as entries:
            yield (entry for entry in entries if entry.name != "BOOK.json")

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(os, "listdir", lambda path: [x for x in listdir(path) if x != "BOOK.json"])
    return root


def test_a_name_that_differs_from_a_saved_one_in_case_only_is_refused(root, tmp_path):
    store = names(root)
    exported(root, tmp_path / "x")
    message = "'Book' differs from the saved 'book' in case only"
    for act in (
        lambda: store.save(named("Book")),
        lambda: store.save(named("Book"), replace=True),
        lambda: store.check_spelling("Book"),
        lambda: store.import_(tmp_path / "x", name="Book"),
    ):
        with pytest.raises(UsageError, match=message):
            act()
    assert [saved.name for saved in store.list()] == ["book"]
    store.save(named("book"), replace=True)
    store.remove("book")
    store.save(named("Book"))
    assert store.load("Book") == named("Book")


def test_names_that_differ_in_case_and_were_saved_before_both_go_on(root):
    store = names(root)
    store.save(named("book"))
    (root / "names" / "Book.json").write_bytes(named("Book").to_json())
    store.save(named("Book", text="new"), replace=True)
    store.pin("book")
    assert store.load("Book").text == "new" and store.load("book") == named(pinned=True)


def test_a_lookup_is_exact_where_the_file_system_ignores_case(apfs, tmp_path):
    store = names(apfs)
    store.save(named())
    assert_unknown(store, tmp_path, "BOOK")
    with pytest.raises(UsageError, match="differs from the saved 'book' in case only"):
        store.save(named("BOOK"), replace=True)
    assert store.load("book") == named() and not store.is_pinned("BOOK")


def test_a_damaged_manifest_is_an_error_that_says_what_to_do_and_can_be_removed(root):
    store = names(root)
    store.save(named())
    path = root / "names" / "book.json"
    whole = json.loads(path.read_bytes())
    other = named(pages=chain(9, 2))
    wrong: list[object] = [[], None, {}, "x", {**whole, "version": 99}, {**whole, "more": 1}]
    wrong += [{**whole, field: value} for field, value in [
        ("tokens", "@"), ("tokens", ""), ("tokens", "AAAA"), ("n_tokens", 5), ("n_tokens", True),
        ("tokens", json.loads(other.to_json())["tokens"]), ("keys", []), ("keys", 3),
        ("keys", [whole["keys"][0], "../../x"]), ("keys", [whole["keys"][0]] * 2),
        ("keys", [key.file_name for key in other.keys]), ("fingerprint", "../.."), ("pinned", 1),
        ("messages", []), ("messages", "ab"), ("messages", [{}]), ("messages", [{"role": 1}]),
        ("created", 1e300), ("created", float("nan")), ("created", "now"), ("name", "../a"),
        ("text", 1),
    ]]  # fmt: skip
    for raw in wrong:
        path.write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=r"a damaged manifest .*; `mlxkv kv rm book`"):
            store.load("book")
    store.remove("book")
    assert not path.exists()


def test_a_manifest_is_private_and_synced_and_nothing_stays_beside_it(root, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(folder.os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    names(root).save(named())
    assert len(synced) == 1 + 3  # the file, its folder, the one above, and the root's own entry
    assert stat.S_IMODE((root / "names" / "book.json").stat().st_mode) == 0o600
    assert leftovers(root) == []


def test_on_macos_a_manifest_leaves_the_drives_cache_before_it_has_its_name(root, monkeypatch):
    seen = []
    path = root / "names" / "book.json"
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: seen.append((command, path.exists())))
    names(root).save(named())
    assert seen == [(51, False), *[(51, True)] * 3]
    seen.clear()
    names(root).export("book", root / "x")
    assert seen == [(51, True)]


def test_pinning_changes_nothing_else(root):
    store = names(root)
    store.save(named())
    store.pin("book")
    assert store.load("book") == named(pinned=True) and store.is_pinned("book")
    store.unpin("book")
    assert store.load("book") == named() and not store.is_pinned("book")


def test_removing_a_name_leaves_its_pages_to_be_evicted(root):
    pages, new = chain(1, 4, n_values=5_000), chain(5, 2, n_values=5_000)
    stored(root, pages)
    store = names(root)
    store.save(named("long", pages, pinned=True))
    store.save(named("short", pinned=True))
    files = opened(root, folder_bytes(root) + 33_000)
    files.write(new)
    files.flush()
    assert files.usage().refused == {"cap": 2}
    store.remove("long")
    assert all(page.key in opened(root) for page in pages)
    files.write(new)
    files.flush()
    assert all(path_of(root, page.key).exists() for page in new)
    gone = [page for page in pages if not path_of(root, page.key).exists()]
    assert gone and gone == pages[-len(gone) :]


def test_what_was_evicted_is_missing(root):
    path_of(root, PAGES[3].key).unlink()
    assert names(root).missing(named()) == [PAGES[3].key]


def test_a_manifest_that_does_not_fit_under_the_cap_is_not_written(root, tmp_path):
    cap = folder_bytes(root) + 60_000
    with pytest.raises(OutputError, match=r"no room to save 'book' \(cap\)"):
        names(root, cap).save(named(text="x" * 200_000))
    assert names(root).list() == [] and folder_bytes(root) <= cap
    assert leftovers(root) == []


def test_saving_makes_room_by_evicting_but_never_its_own_pages(root):
    others = chain(7, 10, n_values=3_000)
    stored(root, others)
    cap = folder_bytes(root) + 33_000
    names(root, cap).save(named(text="x" * 100_000))
    assert folder_bytes(root) <= cap
    assert names(root).missing(named()) == []
    assert not all(path_of(root, page.key).exists() for page in others)


def test_a_folder_that_cannot_be_written_is_an_error_here(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        names(tmp_path / "file" / "kv").save(named())


def test_kv_that_is_switched_off_saves_nothing_and_removes_nothing(root, tmp_path):
    exported(root, tmp_path / "x")
    store = names(root, 0)
    for act in (lambda: store.save(named("a")), lambda: store.import_(tmp_path / "x", name="a")):
        with pytest.raises(UsageError, match="MLXKV_KV_DISK=0"):
            act()
    with pytest.raises(UsageError, match="MLXKV_KV_DISK=0"):
        store.pin("book")
    assert store.missing(store.load("book")) == []


# Export and import


def test_an_export_comes_back_whole_elsewhere(root, tmp_path):
    exported(root, tmp_path / "book.kv")
    there = tmp_path / "there"
    taken = names(there).import_(tmp_path / "book.kv", fingerprint=FINGERPRINT)
    assert taken == names(there).load("book")
    assert names(there).trust(taken) == named() == names(there).load("book")
    files = opened(there)
    assert all(same(files.read(page.key), page) for page in PAGES)
    assert leftovers(there) == []
    modes = {stat.S_IMODE(path.stat().st_mode) for path in there.rglob("*") if path.is_file()}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "book.kv").stat().st_mode) == 0o600


def test_what_was_imported_can_be_exported_again(root, tmp_path):
    exported(root, tmp_path / "a")
    names(tmp_path / "there").import_(tmp_path / "a")
    names(tmp_path / "there").export("book", tmp_path / "b")
    assert names(tmp_path / "third").import_(tmp_path / "b", trusted=True) == named()
    assert all(same(opened(tmp_path / "third").read(page.key), page) for page in PAGES)


def test_an_import_can_have_another_name_and_is_never_pinned(root, tmp_path):
    names(root).save(named(pinned=True))
    names(root).export("book", tmp_path / "x")
    taken = names(root).import_(tmp_path / "x", name="copy")
    assert replace(taken, quarantine="") == named("copy")
    with pytest.raises(UsageError, match="'copy' is already saved"):
        names(root).import_(tmp_path / "x", name="copy")


def test_an_import_repairs_pages_that_are_damaged_here(root, tmp_path):
    exported(root, tmp_path / "x")
    path = path_of(root, PAGES[2].key)
    path.write_bytes(path.read_bytes()[:-3])
    names(root).trust(names(root).import_(tmp_path / "x", name="copy"))
    assert same(opened(root).read(PAGES[2].key), PAGES[2])


def test_the_pages_of_an_import_serve_no_prompt_until_it_is_trusted_and_go_with_its_name(
    root, tmp_path
):
    exported(root, tmp_path / "x")
    there = tmp_path / "there"
    taken = names(there).import_(tmp_path / "x")
    assert not any(page.key in opened(there) for page in PAGES)
    assert names(there).missing(taken) == [] and names(there).nbytes(taken) > 0
    gc(there, limits())
    assert names(there).missing(taken) == []
    names(there).pin("book")
    names(there).remove("book")
    assert [*there.rglob("*.safetensors")] == []
    names(there).trust(names(there).import_(tmp_path / "x"))
    assert {path.parent.name for path in there.rglob("*.safetensors")} == {FINGERPRINT[:32]}
    names(there).remove("book")
    assert all(page.key in opened(there) for page in PAGES)


def test_an_import_that_a_check_refuses_leaves_nothing(root, tmp_path):
    exported(root, tmp_path / "x")

    def refuse_page(page: PageFile) -> None:
        if page.start:
            raise ValueError("wrong values")

    def refuse_text(_: NamedKV) -> Callable[[PageFile], None]:
        raise ValueError("wrong text")

    for check, said in ((lambda _: refuse_page, "wrong values"), (refuse_text, "wrong text")):
        with pytest.raises(CheckpointError, match=f"x: {said}; nothing was imported"):
            names(tmp_path / "there").import_(tmp_path / "x", check=check)
        assert [*(tmp_path / "there").rglob("*.safetensors")] == []
        assert names(tmp_path / "there").list() == []


def test_kv_of_another_model_is_refused(root, tmp_path):
    exported(root, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"KV of gemma3:270m \(bfloat16, native\), which is"):
        names(tmp_path / "there").import_(tmp_path / "x", fingerprint="c" * 64)
    assert not (tmp_path / "there").exists()


def test_an_export_that_is_no_longer_whole_is_refused_and_leaves_no_file(root, tmp_path):
    names(root).save(named())
    path_of(root, PAGES[1].key).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="'book' is incomplete"):
        names(root).export("book", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["kv"]


def test_an_export_overwrites_nothing_and_a_full_disk_leaves_nothing(root, tmp_path, monkeypatch):
    exported(root, tmp_path / "x")
    with pytest.raises(UsageError, match="is already there"):
        names(root).export("book", tmp_path / "x")
    with pytest.raises(OutputError, match="cannot be written"):
        names(root).export("book", tmp_path / "none" / "x")

    def full(*_: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        names(root).export("book", tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kv", "x"]


def test_an_import_that_does_not_fit_is_refused_and_has_no_name(root, tmp_path):
    pages = chain(3, 4, n_values=20_000)
    stored(root, pages)
    names(root).save(named("big", pages))
    names(root).export("big", tmp_path / "x")
    there = tmp_path / "there"
    with pytest.raises(OutputError, match=r"no room for 'big' \(cap\)"):
        names(there, 250_000).import_(tmp_path / "x")
    assert names(there).list() == [] and folder_bytes(there) <= 250_000


def repacked(data: bytes, change: dict[str, bytes | None], more: dict[str, bytes]) -> bytes:
    """An archive with some members changed, left out (None) and added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            body = change.get(name, old.read(name))
            if body is not None:
                new.writestr(name, body)
        for name, body in more.items():
            new.writestr(name, body)
    return out.getvalue()


def refused(there: Path, file: Path, data: bytes) -> bool:
    """Whether an import says that this is no whole export, and puts nothing outside the folder."""
    file.write_bytes(data)
    before = set(file.parent.rglob("*")) - set(there.rglob("*"))
    with pytest.raises(CheckpointError, match=r"not a whole export of mlxkv .*; export it"):
        names(there).import_(file)
    outside = set(file.parent.rglob("*")) - set(there.rglob("*")) - {there}
    return outside <= before and names(there).list() == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_holds_anything_else_is_refused(root, tmp_path):
    data = exported(root, tmp_path / "x")
    page, other = f"pages/{PAGES[0].key.file_name}", chain(4, 1)[0]
    manifest = json.loads(named().to_json())
    moved = replace(PAGES[1], start=5)
    bad = {
        "one member more": repacked(data, {}, {"more": b""}),
        "a member twice": repacked(data, {}, {page: encode(PAGES[0], FINGERPRINT)}),
        "a path upward": repacked(data, {}, {"../escaped": b"x"}),
        "an absolute path": repacked(data, {}, {str(tmp_path / "escaped"): b"x"}),
        "a folder": repacked(data, {}, {"pages/": b""}),
        "a page left out": repacked(data, {page: None}, {}),
        "no manifest": repacked(data, {"manifest.json": None}, {}),
        "another manifest": repacked(data, {"manifest.json": b"{}"}, {}),
        "a name upward": repacked(
            data, {"manifest.json": json.dumps({**manifest, "name": "../x"}).encode()}, {}
        ),
        "another page": repacked(data, {page: encode(other, FINGERPRINT)}, {}),
        "another model's page": repacked(data, {page: encode(PAGES[0], "c" * 64)}, {}),
        "a page of another place": repacked(
            data, {f"pages/{moved.key.file_name}": encode(moved, FINGERPRINT)}, {}
        ),
        "nothing": b"",
        "no archive": b"PK\3\4" + bytes(100),
    }
    for what, damaged in bad.items():
        assert refused(tmp_path / "there", tmp_path / "y", damaged), what


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_an_archive_that_is_compressed_is_refused_before_it_is_unpacked(root, tmp_path, method):
    data = exported(root, tmp_path / "x")
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert refused(tmp_path / "there", tmp_path / "y", out.getvalue())


def test_an_archive_cut_anywhere_is_refused(root, tmp_path):
    data = exported(root, tmp_path / "x")
    for n_bytes in [*range(0, len(data), len(data) // 40), len(data) - 1]:
        assert refused(tmp_path / "there", tmp_path / "y", data[:n_bytes]), n_bytes


def test_an_archive_with_any_byte_changed_is_refused_or_gives_the_same(root, tmp_path):
    data = exported(root, tmp_path / "x")
    rng = random.Random(0)
    n_refused = 0
    for i in range(120):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        (tmp_path / "y").write_bytes(damaged)
        there = tmp_path / f"there{i}"
        try:
            taken = names(there).import_(tmp_path / "y", trusted=True)
        except MlxkvError as error:
            assert isinstance(error, CheckpointError)
            n_refused += 1
            continue
        assert taken == named()  # a time or another note of the zip's, which nothing depends on
        assert all(same(opened(there).read(page.key), page) for page in PAGES)
    assert n_refused > 100


def test_a_file_that_is_not_there_is_an_error_that_says_so(root, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        names(root).import_(tmp_path / "none")


# Clean-up


def test_gc_removes_leftovers_damage_and_what_is_over_the_cap_and_counts_them(root):
    names(root).save(named())
    others = chain(6, 4, n_values=3_000)
    stored(root, others)
    path_of(root, others[0].key).write_bytes(b"x" * 5000)
    foreign = root / "pages" / FINGERPRINT[:32] / "other.safetensors"
    foreign.write_bytes(b"")
    (root / "names" / "bad.json").write_text("{")
    (root / "tmp" / "left").write_bytes(b"x" * 5000)
    report = gc(root, limits())
    left = len(PAGES) + 3
    assert report == GcReport(1, 8192, 3, 8192 + 4096, 0, 0, left, report.n_bytes)
    assert report.n_bytes == opened(root).usage().n_bytes >= folder_bytes(root)
    report = gc(root, limits(folder_bytes(root) + 32_768 - 4096))
    assert (report.evicted, report.n_pages) == (1, left - 1)
    assert report.evicted_bytes > 24_000 and names(root).missing(named()) == []


def test_gc_of_a_whole_folder_changes_nothing(root):
    names(root).save(named())
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    report = gc(root, limits())
    assert report == GcReport(0, 0, 0, 0, 0, 0, len(PAGES), report.n_bytes)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_gc_keeps_names_that_a_later_version_wrote(root):
    (root / "names" / "new.json").write_text('{"version": 99}')
    assert gc(root, limits()).damaged == 0
    assert (root / "names" / "new.json").exists()


def test_gc_with_kv_switched_off_leaves_only_what_is_pinned(root):
    pinned = [page for page in PAGES if page.key.part == "full"]
    names(root).save(named("pinned", pinned, pinned=True))
    report = gc(root, limits(0))
    assert report.evicted == 3 and report.n_pages == 3
    assert names(root).missing(names(root).load("pinned")) == []


def test_gc_removes_the_folder_of_a_model_that_has_no_page_left(root):
    other = PageFiles(root, "c" * 64, limits())
    other.write(chain(1, 1))
    other.flush()
    other.remove(chain(1, 1)[0].key)
    gc(root, limits())
    assert [path.name for path in (root / "pages").iterdir()] == [FINGERPRINT[:32]]
    other.write(chain(1, 1))
    other.flush()
    assert same(other.read(chain(1, 1)[0].key), chain(1, 1)[0])


def test_gc_of_nothing_is_no_error_and_makes_nothing(tmp_path):
    assert gc(tmp_path / "none", limits()) == GcReport(0, 0, 0, 0, 0, 0, 0, 0)
    assert not (tmp_path / "none").exists()
