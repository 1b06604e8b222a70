"""Adapters in Hugging Face's cache: fetched once, listed, found without a network, removed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import close_session, constants

from mlxkv.checkpoint.adapter import Adapter
from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.models.adapters import Weighted
from mlxkv.store import adapters, library, resolve
from tests.support.hub_server import Hub, point_client_at, serve

REPO, OTHER = "org/adapter", "org/model"
CONFIG = b'{"lora_parameters": {"scale": 2.0}}'


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "models"))
    file = tmp_path / "adapters.safetensors"
    arrays = {"x.q_proj.lora_a": mx.zeros((8, 2)), "x.q_proj.lora_b": mx.zeros((2, 8))}
    mx.save_safetensors(str(file), arrays)
    files = {"adapter_config.json": CONFIG, file.name: file.read_bytes(), "README.md": b"x"}
    with serve(Hub({REPO: files, OTHER: {"config.json": b"{}"}})) as hub:
        point_client_at(hub.url, monkeypatch)
        yield hub
        close_session()


def test_an_adapter_of_another_repository_is_told_but_for_copies(tmp_path: Path) -> None:
    adapter = Adapter("a", "PEFT", "LoRA", "meta-llama/Llama-3.2-1B", {}, "")
    for name, n in (("x--Llama-3.2-1B-Instruct-4bit", 0), ("x--Qwen3-1B", 1)):
        folder = tmp_path / f"models--{name}" / "snapshots" / "1"
        assert len(adapters.other_bases([Weighted(adapter)], folder)) == n
    local = Adapter("a", "PEFT", "LoRA", "/tmp/trained", {}, "")
    assert adapters.other_bases([Weighted(local)], folder) == []


def test_an_adapter_of_a_repository_is_fetched_once_listed_and_removed(served: Hub) -> None:
    with pytest.raises(ModelNotFound, match="is not here"):
        adapters.find(REPO, fetch=False)
    (ref,) = adapters.adapter_refs(f"{REPO}=0.5")
    assert {path.name for path in ref.path.iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
    }
    assert (ref.weight, adapters.read(ref.path).targets["x.q_proj"].scale) == (0.5, 2.0)
    served.requests.clear()
    assert adapters.find(REPO) == adapters.find(f"{REPO}@main") == ref.path
    assert served.requests == []
    assert [(each.name, each.path) for each in adapters.stored_adapters()] == [(REPO, ref.path)]
    assert library.list_models() == []
    assert resolve.pull(REPO) == ref.path
    with pytest.raises(ModelNotFound, match="holds an adapter and no model"):
        resolve.resolve(REPO)
    with pytest.raises(ModelNotFound, match=f"{OTHER} holds no adapter"):
        adapters.find(OTHER)
    with pytest.raises(UsageError, match="takes a name"):
        adapters.remove(str(ref.path))
    assert adapters.remove(REPO) > 0
    with pytest.raises(ModelNotFound, match="no adapter"):
        adapters.remove(REPO)
