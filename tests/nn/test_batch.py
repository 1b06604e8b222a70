"""A batch gives each sequence what it gets alone: every family, any mix of lengths and KV formats.

Tolerance: logits within 5e-4 of their standard deviation. Both compute in float32; a batch's
products have more rows, whose sums MLX may order differently, by the processor. Weights that are
half a unit in the last place away change the logits by up to 2e-4 (gemma4-e2b behind 24 tokens).
Greedy tokens are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

import mlxkv
from mlxkv.cache import KVCache, make_caches
from mlxkv.checkpoint.rope_config import RopeConfig
from mlxkv.errors import UnsupportedModel, UsageError
from mlxkv.generation.prefill import prefill
from mlxkv.kv.layout import Cache, Positions
from mlxkv.kv.types import KV_TYPES
from mlxkv.models import family_for
from mlxkv.nn.batch import batch
from mlxkv.nn.model import POSITIONS, CausalLM
from mlxkv.nn.rope import RoPE
from tests.families.oracle.case import LONG
from tests.families.oracle.cases import CASES, Case
from tests.families.test_parity import Golden
from tests.support.tiny import tokens as random_tokens

TOLERANCE = 5e-4
CODES_TOLERANCE = 2e-3
"""Of quantized KV: a sum in another order may move a value over the edge of its code, by which
logits of the smallest model moved by 6e-4 of their deviation."""
FAMILIES = [case for case in CASES if case.n_prompt == LONG and not case.prefill_in_one]
# Rotations that depend on the length of a sequence, in prompts below and above the bound.
STRETCHING = [case for case in CASES if case.name in ("llama-dynamic-past", "llama-longrope-long")]
every_model = pytest.mark.parametrize("case", FAMILIES + STRETCHING, ids=lambda case: case.name)
LENGTHS = (5, 40, 1, 300, 31, 32, 33, 40, 255, 256, 70, 18, 23, 24, 25, 129)
"""Before, at and behind the wrap of every family's window, and of the step of 256 tokens."""


@pytest.fixture(scope="module")
def folder(families) -> Path:
    return families


@functools.cache
def load(folder: Path, case: Case) -> CausalLM:
    return mlxkv.load_model(Golden.read(case.name).write(folder / case.name, "new"), mx.float32)


@pytest.fixture
def model(case, folder) -> CausalLM:
    return load(folder, case)


def prefilled(model: CausalLM, n: int, kv_type: str = "native") -> tuple[list[Cache], int]:
    """Caches behind a prompt of `n` tokens, and the token that comes next."""
    caches = make_caches(model, kv_type)
    logits = prefill(model, random_tokens(n, model.config.vocab_size, seed=n), caches, chunk=64)
    return caches, int(mx.argmax(logits))


def alone(model: CausalLM, caches: Sequence[Cache], token: int, n: int) -> list[np.ndarray]:
    """Logits of `n` greedy steps."""
    found = []
    for _ in range(n):
        found.append(np.array(model.last_logits(mx.array([[token]]), caches))[0])
        token = int(found[-1].argmax())
    return found


def together(
    model: CausalLM, sequences: Sequence[tuple[Sequence[Cache], int]], n: int
) -> list[list[np.ndarray]]:
    """The same for several sequences in a batch, one list for each."""
    caches = batch([caches for caches, _ in sequences])
    tokens = mx.array([[token] for _, token in sequences])
    found = []
    for _ in range(n):
        found.append(np.array(model.last_logits(tokens, caches)))
        tokens = mx.array(found[-1].argmax(axis=-1))[:, None]
    return [[step[i] for step in found] for i in range(len(sequences))]


def assert_same(
    got: list[np.ndarray],
    expected: list[np.ndarray],
    what: str,
    tolerance: float = TOLERANCE,
) -> None:
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        difference = np.abs(a - b).max() / b.std()
        assert difference < tolerance, f"{what}, step {step}: off by {difference:.2g}"
        assert a.argmax() == b.argmax(), f"{what}, step {step}"


@every_model
@pytest.mark.parametrize("B", [2, 16])
def test_a_batch_of_any_lengths_gives_each_what_it_gets_alone(model, B):
    lengths = [n for n in LENGTHS if n <= (model.config.context - 10)][:B]
    expected = [alone(model, *prefilled(model, n), 4) for n in lengths]
    got = together(model, [prefilled(model, n) for n in lengths], 4)
    for n, a, b in zip(lengths, got, expected, strict=True):
        assert_same(a, b, f"{n} tokens")


@every_model
def test_kv_formats_may_be_mixed_in_a_batch(model):
    kinds = [(n, kv_type) for n in (33, 12) for kv_type in KV_TYPES]
    expected = [alone(model, *prefilled(model, n, kv_type), 3) for n, kv_type in kinds]
    got = together(model, [prefilled(model, n, kv_type) for n, kv_type in kinds], 3)
    for kind, a, b in zip(kinds, got, expected, strict=True):
        tolerance = TOLERANCE if kind[1] == "native" else CODES_TOLERANCE
        assert_same(a, b, str(kind), tolerance)


@every_model
def test_sequences_of_equal_length_are_a_batch_too(model):
    expected = alone(model, *prefilled(model, 40), 3)
    for got in together(model, [prefilled(model, 40) for _ in range(3)], 3):
        assert_same(got, expected, "one of three")


