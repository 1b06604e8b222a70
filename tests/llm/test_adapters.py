"""Adapters from Python and on the command line: memory, KV, and what is refused."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest

import mlxkv
from mlxkv.cli import main
from mlxkv.engine import prompt as prompts
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.ahead.next_turn import Answered
from mlxkv.engine.driver import run
from mlxkv.engine.loading import ModelLoads, PendingRequest
from mlxkv.engine.messages import Ask
from mlxkv.engine.model_pool import ModelPool
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.errors import MlxkvError, ModelNotFound, OutOfMemory, UsageError, WeightsError
from mlxkv.generation import mixed as mixed_models
from mlxkv.generation.request import Request
from mlxkv.kv.types import STEP
from mlxkv.llm.plan import plan
from mlxkv.store.adapters import adapter_refs, cached, key_of_own, own_adapters, stamp_of
from mlxkv.store.derive import derive
from mlxkv.store.settings import Given
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
    assert plan(f"{path}+{adapter}").weights_bytes == planned.weights_bytes
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
    assert main(["show", f"{reused / 'llama'}+{adapter}=0.5", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["adapters"]
    assert (shown["weight"], shown["layers"]) == (0.5, [0, 1])
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


def test_rows_of_a_batch_have_the_adapters_of_their_requests(
    reused: Path, kv: Path, adapter: Path, monkeypatch
) -> None:
    """With drafts, penalties and a grammar, each as where it is alone on a model loaded with it."""
    path, names = reused / "llama", ["", str(adapter), f"{adapter}=-0.5", f"{adapter}=0.25"]
    each: list[dict[str, Any]] = [
        {"prompt": "a text " * 9, "repeat_penalty": 1.3},
        {"prompt": "a text " * 5, "draft": "off"},
        {"prompt": "what is it", "format": re.compile("[a-f ]+")},
        {"prompt": "a text " * 9, "temperature": 0.8, "seed": 3},
    ]
    alone = []
    for name, options in zip(names, each, strict=True):
        with mlxkv.load(path, dtype="float32", adapter=name or None) as llm:
            alone.append(llm.generate(max_tokens=24, **options).tokens)
    mixed: list[int] = []
    merge = mixed_models.merge_changes
    monkeypatch.setattr(
        mixed_models, "merge_changes", lambda m, c: mixed.append(len(m)) or merge(m, c)
    )
    with mlxkv.load(path, dtype="float32") as llm:
        n_bytes = llm.budget.weights_bytes
        for is_short in (False, True):
            if is_short:  # no room for copies: one row after the other
                monkeypatch.setattr(llm.budget, "has_room", lambda *_: False)
            asked = [
                Request.of(max_tokens=24, adapter=name or None, **options)
                for name, options in zip(names, each, strict=True)
            ]
            made = [llm._generation(x, prompts.prepare(llm, x)) for x in asked]
            found: list[list[int]] = [[] for _ in made]
            for i, chunk in run(llm, made, keep_sessions=False):
                found[i] += [] if chunk.token is None else [chunk.token]
            assert found == alone
            del made
        assert mixed and set(mixed) <= {2, 3, 4}
        # One base, three adapters; what steps have copied is gone with their rows.
        own = sum(each.n_bytes for each in llm.adapted)
        assert llm.budget.weights_bytes == n_bytes + own and len(list(llm.adapted)) == 3
        assert llm.adapted.give_back() == own
        assert llm.budget.weights_bytes == n_bytes and not list(llm.adapted)


def test_a_requests_adapter_is_dropped_for_another_and_not_while_it_answers(
    reused: Path, kv: Path, adapter: Path
) -> None:
    path = reused / "llama"
    with mlxkv.load(path) as llm:
        answer = llm.stream("a text", max_tokens=8, adapter=str(adapter))
        next(answer)
        (first,) = llm.adapted
        assert not first.is_idle
        llm.budget.limit_bytes = llm.budget.used_bytes + first.n_bytes // 2
        with pytest.raises(OutOfMemory, match="the adapter takes"):
            llm.generate("b", adapter=f"{adapter}=0.5")
        list(answer)
        del answer
        gc.collect()
        llm.budget.limit_bytes = llm.budget.used_bytes + first.n_bytes // 2
        llm.adapted.get([f"{adapter}=0.5"])
        assert [each.given for each in llm.adapted] == [(f"{adapter}=0.5",)]
        with pytest.raises(ModelNotFound):
            llm.generate("b", adapter="none")


def test_pages_of_a_requests_adapter_are_those_of_a_model_that_is_loaded_with_it(
    reused: Path, kv: Path, adapter: Path
) -> None:
    path, prompt = reused / "llama", list(range(3, 90)) * 4
    with mlxkv.load(path, adapter=adapter) as llm:
        llm.generate(prompt, max_tokens=1)
    with mlxkv.load(path) as llm:
        assert llm.generate(prompt, max_tokens=1).stats.restored_tokens == 0
        given = llm.generate(prompt, max_tokens=1, adapter=str(adapter)).stats
        assert given.restored_ssd_tokens >= STEP
        other = llm.generate(prompt, max_tokens=1, adapter=f"{adapter}=0.5").stats
        assert other.restored_tokens == 0
        chat = llm.conversation(adapter=str(adapter))
        assert chat._session.model.adapter_key
        with pytest.raises(UsageError, match="whole conversation"):
            next(chat.send("a", adapter=str(adapter)))


def test_an_engine_loads_adapters_of_requests_beside_one_base(
    reused: Path, kv: Path, adapter: Path
) -> None:
    path, options = reused / "llama", {"max_tokens": 12, "draft": "off"}
    names = [None, str(adapter), f"{adapter}=0.5"]
    expected = []
    for name in names:
        with mlxkv.load(path, dtype="float32", adapter=name) as llm:
            expected.append(llm.generate("a text", **options).tokens)

    async def together(engine: Any, asks: list[Ask]) -> list[list[int]]:
        return [tokens(x) for x in await asyncio.gather(*(collect(engine.submit(a)) for a in asks))]

    with running() as engine:
        asks = [Ask(str(path), Request.of("a text", adapter=x, **options)) for x in names]
        assert asyncio.run(together(engine, asks)) == expected
        (loaded,) = engine.loaded()
        assert {name for name, _ in loaded.adapters} == {"adapter", "adapter=0.5"}
        assert engine.loaded("")[0].adapters and not engine.loaded("other's")[0].adapters
        lost = Ask(str(path), Request.of("a", adapter="org/none"))
        with pytest.raises(MlxkvError):
            asyncio.run(collect(engine.submit(lost)))


def test_a_next_turn_loads_no_adapter_that_was_dropped(
    reused: Path, kv: Path, adapter: Path
) -> None:
    with mlxkv.load(reused / "llama", dtype="float32") as llm:
        served = Scheduler(llm, 2, IdleCompute("full"))
        asked = Request.of([{"role": "user", "content": "hi"}], max_tokens=3, adapter=str(adapter))
        served.add(Task(asked, lambda item: None, lambda: False))
        while not served.is_idle:
            served.step()
        gc.collect()
        turn = Answered(asked, "", "", {"role": "assistant", "content": "a"}, [], 512, [5] * 300)
        served.next_turns._waiting.append(turn)
        assert llm.adapted.give_back() > 0
        while not served.next_turns.is_empty:
            served.next_turns.step()
        assert not list(llm.adapted)


def test_an_adapter_is_dropped_also_where_its_pages_cannot_be_written(
    reused: Path, kv: Path, adapter: Path, monkeypatch
) -> None:
    with mlxkv.load(reused / "llama", dtype="float32") as llm:
        n_bytes = llm.budget.weights_bytes
        llm.generate("a text", max_tokens=2, adapter=str(adapter))
        pages = llm.pages_of("", (str(adapter),))
        assert pages is not None and len(llm.budget.shares._all) == 2

        def fail() -> None:
            raise OSError("no space left")

        monkeypatch.setattr(pages, "close", fail)
        gc.collect()
        assert llm.adapted.give_back() > 0
        assert llm.budget.weights_bytes == n_bytes and len(llm.budget.shares._all) == 1


def test_a_request_whose_model_fails_while_its_adapter_loads_gets_it_anew(
    reused: Path, kv: Path, adapter: Path
) -> None:
    path = reused / "llama"
    pool = ModelPool(2**33, "float32", Given(), 300.0, 4)
    loads, got = ModelLoads(pool), list[Any]()

    def ask(*adapters: str) -> None:
        pending = PendingRequest(got.append, got.append, lambda: False, None, adapter=adapters)
        loads.request("m", path, pending)

    ask()
    loads.proceed(lambda: False)
    ask(str(adapter))
    pool.drop(str(path), MlxkvError("it failed"))
    while loads:
        loads.proceed(lambda: False)
    first, again = got
    assert again is not first and pool.find(str(path)) is again
    assert again.scheduler.runtime.adapted.find([str(adapter)]) is not None
    pool.drop(str(path))
