"""Models against transformers: golden files that oracle/make_goldens.py wrote; no torch.

Tolerance: the largest difference of a logit, over the standard deviation of the reference's
logits, stays under 1e-3. Both sides compute in float32 and differ in the order of their sums; a
correct model shows under 1e-4, a wrong one over 1e-2. `MLXKV_PARITY_REPORT=1 pytest -s` prints what
each case shows.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxkv
from mlxkv.cache import KVCache, RecurrentCache, RotatingKVCache
from mlxkv.kv.types import RecurrentSpec
from tests.families.oracle.cases import CASES, LONG, Case
from tests.support.paths import GOLDEN
from tests.support.tiny import fingerprint, random_tensor, write_checkpoint

TOLERANCE = 1e-3
N_SINGLE = 8
REPORT = os.environ.get("MLXKV_PARITY_REPORT")


@dataclass(frozen=True)
class Golden:
    """What the reference computed for one case."""

    directory: Path
    manifest: dict[str, Any]
    prompt: list[int]
    positions: np.ndarray
    logits: np.ndarray
    std: float
    greedy: list[int]

    @classmethod
    def read(cls, name: str) -> Golden:
        directory = GOLDEN / name
        with np.load(directory / "golden.npz") as data:
            return cls(
                directory,
                json.loads((directory / "manifest.json").read_text()),
                data["prompt"].tolist(),
                data["positions"],
                data["logits"],
                float(data["std"]),
                data["greedy"].tolist(),
            )

    def weights(self) -> dict[str, np.ndarray]:
        """The checkpoint's tensors, made from the seed and checked against the stored hash."""
        m = self.manifest
        weights = {
            name: random_tensor(reference_name, shape, m["seed"], m["norm_mean"])
            for name, (reference_name, shape) in m["tensors"].items()
        }
        assert fingerprint(weights) == m["sha256"], "the weights are not those of the oracle"
        return weights

    def config(self, style: str) -> dict[str, Any]:
        return json.loads((self.directory / f"config.{style}.json").read_text())

    def write(self, directory: Path, style: str) -> Path:
        return write_checkpoint(directory, self.config(style), self.weights())


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(case, style) -> (golden, model), each loaded once."""

    @functools.cache
    def load(case: Case, style: str) -> tuple[Golden, Any]:
        golden = Golden.read(case.name)
        directory = golden.write(tmp_path_factory.mktemp(case.name), style)
        model = mlxkv.load_model(directory, dtype=mx.float32)
        mx.eval(model.parameters())
        shutil.rmtree(directory)
        return golden, model

    return load


def over(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


any_device = pytest.mark.any_device
every_case = over(CASES)
CUTTABLE = [case for case in CASES if not case.prefill_in_one]
# What caches and batches have to do with: head layouts, windows, several kinds of layers.
VARIOUS = [case for case in CUTTABLE if case.n_prompt == LONG or "biases" in case.name]
various = over(VARIOUS)
CHUNKS = [
    (case, chunk)
    for case in CUTTABLE
    for chunk in (7, 64, 256)
    if chunk == 7 or case.n_prompt == LONG
]


def prefill(model: Any, caches: Sequence[Any], prompt: Sequence[int], chunk: int) -> mx.array:
    """Logits of every position [L, V], the prompt given `chunk` tokens at a time."""
    parts = []
    for start in range(0, len(prompt), chunk):
        parts.append(model(mx.array([prompt[start : start + chunk]]), caches)[0])
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def continue_greedily(model: Any, caches: Sequence[Any], last: mx.array, n: int) -> list[int]:
    answer = [int(mx.argmax(last))]
    while len(answer) < n:
        answer.append(int(mx.argmax(model(mx.array([answer[-1:]]), caches)[0, -1])))
    return answer


def check_logits(golden: Golden, logits: mx.array, what: str) -> None:
    got = np.array(logits.astype(mx.float32))[golden.positions]
    difference = np.abs(got - golden.logits).max(axis=1) / golden.std
    worst = int(difference.argmax())
    if REPORT:
        print(f"\nparity {golden.directory.name:30} {what:12} {difference.max():.2e}", end="")
    assert difference.max() < TOLERANCE, (
        f"{golden.directory.name}, {what}: off by {difference[worst]:.2g} standard deviations at "
        f"position {golden.positions[worst]}; positions above the tolerance: "
        f"{golden.positions[difference >= TOLERANCE].tolist()}"
    )


def check_prefill(golden: Golden, model: Any, chunk: int, n_greedy: int | None = None) -> None:
    """The logits of a prompt in chunks, and all or the first of the greedy tokens behind it."""
    caches = mlxkv.make_caches(model)
    logits = prefill(model, caches, golden.prompt, chunk)
    check_logits(golden, logits, f"chunks of {chunk}")
    expected = golden.greedy[:n_greedy]
    answer = continue_greedily(model, caches, logits[-1], len(expected))
    assert answer == expected, f"{golden.directory.name}, chunks of {chunk}"


@various
def test_embeddings_are_given_apart_from_tokens(load, case):
    """As those of pictures will be: made in parts, put together, and given to the layers."""
    golden, model = load(case, "new")
    tokens = mx.array([golden.prompt])
    parts = [tokens[:, :9], tokens[:, 9:]]
    x = mx.concatenate([model.embed(part) for part in parts], axis=1)
    own = [model.embed_per_layer(part) for part in parts]
    per_layer = None if own[0] is None else mx.concatenate(own, axis=1)
    assert x.shape == (*tokens.shape, model.config.hidden_size)
    caches = mlxkv.make_caches(model)
    check_logits(golden, model.logits(model.hidden(x, caches, per_layer))[0], "embeddings")


@every_case
@pytest.mark.parametrize("style", ["new", pytest.param("hub", marks=any_device)])
def test_one_pass_without_caches_equals_the_reference(load, case, style):
    golden, model = load(case, style)
    check_logits(golden, model(mx.array([golden.prompt]))[0], f"{style}, no cache")


@every_case
def test_whole_prefill_and_greedy_tokens_equal_the_reference(load, case):
    golden, model = load(case, "new")
    check_prefill(golden, model, len(golden.prompt))


@pytest.mark.parametrize(("case", "chunk"), CHUNKS, ids=lambda x: getattr(x, "name", x))
def test_chunked_prefill_and_greedy_tokens_equal_the_reference(load, case, chunk):
    golden, model = load(case, "new")
    check_prefill(golden, model, chunk, None if case in VARIOUS else N_SINGLE)


@any_device  # the greedy tokens behind a whole prompt are single ones on every device
@various
def test_token_by_token_prefill_and_greedy_tokens_equal_the_reference(load, case):
    golden, model = load(case, "new")
    check_prefill(golden, model, 1)


@over([case for case in CUTTABLE if case not in VARIOUS])
def test_single_tokens_behind_a_chunk_equal_the_reference(load, case):
    """What a config changes shows in a few of them."""
    golden, model = load(case, "new")
    caches, n = mlxkv.make_caches(model), len(golden.prompt) - N_SINGLE
    chunk = prefill(model, caches, golden.prompt[:n], n)
    singles = prefill(model, caches, golden.prompt[n:], 1)
    assert (golden.positions >= n).sum() >= 3
    check_logits(golden, mx.concatenate([chunk, singles]), "single tokens")


@any_device
@every_case
def test_the_two_config_styles_mean_the_same_config(load, case):
    # The positions' limit and everything else that counts is the same; only the words differ.
    (_, new), (_, hub) = load(case, "new"), load(case, "hub")
    assert new.config == hub.config
    assert new.cache_specs() == hub.cache_specs()


@various
def test_two_sequences_at_once_equal_each_alone(load, case):
    golden, model = load(case, "new")
    other = golden.prompt[::-1]
    caches = mlxkv.make_caches(model)
    both = mx.array([golden.prompt, other])
    logits = mx.concatenate([model(both[:, :50], caches), model(both[:, 50:], caches)], axis=1)
    check_logits(golden, logits[0], "batch of two")
    alone = model(mx.array([other]))[0]
    assert float(mx.abs(logits[1] - alone).max()) < TOLERANCE * golden.std


@various
def test_the_caches_of_a_rewound_model_continue_as_if_nothing_had_been(load, case):
    golden, model = load(case, "new")
    caches = mlxkv.make_caches(model)
    prompt = golden.prompt
    prefill(model, caches, prompt[:-20], 64)
    stop = len(prompt) - 5
    if any(isinstance(cache, RecurrentCache) for cache in caches):
        # A state is nowhere but at its tip: it is taken there, and brought back.
        model(mx.array([prompt[-20:-5]]), caches)
        taken = [c.read(stop - 1, stop) if isinstance(c, RecurrentCache) else None for c in caches]
        model(mx.array([prompt[:7]]), caches)
        for cache, state in zip(caches, taken, strict=True):
            assert cache.rewind(stop) is (state is None)
            if state is not None:
                cache.load([state])
    else:
        model(mx.array([prompt[-20:-5] + prompt[:7]]), caches)
        assert all(cache.rewind(stop) for cache in caches)
    last = model(mx.array([prompt[-5:]]), caches)[0]
    answer = continue_greedily(model, caches, last[-1], len(golden.greedy))
    assert answer == golden.greedy


@any_device
@every_case
def test_sliding_layers_get_bounded_caches_and_full_layers_growing_ones(load, case):
    golden, model = load(case, "new")
    config = golden.config("new")
    config = config.get("text_config", config)
    window = config.get("sliding_window")
    if "layer_types" in config:
        windows = [window if t == "sliding_attention" else None for t in config["layer_types"]]
    else:
        windows = [
            window if case.name.startswith("mistral") else None
        ] * model.config.num_hidden_layers
    specs = model.cache_specs()
    # Layers that read another layer's KV come last and have none of their own.
    n_shared = config.get("num_kv_shared_layers") or 0
    n_owners = len(specs) - n_shared
    assert specs[n_owners:] == [None] * n_shared
    assert [spec.window for spec in specs[:n_owners]] == windows[:n_owners]
    states = [kind == "linear_attention" for kind in config.get("layer_types", [])[:n_owners]]
    of_spec = [isinstance(spec, RecurrentSpec) for spec in specs[:n_owners]]
    assert of_spec == (states or [False] * n_owners)
    for cache, spec in zip(mlxkv.make_caches(model), specs[:n_owners], strict=True):
        kind = KVCache if spec.window is None else RotatingKVCache
        assert type(cache) is (RecurrentCache if isinstance(spec, RecurrentSpec) else kind)


@any_device
@every_case
def test_a_golden_directory_holds_no_weights_and_is_small(case):
    files = {path.name: path.stat().st_size for path in (GOLDEN / case.name).iterdir()}
    assert set(files) == {"config.new.json", "config.hub.json", "manifest.json", "golden.npz"}
    assert sum(files.values()) < 60_000


def test_every_golden_directory_has_a_case():
    assert {path.name for path in GOLDEN.iterdir()} == {case.name for case in CASES}


# A second opinion

MLX_LM_KNOWS = [
    "llama-plain", "llama-gqa", "llama-mqa", "llama-biases", "llama-tied", "llama-head-dim",
    "llama-linear", "llama-llama3", "mistral-plain", "gemma3-text", "gemma3-wide",
    "glm4-plain", "glm4-long", "glm4-quarter", "glm4-moe-plain", "glm4-moe-no-biases",
    "gemma4-dense", "gemma4-e2b", "gemma4-e4b", "gemma4-wide", "gemma4-rope", "gemma4-moe",
]  # fmt: skip


def mlx_lm_model(directory: Path) -> nn.Module:
    return pytest.importorskip("mlx_lm.utils").load_model(directory)[0]


@any_device
@pytest.mark.parametrize("name", MLX_LM_KNOWS)
@pytest.mark.filterwarnings("ignore")
def test_mlx_lm_computes_the_same_where_it_knows_the_config(name, tmp_path):
    golden = Golden.read(name)
    directory = golden.write(tmp_path, "hub")
    theirs = mlx_lm_model(directory)
    ours = mlxkv.load_model(directory, dtype=mx.float32)
    prompt = mx.array([golden.prompt])
    difference = float(np.abs(np.array(ours(prompt) - theirs(prompt))).max()) / golden.std
    # mlx-lm rounds Gemma's embedding scale to bfloat16, also when it computes in float32.
    assert difference < (1e-2 if name.startswith("gemma") else TOLERANCE)
