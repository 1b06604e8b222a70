"""`mlxkv kv tune`: formats by layer at a number of bytes, and that a model then runs with them."""

from __future__ import annotations

import json
from itertools import product
from random import Random

import pytest

import mlxkv
from mlxkv.bench import kv_tune
from mlxkv.errors import OutOfMemory, UsageError
from mlxkv.kv.types import KVFormat, layer_types
from tests.support.command_line import assert_one_line, chat_model, environment
from tests.support.command_line import mlxkv as command


def costs_of(chance: Random, n_layers: int) -> dict[int, dict[str, tuple[int, float]]]:
    sizes = {"native": 100, "q8": 53, "k8v4": 41, "q4": 28}
    found = {}
    for layer in range(n_layers):
        kls = [0.0, *sorted(chance.random() ** 4 for _ in range(3))]
        of = zip(sizes, kls, strict=True)
        found[layer] = {name: (sizes[name], kl) for name, kl in of}
    return found


def test_what_is_chosen_fits_and_costs_little_more_than_the_best_there_is():
    """Greedy, beside the best of all combinations."""
    chance, ratios = Random(3), []
    for _ in range(40):
        costs = costs_of(chance, 4)
        most = chance.randint(4 * 28, 4 * 60)
        chosen = kv_tune.choose(costs, most)
        assert sum(costs[i][name][0] for i, name in chosen.items()) <= most
        sums = (
            (sum(n for n, _ in of), sum(kl for _, kl in of))
            for of in product(*(each.values() for each in costs.values()))
        )
        best = min(kl for n, kl in sums if n <= most)
        got = sum(costs[i][name][1] for i, name in chosen.items())
        ratios.append((got + 1e-9) / (best + 1e-9))
    assert max(ratios) < 2 and sum(ratios) / len(ratios) < 1.05


def test_the_commonest_format_is_written_once():
    assert kv_tune.by_layer({0: "q8", 2: "q4", 3: "q8", 5: "native"}) == "q8,2=q4,5=native"
    assert kv_tune.by_layer({0: "q4", 1: "q4"}) == "q4"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("models") / "tiny", family="gemma3", head_dim=64)


def test_a_command_writes_formats_that_fit_and_the_model_takes_them(path, tmp_path):
    env = environment(tmp_path)
    (path / "mlxkv.json").write_text('{"keep": 3}')
    options = "--budget", "0.36", "--context", "600", "--positions", "40", "--write", "--json"
    done = command("kv", "tune", str(path), *options, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((path / "mlxkv.json").read_text()) == {
        "keep": 3,
        "kv_type": found["kv_type"],
    }
    with mlxkv.load(path, dtype="float32") as llm:
        session = llm.session()
        specs = llm.model.cache_specs()
        layers = list(KVFormat(found["found"]["kv_type"], 2).layers(specs))
        assert [cache.kv_type for cache in session.caches] == [kv.name for _, kv in layers]
        assert len({kv.name for _, kv in layers}) > 1
        sixteen_bits = sum(spec.nbytes(600, KVFormat("native", 2)) for spec in specs)
        share = sum(spec.nbytes(600, kv) for spec, kv in layers) / sixteen_bits
        assert share == pytest.approx(found["found"]["share"]) and share <= 0.36
    _, k8v4, q4 = (of["kl_mean"] for of in found["uniform"])
    assert 0 < found["found"]["kl_mean"] < q4 and k8v4 < q4
    assert layer_types(found["found"]["kv_type"]).layers


def test_a_budget_that_no_formats_meet_and_a_short_text_are_one_line(path, tmp_path):
    (tmp_path / "text").write_text("short")
    with mlxkv.load(path, dtype="float32", kv_type="native") as llm:
        for budget in (0.2, 1.1):
            with pytest.raises(UsageError, match=r"budget must be 0.281 \(q4\) to 1 \(native\)"):
                kv_tune.tune(llm, budget)
        with pytest.raises(UsageError, match="the text has 5 tokens"):
            kv_tune.tune(llm, 0.5, text="short")
        with pytest.raises(UsageError, match="positions must be at least 32; got 10"):
            kv_tune.tune(llm, 0.5, n_positions=10)
        llm.budget.limit_bytes = llm.budget.used_bytes + 1000
        with pytest.raises(OutOfMemory, match="compare fewer positions"):
            kv_tune.tune(llm, 0.5)
    done = command("kv", "tune", str(path), "--text", str(tmp_path), env=environment(tmp_path))
    assert_one_line(done, 2, str(tmp_path), "cannot be read as text")
