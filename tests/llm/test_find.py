"""Models that fit this machine: planned from the hub's headers, or estimated without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from mlxkv.cli import main
from mlxkv.errors import ModelNotFound
from mlxkv.llm.find import find
from mlxkv.llm.plan import plan
from mlxkv.store import hub_catalog
from tests.support.command_line import assert_one_line, environment
from tests.support.command_line import mlxkv as command
from tests.support.hub_server import Hub, point_client_at, serve
from tests.support.loading import ONE_LAYER
from tests.support.tiny import write_checkpoint


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_fits_is_planned_and_the_largest_comes_first(tmp_path, monkeypatch):
    wide = {**ONE_LAYER, "intermediate_size": 4 * ONE_LAYER["intermediate_size"]}
    small, large = (
        write_checkpoint(tmp_path / name, config)
        for name, config in (("small", ONE_LAYER), ("large", wide))
    )
    unknown = {**files_of(small), "config.json": b'{"model_type": "none"}'}
    repos = {"a/tiny-1": files_of(small), "a/tiny-2": files_of(large), "a/tiny-3": unknown}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "models"))
    with serve(Hub({**repos, "a/other": files_of(small)})) as hub:
        point_client_at(hub.url, monkeypatch)
        found = find(["tiny"], "1GiB", 100)
        assert [model.name for model in found.fitting] == ["a/tiny-2", "a/tiny-1"]
        assert not found.offline and not found.fitting[0].is_estimate
        needs = [plan(folder, 100, memory="1GiB").total_bytes for folder in (large, small)]
        assert [model.total_bytes for model in found.fitting] == needs
        found = find(["tiny"], needs[1], 100)
        assert [model.name for model in found.fitting] == ["a/tiny-1"]
        with pytest.raises(ModelNotFound, match=r"fits in 1000 B: of 2 found, the smallest is a/t"):
            find(["tiny"], 1000, 100)
        close_session()


def test_without_a_network_known_models_are_estimated(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = find(["GEMMA", "it"], "16GiB")
    assert found.offline == "HF_HUB_OFFLINE is set"
    sizes = [model.total_bytes for model in found.fitting]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= 16 << 30
    assert found.fitting[0].name == "mlx-community/gemma-3-12b-it-4bit"
    assert all(
        model.is_estimate and model.weights_bytes < model.total_bytes for model in found.fitting
    )
    assert find(["gemma-3-1b"], "16GiB", 100_000).fitting[0].total_bytes > 100_000 * 4096
    with pytest.raises(ModelNotFound, match="no model that mlxkv runs has 'x zz' in its name"):
        find(["x", "zz"])


def test_known_models_are_of_our_own_families():
    from mlxkv.models import NATIVE

    assert {model.model_type for model in hub_catalog.KNOWN} <= set(NATIVE)
    names = [model.name for model in hub_catalog.KNOWN]
    assert len(set(names)) == len(names)


def test_the_list_of_families_has_columns_and_takes_no_options_of_a_search(capfd):
    assert main(["models"]) == 0
    lines = capfd.readouterr().out.splitlines()
    width = max(len(line.split()[0]) for line in lines)
    assert all(line[width] == " " and line[width + 1] != " " for line in lines)
    assert any(line.startswith("embedding_gemma ") for line in lines)
    for option in (["--json"], ["--memory", "8GiB"]):
        assert main(["models", *option]) == 2
        assert capfd.readouterr().err == f"mlxkv: {option[0]} is for --find WORDS\n"


def test_the_command_prints_a_table_or_json(tmp_path):
    env = environment(tmp_path, HF_HUB_OFFLINE="1")
    done = command("models", "--find", "llama", "8b", "--memory", "8GiB", "--json", env=env)
    (model,) = json.loads(done.stdout)
    assert model["name"] == "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit"
    assert "HF_HUB_OFFLINE is set" in done.stderr
    table = command("models", "--find", "llama 8b", "--memory", "8GiB", env=env).stdout
    assert table.splitlines()[0].split() == ["NAME", "FAMILY", "WEIGHTS", "NEEDS"]
    assert_one_line(command("models", "llama", env=env), 2, "mlxkv models --find llama")
