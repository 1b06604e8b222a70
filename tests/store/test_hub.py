"""What is fetched of a repository, how a fetch goes on, and what of the cache is found."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import close_session, constants

from mlxkv.errors import DownloadError, MlxkvError, ModelNotFound, OutputError, UsageError
from mlxkv.store import hub, hub_download, hub_fetch, hub_files, library, resolve
from mlxkv.store.hub_fetch import fetch_gguf
from mlxkv.store.hub_files import check_reachable, list_files
from mlxkv.store.refs import HubRef, locate
from tests.support.hub_server import COMMIT, Hub, point_client_at, serve

REPO = "org/tiny"
OTHER = "f" * 40
WEIGHTS = "model.safetensors"
DATA = bytes(range(256)) * 40
FILES = {"config.json": b"{}", "tokenizer.json": b"{}", WEIGHTS: DATA}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The hub's cache of a test's own, and no waiting between tries."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(hub_download, "WAITS_S", (0.0, 0.0))
    return tmp_path / "hub"


@pytest.fixture
def served(cache, monkeypatch) -> Iterator[Hub]:
    with serve(Hub({REPO: FILES})) as hub:
        point_client_at(hub.url, monkeypatch)
        yield hub
        close_session()


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refused(error: type[MlxkvError], *words: str, name: str = REPO) -> None:
    with pytest.raises(error) as caught:
        resolve.pull(name)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# Revisions.


def test_a_name_may_have_a_revision_and_a_file(cache):
    assert locate("org/a@v1.0") == HubRef("org/a", None, "v1.0")
    assert locate("org/a@refs/pr/1:Q4_K_M") == HubRef("org/a", "Q4_K_M", "refs/pr/1")
    assert HubRef("org/a", "x.gguf", "v1").name == "org/a@v1:x.gguf"
    for name in ("org/a@../../x", "org/a@/x", "org/a@"):
        assert not isinstance(locate(name), HubRef)
    assert resolve.default_output("org/a@refs/pr/1:Q4", "affine4", None) == "a-refs-pr-1-affine4"


def test_each_revision_is_a_model_of_its_own(served, cache):
    served.revisions["v1"] = OTHER
    old, new = resolve.pull(f"{REPO}@v1"), resolve.pull(REPO)
    assert (old.name, new.name) == (OTHER, COMMIT)
    served.requests.clear()
    for name, path in ((REPO, new), (f"{REPO}@v1", old), (f"{REPO}@{OTHER[:8]}", old)):
        assert resolve.resolve(name, fetch=False) == path
    assert served.requests == []
    with pytest.raises(ModelNotFound, match=f"mlxkv pull {REPO}@v2"):
        resolve.resolve(f"{REPO}@v2", fetch=False)
    assert [model.name for model in library.list_models()] == [REPO, f"{REPO}@v1"]
    library.remove(f"{REPO}@v1")
    assert not old.exists() and new.exists()
    library.remove(REPO)
    assert not (cache / "models--org--tiny").exists()


def test_a_revision_alone_does_not_stand_for_the_repository_and_is_named(served, monkeypatch):
    served.revisions["v1"] = OTHER
    resolve.pull(f"{REPO}@v1")
    with pytest.raises(ModelNotFound):
        resolve.resolve(REPO, fetch=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(DownloadError, f"mlxkv pull {REPO}", f"what is here: {REPO}@v1")


@pytest.mark.parametrize("main", [None, OTHER, "0" * 40, "", "../../x"])
def test_a_complete_snapshot_is_found_whatever_main_says(main, served, cache):
    path = resolve.pull(REPO)
    half = path.with_name(OTHER)
    half.mkdir()
    (half / "config.json").write_text("{}")
    ref = cache / "models--org--tiny" / "refs" / "main"
    ref.unlink()
    if main is not None:
        ref.write_text(main)
    assert resolve.resolve(REPO, fetch=False) == path
    assert [model.path for model in library.list_models()] == [path]


# What is fetched.


def test_no_weights_are_fetched_twice(served):
    unneeded = ("model.fp16.safetensors", "consolidated.safetensors", "pytorch_model.bin", "a.pth")
    unneeded += ("onnx/model.onnx", "original/params.json", "m-Q4.gguf", "trainer_state.json")
    unneeded += ("pytorch_model.bin.index.json", "x.py", "README.md", "../up.json")
    needed = {**FILES, "chat_template.jinja": b"", "additional_chat_templates/tools.jinja": b"x"}
    served.repos = {REPO: {**needed, **dict.fromkeys(unneeded, b"x")}}
    assert names_in(resolve.pull(REPO)) == set(needed)


def test_an_index_says_which_weights_are_needed(served):
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    parts = {"model.safetensors.index.json": index, "model-1.safetensors": b"1"}
    parts |= {"model-2.safetensors": b"2"}
    served.repos = {REPO: {**FILES, **parts}}
    assert names_in(resolve.pull(REPO)) == {*FILES, *parts} - {WEIGHTS}


def test_of_gguf_files_only_the_named_one_comes_with_its_parts_and_encoders(served):
    parts = [f"Q8/m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    others = ["m-Q4_0.gguf", "mmproj-f16.gguf", "config.json"]
    served.repos = {REPO: {name: name.encode() for name in parts + others}}
    path = fetch_gguf(list_files(REPO), "q8_0", resolve.silent)
    assert path.read_text() == parts[0]
    assert names_in(path.parents[1]) == {*parts, "mmproj-f16.gguf"}
    refused(UsageError, "2 GGUF files that fit; choose one")
    served.repos = {REPO: {parts[0]: b"1"}}
    refused(ModelNotFound, f"{parts[1]}, a part of", name=f"{REPO}:Q8_0")


def test_progress_counts_bytes(served):
    steps = []
    resolve.pull(REPO, report=lambda *step: steps.append(step))
    total = sum(map(len, set(FILES.values())))
    assert steps[-1] == (f"fetching {REPO}", total, total)


def test_files_that_came_before_the_first_look_are_reported(monkeypatch):
    class Ended(threading.Thread):
        def start(self):
            super().start()
            self.join()

    monkeypatch.setattr(hub_fetch.threading, "Thread", Ended)
    small = Mock(file=Mock(n_bytes=3), n_done=3, trouble="")
    steps = []
    hub_fetch._run([small], "a", threading.Event(), lambda *step: steps.append(step))
    assert steps == [("fetching a", 3, 3)]


@pytest.mark.parametrize("hashes", [True, False])
def test_a_mirror_may_be_at_a_path_and_know_no_hashes(hashes, served, cache, monkeypatch):
    served.hashes, served.elsewhere = hashes, True
    point_client_at(f"{served.url}/mirror", monkeypatch)
    path = resolve.pull(REPO)
    assert {name: (path / name).read_bytes() for name in FILES} == FILES
    assert list((cache / "models--org--tiny" / "blobs").glob("*part")) == []


# Fetches that break.


def test_a_broken_connection_goes_on_where_it_ended(served):
    served.cuts[WEIGHTS] = [1000, 0, 500]
    path = resolve.pull(REPO)
    assert (path / WEIGHTS).read_bytes() == DATA
    asked = [ranged for name, ranged in served.ranged if name == WEIGHTS]
    assert asked == ["", "bytes=1000-", "bytes=1000-", "bytes=1500-"]


def test_the_next_pull_goes_on_where_one_ended(served, cache):
    served.cuts[WEIGHTS] = [1000, 0, 0, 0]
    refused(DownloadError, "the connection broke", f"`mlxkv pull {REPO}` goes on")
    with pytest.raises(ModelNotFound):
        resolve.resolve(REPO, fetch=False)
    assert library.list_models() == []
    served.ranged.clear()
    assert (resolve.pull(REPO) / WEIGHTS).read_bytes() == DATA
    assert served.ranged == [(WEIGHTS, "bytes=1000-")], "the small files were here"


def test_rm_takes_what_an_interrupted_pull_left(served, cache):
    served.cuts[WEIGHTS] = [1000, 0, 0, 0]
    refused(DownloadError)
    assert library.remove(REPO) >= 1000
    assert names_in(cache) == set()


def test_rm_of_a_revision_that_never_came_says_so_and_keeps_what_an_interrupted_pull_left(
    served, cache
):
    served.cuts[WEIGHTS] = [1000, 0, 0, 0]
    refused(DownloadError)
    for has_snapshots in (False, True):
        if has_snapshots:
            (cache / "models--org--tiny" / "snapshots").mkdir()
        with pytest.raises(ModelNotFound, match=f"no model '{REPO}@v1' is on this machine"):
            library.remove(f"{REPO}@v1")
    assert len(list((cache / "models--org--tiny" / "blobs").glob("*part"))) == 1


def part_of_weights(cache: Path, data: bytes) -> Path:
    """What an earlier pull may have left."""
    blobs = cache / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / (hashlib.sha256(DATA).hexdigest() + hub.PART)
    part.write_bytes(data)
    return part


@pytest.mark.parametrize("kept", [DATA[:1000], DATA])
def test_a_server_without_ranges_sends_all_again(kept, served, cache):
    part_of_weights(cache, kept)
    served.ranges = False
    assert (resolve.pull(REPO) / WEIGHTS).read_bytes() == DATA


def test_a_part_that_is_whole_already_is_fetched_anew_where_no_size_is_known(served, cache):
    """The hub answers that nothing follows: the part may be of the file, or of another."""
    served.hashes, served.listed[WEIGHTS] = False, None
    part = part_of_weights(cache, DATA)
    etag = hashlib.sha1(DATA, usedforsecurity=False).hexdigest()
    part.rename(part.with_name(etag + hub.PART))
    assert (resolve.pull(REPO) / WEIGHTS).read_bytes() == DATA
    asked = [ranged for name, ranged in served.ranged if name == WEIGHTS and ranged]
    assert asked == [f"bytes={len(DATA)}-"]


@pytest.mark.parametrize("kept", [b"x" * 1000, b"x" * len(DATA), DATA + b"x"])
def test_what_is_not_the_listed_content_is_no_model(kept, served, cache):
    part = part_of_weights(cache, kept)
    refused(DownloadError, WEIGHTS, "try again")
    assert not part.exists()
    assert (resolve.pull(REPO) / WEIGHTS).read_bytes() == DATA


def test_a_file_that_takes_a_part_of_what_is_written_gets_the_rest():
    class Small(io.BytesIO):
        def write(self, data):
            return super().write(data[:3])

    out = Small()
    hub_download.write_all(out, DATA[:10])
    assert out.getvalue() == DATA[:10]


def test_an_error_waits_for_the_other_downloads_to_end():
    stop, begun, ended = threading.Event(), threading.Event(), []

    class Fails:
        file, n_done, trouble = hub_files.HubFile("a", 1, None), 0, ""

        def run(self) -> None:
            begun.wait(5)
            raise ValueError("fails")

    class Ends(Fails):
        def run(self):
            begun.set()
            stop.wait(5)
            time.sleep(0.02)
            ended.append(True)

    downloads: list[Any] = [Fails(), Ends()]
    with pytest.raises(ValueError, match="fails"):
        hub_fetch._run(downloads, "a", stop, resolve.silent)
    assert ended == [True]


def test_two_pulls_at_once_fetch_each_file_once(served):
    threads = [threading.Thread(target=resolve.pull, args=(REPO,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (resolve.resolve(REPO, fetch=False) / WEIGHTS).read_bytes() == DATA
    assert [name for name, _ in served.ranged].count(WEIGHTS) == 1


# What the hub refuses, and no network.


def test_what_is_refused_says_what_to_do(served, cache, monkeypatch):
    refused(ModelNotFound, "no model 'org/none'", "hf auth login", "--find none", name="org/none")
    refused(ModelNotFound, f"{REPO} has no revision 'v9'", "/tree/main", name=f"{REPO}@v9")
    served.status = 401
    refused(DownloadError, "refuses the token", "HF_TOKEN")
    served.status = 403
    refused(DownloadError, "gives no access", f"{served.url}/{REPO}")
    served.status, served.gated = 0, frozenset({REPO})
    refused(DownloadError, "is gated", "accept its terms", "then `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    refused(DownloadError, "is gated", "with the account of your token")


def test_a_disk_that_takes_no_more_is_not_called_a_network(served, monkeypatch):
    for code, words in ((errno.EFBIG, "File too large"), (errno.ENOSPC, "no space left")):
        error = OSError(code, os.strerror(code))
        monkeypatch.setattr(hub_download, "write_all", Mock(side_effect=error))
        refused(OutputError, words, "HF_HUB_CACHE")


def test_a_hub_that_gives_no_sign_is_unreachable_in_seconds(monkeypatch):
    monkeypatch.setattr(hub_files, "CONNECT_S", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *_: ended.wait(5))
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        check_reachable("https://example.invalid")
    assert time.monotonic() - start < 2
    ended.set()


def test_a_proxy_is_what_must_be_reachable(monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside")
    for endpoint in ("https://hub", "https://inside/hf"):
        with pytest.raises(ConnectionRefusedError):
            check_reachable(endpoint)
    assert asked == [("proxy", 3128), ("inside", 443)]
