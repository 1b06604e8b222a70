"""Adapters from Python and on the command line: memory, KV, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import mlxkv
from mlxkv.cli import main
from mlxkv.engine.messages import Ask
from mlxkv.errors import ModelNotFound, OutOfMemory, UsageError, WeightsError
from mlxkv.generation.request import Request
from mlxkv.llm.plan import plan
from mlxkv.store.adapters import adapter_refs, cached, key_of_own, own_adapters, stamp_of
from mlxkv.store.derive import derive
from tests.engine.test_engine import collect, tokens
from tests.models.test_adapters import mlx_lm
from tests.support.threaded_engine import running

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def adapter(reused: Path, tmp_path: Path) -> Path:
    config = json.loads((reused / "llama" / "config.json").read_text())
    E, hidden = config["hidden_size"], config["intermediate_size"]
    return mlx_lm(tmp_path / "adapter", {Q: (E, E), DOWN: (hidden, E)}, model="org/base")


def test_its_bytes_count_in_plan_and_budget(reused: Path, kv: Path, adapter: Path) -> None:
    base, path = plan(reused / "llama"), reused / "llama"
    planned = plan(path, adapter=adapter)
    llm = mlxkv.load(path, adapter=adapter)
    assert llm.budget.weights_bytes == planned.weights_bytes > base.weights_bytes
    limit = (base.weights_bytes + planned.weights_bytes) // 2
    with pytest.raises(OutOfMemory):
        mlxkv.load(path, memory=limit, adapter=adapter)


def test_its_kv_is_no_others(reused: Path, kv: Path, adapter: Path) -> None:
    prompt = list(range(3, 90)) * 4
    answers, fingerprints = {}, set()
    for weight in (None, "1", "0.5"):
        given = None if weight is None else f"{adapter}={weight}"
        with mlxkv.load(reused / "llama", adapter=given) as llm:
            result = llm.generate(prompt, max_tokens=4, logprobs=1)
            assert result.stats.restored_tokens == 0
            assert llm.pages is not None and llm.pages.disk is not None
            fingerprints.add(llm.pages.disk.fingerprint)
            answers[weight] = [token.logprob for token in result.logprobs]
            if weight is None:
                llm.save_kv("of-base", "a text")
            else:
                with pytest.raises(UsageError, match="of-base"):
                    llm.saved_kv("of-base")
    assert len(fingerprints) == 3
    assert len({tuple(each) for each in answers.values()}) == 3
    with mlxkv.load(reused / "llama", adapter=adapter) as llm:
        assert llm.generate(prompt, max_tokens=1).stats.restored_tokens


def test_the_command_line_takes_and_shows_adapters(reused, kv, adapter, capsys) -> None:
    run = ["run", "--raw", "-n", "2", "--adapter", f"{adapter}=0.5", str(reused / "llama"), "a b"]
    assert main(run) == 0
    capsys.readouterr()
    assert main(["adapters", "show", str(adapter), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["base"], shown["ranks"], shown["layers"]) == ("org/base", [3], [0, 1])
    assert shown["projections"] == {"down_proj": 1, "q_proj": 1}
    for args, message in (
        (
            ["run", "--adapter", str(adapter / "none"), str(reused / "llama"), "a"],
            "no such adapter",
        ),
        (["convert", str(reused / "llama"), "--adapter", str(adapter)], "--adapter needs --fuse"),
    ):
        assert main(args) != 0
        assert message in capsys.readouterr().err


def test_a_weight_is_a_number_and_a_path_an_adapter(adapter: Path, tmp_path: Path) -> None:
    (ref,) = adapter_refs([f"{adapter}=-0.25"])
    assert (ref.path, ref.weight) == (adapter, -0.25)
    for wrong in ("", "much", "nan", "inf"):
        with pytest.raises(UsageError, match="adapter"):
            adapter_refs(f"{adapter}={wrong}")
    with pytest.raises(ModelNotFound, match="holds no adapter"):
        adapter_refs(tmp_path)


def test_an_engine_loads_a_model_with_the_adapters_given_for_it(
    reused: Path, kv: Path, adapter: Path
) -> None:
    path, options = reused / "llama", {"max_tokens": 12, "draft": "off"}
    refs = adapter_refs(adapter)
    with mlxkv.load(path, dtype="float32", adapter=adapter) as llm:
        expected = llm.generate("a text", **options).tokens
    with mlxkv.load(path, dtype="float32") as llm:
        assert llm.generate("a text", **options).tokens != expected
    with running(adapters={str(path): refs}) as engine:
        ask = Ask(str(path), Request.of("a text", **options))
        assert tokens(asyncio.run(collect(engine.submit(ask)))) == expected
    assert stamp_of(refs) != stamp_of(adapter_refs(f"{adapter}=0.5")) != stamp_of([]) == ""


def test_a_model_made_with_adapters_is_always_loaded_with_them(
    reused: Path, kv: Path, adapter: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "models"))
    path = reused / "llama"
    assert main(["adapters", "make", "tuned", str(path), f"{adapter}=0.5"]) == 0
    made = Path(capsys.readouterr().out.strip())
    assert [ref.weight for ref in own_adapters(made)] == [0.5]
    with mlxkv.load(path, adapter=f"{adapter}=0.5") as llm:
        expected, n_bytes = llm.generate("a text", max_tokens=8).tokens, llm.budget.weights_bytes
    with mlxkv.load("tuned") as llm:
        assert llm.generate("a text", max_tokens=8).tokens == expected
        assert llm.budget.weights_bytes == n_bytes == plan("tuned").weights_bytes
        assert llm.model.adapter_key == key_of_own(made) != ""
    # A copy keeps them, and another's come on top.
    twice = derive(made, "twice", adapters=adapter_refs(f"{adapter}=-0.5"))
    assert [ref.weight for ref in own_adapters(twice)] == [0.5, -0.5]
    with mlxkv.load("twice") as llm, mlxkv.load(path) as base:
        options = {"max_tokens": 4, "draft": "off"}
        assert llm.generate("a", **options).tokens == base.generate("a", **options).tokens
    assert main(["convert", "tuned", "-o", str(tmp_path / "out")]) != 0
    assert "adapters of its own" in capsys.readouterr().err
    wide = mlx_lm(tmp_path / "wide", {Q: (999, 64)})
    with pytest.raises(WeightsError, match="lora_a"):
        derive(path, "wrong", adapters=adapter_refs(wide))
    assert not (tmp_path / "models" / "wrong").exists()


def test_a_request_names_adapters_of_the_cache_and_no_paths(adapter: Path) -> None:
    for name in (str(adapter), "../adapter", "org/none"):
        with pytest.raises(ModelNotFound, match="no adapter"):
            cached(name)
