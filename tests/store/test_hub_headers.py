"""What is planned of a repository without its weights is what is planned of its directory."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import close_session, constants

import mlxkv
from mlxkv.checkpoint.weights import INDEX, read_header
from mlxkv.convert import convert
from mlxkv.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    MlxkvError,
    ModelNotFound,
    OutputError,
)
from mlxkv.store import hub, hub_headers
from mlxkv.store.hub_files import plain_weights, small_files
from mlxkv.store.hub_headers import headers_of
from tests.families.oracle.cases import CASES
from tests.families.test_parity import Golden
from tests.support.command_line import CLOSED, assert_one_line, environment
from tests.support.command_line import mlxkv as command
from tests.support.hub_server import COMMIT, Hub, point_client_at, serve
from tests.support.loading import FILE, ONE_LAYER, weights_of
from tests.support.other_formats import CASES as OTHERS
from tests.support.other_formats import checkpoint
from tests.support.tiny import llama_config, tensor_shapes, write_checkpoint
from tests.support.tiny_embedder import write_embedder

pytestmark = pytest.mark.usefixtures("totals_alone")
REPO = "org/tiny"
FAMILIES = {case.architecture: case for case in CASES}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder for all that is written outside of a test's own."""
    here = tmp_path / "here"
    (here / "temp").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(here / "temp"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(here / "token"))
    monkeypatch.setenv("MLXKV_MODELS", str(here / "models"))
    return here


@pytest.fixture
def served(here, monkeypatch) -> Iterator[Hub]:
    """A hub without repositories, whose address the client has, and no trace of it afterwards."""
    with serve(Hub({})) as hub:
        point_client_at(hub.url, monkeypatch)
        yield hub
        close_session()
    assert [path for path in here.rglob("*") if path.is_file()] == []
    assert list((here / "temp").iterdir()) == []


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def plan(model: str | Path) -> mlxkv.Plan:
    return mlxkv.plan(model, context=700, sequences=2, kv_type="q8", memory="1GiB")


def refused(error: type[MlxkvError], *words: str, model: str = REPO) -> None:
    with pytest.raises(error) as caught:
        plan(model)
    message = str(caught.value)
    assert "\n" not in message
    assert tempfile.gettempdir() not in message
    for word in words:
        assert word in message, message


def safetensors(header: object, n_data: int = 0, *, padding: int = 0) -> bytes:
    text = json.dumps(header).encode() + b" " * padding
    return struct.pack("<Q", len(text)) + text + bytes(n_data)


@pytest.fixture(scope="module")
def large() -> dict[str, bytes]:
    """A model of 33 MB whose weights are all zero."""
    config = llama_config(vocab_size=2**16, hidden_size=64, tie_word_embeddings=False)
    weights = {name: mx.zeros(shape) for name, shape in tensor_shapes(config).items()}
    with tempfile.TemporaryDirectory() as folder:
        return files_of(write_checkpoint(Path(folder), config, weights))


# The same plan.


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_planned_as_its_directory_is(name, served, tmp_path):
    source = Golden.read(FAMILIES[name].name).write(tmp_path / "source", "hub")
    served.repos = {REPO: files_of(source)}
    assert plan(REPO) == plan(source)


@pytest.mark.parametrize("quantize", [None, "affine4", "mxfp4"])
@pytest.mark.parametrize("shards", [1, 3])
def test_one_file_and_several_packed_and_plain(quantize, shards, served, tmp_path):
    source = write_checkpoint(tmp_path / "source", llama_config(), shards=shards)
    if quantize:
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        source = convert(
            source,
            tmp_path / "packed",
            quantize=quantize,
            group_size=32,
            max_shard_bytes=size // (10 if shards > 1 else 1),
        ).path
        assert source is not None
    assert (source / INDEX).exists() == (shards > 1)
    served.repos = {REPO: files_of(source)}
    assert plan(REPO) == plan(source)


@pytest.mark.parametrize("name", ["fp8-powers", "gptq-3", "int4-zeros", "awq", "nvfp4", "nf4"])
def test_a_checkpoint_of_another_quantizer_is_planned_as_what_it_becomes(name, served, tmp_path):
    settings, case, *_ = OTHERS[name]
    source, _ = checkpoint(tmp_path / "source", settings, case)
    served.repos = {REPO: files_of(source)}
    found = plan(REPO)
    becomes = convert(source, tmp_path / "out").path
    assert becomes is not None
    assert found == plan(becomes)