@every_model
def test_what_is_broken_in_one_sequence_stays_there(model):
    (healthy, token), (broken, other) = prefilled(model, 20), prefilled(model, 26)
    for cache in broken:
        part = cache.read(0, 20) if isinstance(cache, KVCache) else cache.read(cache.first, 26)
        part = type(part)(tuple(x * mx.nan for x in part.arrays), part.start, part.stop)
        cache.load([part])
    expected = alone(model, *prefilled(model, 20), 2)
    got = together(model, [(broken, other), (healthy, token)], 2)
    assert np.isnan(got[0][0]).any()
    assert_same(got[1], expected, "beside a broken one")


def test_a_batch_of_one_is_that_sequences_caches():
    caches = [KVCache()]
    assert batch([caches]) is caches


def test_a_batch_needs_sequences_of_one_model():
    for wrong in ([], [[KVCache()], [KVCache(), KVCache()]]):
        with pytest.raises(UsageError, match="one model"):
            batch(wrong)


def test_a_batch_takes_one_token_of_each_sequence():
    (both,) = batch([[KVCache()], [KVCache()]])
    for shape in ((3, 1, 1, 8), (2, 1, 2, 8)):
        with pytest.raises(UsageError, match="2 sequences"):
            both.update(mx.zeros(shape), mx.zeros(shape))
    with pytest.raises(UsageError, match="one token"):
        both.mask(2)


def test_the_offset_is_one_number_where_all_have_the_same():
    a, b = KVCache(), KVCache()
    (both,) = batch([[a], [b]])
    assert both.offset == 0
    a.update(mx.zeros((1, 1, 3, 8)), mx.zeros((1, 1, 3, 8)))
    assert both.offset == Positions((3, 0))


@pytest.mark.parametrize("dims", [16, 8])
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("rope_type", ["default", "yarn", "dynamic"])
def test_each_row_is_rotated_at_its_own_position(dims, traditional, rope_type):
    config = RopeConfig(
        dims=dims,
        theta=10000.0,
        rope_type=rope_type,
        factor=2.0,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
    )
    rope, at = RoPE(config, traditional), (3, 100, 63, 1)
    x = mx.random.normal((4, 3, 1, 16))
    got = rope(x, Positions(at))
    for i, position in enumerate(at):
        np.testing.assert_allclose(got[i : i + 1], rope(x[i : i + 1], position), atol=2e-5)


# mlx-lm's definitions, which know one array of keys and a mask: each is a config, a token's cache
# being of keys, of a window, or a state.

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
BORROWED = {
    "keys": {**SIZES, "model_type": "qwen2", "rope_theta": 10000.0},
    "windows": {
        **SIZES,
        "model_type": "olmo3",
        "rope_theta": 10000.0,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "states": {
        "model_type": "mamba",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}


@pytest.fixture(params=BORROWED)
def borrowed(request) -> CausalLM:
    pytest.importorskip("mlx_lm")
    raw = BORROWED[request.param]
    definition = family_for(raw, "config.json")
    assert not definition.native
    mx.random.seed(0)
    model = definition.build(definition.config(raw, "config.json"))
    model.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.3, model.parameters()))
    return model


def test_definitions_of_mlx_lm_say_that_they_take_tokens_only(borrowed):
    x = mx.zeros((1, 1, 8))
    for part in (borrowed.embed, borrowed.hidden, borrowed.logits):
        with pytest.raises(UnsupportedModel, match=f"{borrowed.config.model_type} takes tokens"):
            part(x)


def test_definitions_of_mlx_lm_give_the_logits_of_each_position(borrowed):
    tokens = mx.random.randint(0, 96, (1, 2 * POSITIONS + 7))
    parts = list(borrowed.position_logits(tokens, make_caches(borrowed)))
    assert [part.shape[0] for part in parts] == [POSITIONS, POSITIONS, 7]
    whole = borrowed(tokens, make_caches(borrowed))[0]
    assert mx.allclose(mx.concatenate(parts), whole, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_definitions_of_mlx_lm_batch_as_well(borrowed):
    assert borrowed.batches
    lengths = (5, 40, 23, 24, 70, 5)
    expected = [alone(borrowed, *prefilled(borrowed, n), 4) for n in lengths]
    got = together(borrowed, [prefilled(borrowed, n) for n in lengths], 4)
    for n, a, b in zip(lengths, got, expected, strict=True):
        assert_same(a, b, f"{n} tokens")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("borrowed", ["keys", "windows"], indirect=True)
def test_a_definition_that_makes_its_own_masks_says_that_it_does_not_batch(borrowed, monkeypatch):
    definition = type(borrowed.inner)

    def careless(self, tokens, cache=None):
        for layer in cache:
            rows = mx.zeros((tokens.shape[0], 2, tokens.shape[1], 16))
            layer.update_and_fetch(rows, rows)
        return mx.zeros((*tokens.shape, 96))

    monkeypatch.setattr(definition, "__call__", careless)
    assert not borrowed.batches


@pytest.mark.filterwarnings("ignore")
def test_a_definition_that_fails_on_a_batch_says_so(borrowed, monkeypatch):
    def fails(self, tokens, cache=None):
        raise TypeError(f"{cache[0]} has no keys")

    monkeypatch.setattr(type(borrowed.inner), "__call__", fails)
    assert not borrowed.batches