def test_second_scales_that_are_neighbours_take_one_request(served, tmp_path, monkeypatch):
    """As safetensors orders them, wider dtypes first: a mixture has one for each expert."""
    settings, case, *_ = OTHERS["nvfp4"]
    source, _ = checkpoint(tmp_path / "source", settings, case)
    data = (source / FILE).read_bytes()
    header = json.loads(data[8 : (start := 8 + struct.unpack("<Q", data[:8])[0])])
    parts, ordered = [], {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["dtype"] != "F32"):
        first, last = (start + at for at in entry["data_offsets"])
        at = sum(map(len, parts))
        ordered[name] = {**entry, "data_offsets": [at, at + last - first]}
        parts.append(data[first:last])
    (source / FILE).write_bytes(safetensors(ordered) + b"".join(parts))
    monkeypatch.setattr(hub_headers, "_SMALL", 4)  # as if groups' scales were large
    monkeypatch.setattr(hub_headers, "_MOST_REQUESTS", 1)
    served.repos = {REPO: files_of(source)}
    becomes = convert(source, tmp_path / "out").path
    assert becomes is not None
    assert plan(REPO) == plan(becomes)
    assert len([name for name, _ in served.ranged if name == FILE]) == 2


def test_the_command_prints_the_same_as_for_the_directory(tmp_path):
    source = write_checkpoint(tmp_path / "source", llama_config(), shards=2)
    with serve(Hub({REPO: files_of(source)})) as hub:
        env = environment(tmp_path, HF_ENDPOINT=hub.url)
        done = command("plan", REPO, "--context", "300", "--memory", "1GiB", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    local = command("plan", str(source), "--context", "300", "--memory", "1GiB", env=env)
    assert done.stdout == local.stdout
    assert not (tmp_path / "hf" / "hub").exists()


def test_a_head_that_may_be_a_copy_of_the_embedding_counts(served, tmp_path):
    config = {**ONE_LAYER, "tie_word_embeddings": True}
    own = weights_of(ONE_LAYER)
    copied = {**own, "lm_head.weight": own["model.embed_tokens.weight"]}
    folders = [
        write_checkpoint(tmp_path / name, config, weights)
        for name, weights in (("own", own), ("copied", copied))
    ]
    plans = []
    for folder in folders:
        served.repos = {REPO: files_of(folder)}
        plans.append(plan(REPO))
    assert plans[0] == plans[1] == plan(folders[0])
    assert plans[1].weights_bytes == plan(folders[1]).weights_bytes + own["lm_head.weight"].nbytes


def test_a_repository_that_is_complete_in_the_cache_is_not_asked_for(here, monkeypatch):
    point_client_at(CLOSED, monkeypatch)
    repo = here / "hub" / "models--org--tiny"
    snapshot = write_checkpoint(repo / "snapshots" / COMMIT, ONE_LAYER)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (snapshot / "tokenizer.json").write_text("{}")
    assert plan(REPO) == plan(snapshot)


def test_a_path_that_is_none_is_no_repository(served):
    served.repos = {REPO: {}}
    with pytest.raises(ModelNotFound):
        plan(Path(REPO))
    assert served.requests == []


# What is sent.


def test_next_to_nothing_of_the_weights_is_sent(large, served):
    served.repos = {REPO: large}
    assert plan(REPO).weights_bytes > 33e6
    assert sum(served.n_sent) < 0.005 * len(large[FILE])
    assert served.requests == [
        f"GET /api/models/{REPO}",
        f"GET /{REPO}/resolve/{COMMIT}/config.json",
        f"GET /{REPO}/resolve/{COMMIT}/{FILE}",
    ]


def test_a_server_that_ignores_ranges_is_left_as_soon_as_the_header_is_there(large, served):
    served.repos, served.ranges = {REPO: large}, False
    assert plan(REPO).weights_bytes > 33e6
    close_session()
    assert sum(served.n_sent) < 0.25 * len(large[FILE]), "what the system's buffers hold"


def test_files_may_be_at_another_address(large, served):
    served.repos, served.elsewhere = {REPO: large}, True
    assert plan(REPO).weights_bytes > 33e6
    assert sum(served.n_sent) < 0.005 * len(large[FILE])


def test_the_files_are_the_real_ones_without_their_weights(large, served):
    served.repos = {REPO: {**large, "tokenizer.json": b"{}", "x.bin": b"x", "sub/config.json": b""}}
    with headers_of(REPO) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", FILE]
        file = folder / FILE
        assert file.stat().st_blocks * 512 < 0.01 * len(large[FILE])
        assert file.read_bytes() == large[FILE]  # its weights are zero
        assert (folder / "config.json").read_bytes() == large["config.json"]
    assert not folder.exists()


def test_no_byte_behind_a_header_is_kept(served, tmp_path):
    source = write_checkpoint(tmp_path / "source", ONE_LAYER)
    served.repos = {REPO: files_of(source)}
    real = (source / FILE).read_bytes()
    end = 8 + struct.unpack("<Q", real[:8])[0]
    with headers_of(REPO) as folder:
        assert (folder / FILE).read_bytes() == real[:end] + bytes(len(real) - end)


@pytest.mark.parametrize("beyond", [-8, -1, 0, 1, 8, 1000])
def test_a_header_around_the_size_of_the_first_request_is_read_whole(beyond, served, tmp_path):
    entry = {"x": {"dtype": "U8", "shape": [50], "data_offsets": [0, 50]}}
    bare = len(safetensors(entry))
    data = safetensors(entry, 50, padding=hub_headers.FIRST_BYTES + beyond - bare)
    served.repos = {REPO: {"model.safetensors": data}}
    with headers_of(REPO) as folder:
        assert list(read_header(folder / FILE)) == ["x"]
    assert len(served.requests) == (3 if beyond > 0 else 2)


# Refusals.


def test_what_the_hub_refuses_says_why(served):
    served.repos, served.gated = {REPO: {"config.json": b"{}", FILE: b""}}, frozenset({REPO})
    refused(DownloadError, "is gated", "accept its terms")
    refused(ModelNotFound, "no model 'org/none'", model="org/none")
    served.failing = True
    refused(DownloadError, "answers 500")


def test_no_network_and_offline_say_so(here, monkeypatch):
    point_client_at(CLOSED, monkeypatch)
    refused(DownloadError, "cannot be reached", CLOSED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(DownloadError, "HF_HUB_OFFLINE is set", f"mlxkv pull {REPO}")
    close_session()
    assert list((here / "temp").iterdir()) == []
    assert not (here / "hub").exists()


@pytest.mark.parametrize("folder", ["", "Q4/"])
def test_gguf_files_have_to_be_pulled_first(folder, served):
    served.repos = {REPO: {"config.json": b"{}", "m-Q8_0.gguf": b"", f"{folder}m-Q4_K_M.gguf": b""}}
    refused(ModelNotFound, "GGUF files only", f"mlxkv pull {REPO}:m-Q4_K_M.gguf")
    assert len(served.requests) == 1
    refused(ModelNotFound, f"mlxkv pull {REPO}:Q8_0", model=f"{REPO}:Q8_0")
    assert len(served.requests) == 1


@pytest.mark.parametrize("files", [{}, {"model.bin": b""}, {"sub/model.safetensors": b""}])
def test_a_repository_without_weights_that_mlxkv_reads(files, served):
    served.repos = {REPO: {"config.json": b"{}", **files}}
    refused(ModelNotFound, "neither safetensors nor GGUF")


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x10\0\0",
        struct.pack("<Q", 2**63) + bytes(100),
        struct.pack("<Q", 200_000_000) + bytes(100),
        struct.pack("<Q", 101) + bytes(100),
        struct.pack("<Q", 100) + bytes(100),
        safetensors([]),
        safetensors({"x": ENTRY}, 3),
        safetensors({"x": ENTRY}, 5),
        safetensors({"x": {**ENTRY, "shape": [5]}}, 4),
        safetensors({"x": ENTRY, "y": ENTRY}, 8),
    ],
)
def test_a_header_that_lies_is_named_by_repository_and_file(data, served):
    config = json.dumps(ONE_LAYER).encode()
    served.repos = {REPO: {"config.json": config, FILE: data}}
    refused(CheckpointError, f"{REPO}/{FILE}: not a whole safetensors file")


def test_a_file_that_is_cut_is_noticed_from_its_header(large, served):
    served.repos = {REPO: {**large, FILE: large[FILE][:-1]}}
    refused(CheckpointError, f"{REPO}/{FILE}", "not a whole safetensors file")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"{", ["not valid JSON"]),
        (b"{}", ["weight_map"]),
        (b'{"weight_map": {"x": "../../etc/m.safetensors"}}', ["not a file beside it"]),
        (b'{"weight_map": {"x": "config.json"}}', ["not a file beside it"]),
        (b'{"weight_map": {"x": ["m.safetensors"]}}', ["not a file beside it"]),
        (b'{"weight_map": {"x": "m.safetensors"}}', ["m.safetensors: missing"]),
        (b'{"weight_map": {"x": "model.safetensors"}}', ["tensor x is missing"]),
    ],
)
def test_an_index_that_is_wrong_is_refused_and_leads_nowhere(index, words, large, served):
    served.repos = {REPO: {**large, INDEX: index}}
    refused(CheckpointError, f"{REPO}/", *words)
    assert {path.rpartition("/")[2] for path in served.requests} <= {
        "tiny",
        "config.json",
        INDEX,
        FILE,
    }


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (None, DownloadError, ["does not say how long"]),
        (-1, DownloadError, ["does not say how long"]),
        (2**70, DownloadError, ["does not say how long"]),
        (1000, DownloadError, ["ended", "early"]),
    ],
)
def test_a_list_of_files_that_lies_about_sizes(size, error, words, served):
    served.repos, served.listed = {REPO: {FILE: safetensors({"x": ENTRY}, 4)}}, {FILE: size}
    refused(error, *words)


def test_no_room_for_a_file_that_long_says_what_to_set(large, served, monkeypatch):
    def full(path, length):
        raise OSError(27, "File too large")

    monkeypatch.setattr(hub_headers.os, "truncate", full)
    served.repos = {REPO: large}
    with pytest.raises(OutputError, match=r"File too large.*TMPDIR"):
        plan(REPO)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"model_type": "llama"}, ConfigError, [f"{REPO}/config.json", "key"]),
        (None, ModelNotFound, [f"{REPO}/config.json"]),
    ],
)
def test_a_config_that_is_not_understood_names_the_repository(config, error, words, large, served):
    files: Mapping[str, bytes] = {FILE: large[FILE]}
    if config is not None:
        files = {**files, "config.json": json.dumps(config).encode()}
    served.repos = {REPO: files}
    refused(error, *words)


def test_the_command_prints_one_line_for_what_cannot_be_planned(tmp_path):
    with serve(Hub({REPO: {"m.gguf": b""}})) as hub:
        env = environment(tmp_path, HF_ENDPOINT=hub.url)
        assert_one_line(command("plan", REPO, env=env), 3, "GGUF files only", "mlxkv pull")


def test_the_folders_of_an_embedding_models_modules_come_along(served, tmp_path):
    folder = write_embedder(tmp_path / "embedder")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"not wanted")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 300}')
    files = [path for path in folder.rglob("*") if path.is_file()]
    served.repos[REPO] = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    assert plan(REPO) == plan(folder) and plan(folder).context == 300
    dense = sum(path.stat().st_size for path in folder.glob("*_Dense/*.safetensors"))
    alone = sum(info.nbytes for info in read_header(folder / "model.safetensors").values())
    assert alone < plan(REPO).weights_bytes < alone + dense
    names = served.repos[REPO]
    wanted = {*small_files(names), *plain_weights(names)}
    assert {*names} - wanted == {"onnx/model.safetensors"}
    (folder / "2_Dense" / "model.safetensors").unlink()
    assert not hub.is_complete(folder)
    (folder / "modules.json").write_text('[{"path": "2_Dense", "type": 5}]')
    assert hub.is_complete(folder), "damaged, not missing"
