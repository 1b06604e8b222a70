"""Rotary embedding against its definition: NumPy float64, complex numbers, one position at a time.

test_parity.py holds each variant against transformers; here are the rules that one can state.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.base import device
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.rope_config import RopeConfig, rope_config
from mlxkv.errors import ConfigError
from mlxkv.kv.layout import Positions
from mlxkv.nn.rope import RoPE, attention_factor
from mlxkv.nn.rope import inverse_frequencies as frequency_list

DIMS = 16


def inverse_frequencies(rope: RopeConfig, n_tokens: int = 0) -> np.ndarray:
    return np.array(frequency_list(rope, n_tokens))


def config(rope_type: str = "default", **changes) -> RopeConfig:
    values = {
        "dims": DIMS,
        "theta": 10000.0,
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 256,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "short_factor": tuple(np.linspace(1.0, 2.0, DIMS // 2)),
        "long_factor": tuple(np.linspace(2.0, 9.0, DIMS // 2)),
    }
    return RopeConfig(rope_type, **{**values, **changes})


VARIANTS = {
    "default": config(),
    "linear": config("linear"),
    "dynamic": config("dynamic"),
    "dynamic-past": config("dynamic", max_position_embeddings=16),
    "llama3": config("llama3"),
    "yarn": config("yarn"),
    "yarn-factor": config("yarn", attention_factor=1.4),
    "longrope-short": config("longrope"),
    "longrope-long": config("longrope", original_max_position_embeddings=16),
    "proportional": config("proportional", n_turning=3),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def plain(dims: int = DIMS, theta: float = 10000.0) -> np.ndarray:
    return theta ** (-np.arange(0, dims, 2) / dims)


def rotated(
    x: np.ndarray, rope: RopeConfig, positions: np.ndarray, n_tokens: int, traditional: bool
) -> np.ndarray:
    """x [..., L, D] at positions [L], pair by pair as complex numbers."""
    n = rope.dims
    head, tail = x[..., :n].astype(np.float64), x[..., n:]
    turn = np.exp(1j * positions[:, None] * inverse_frequencies(rope, n_tokens)[None])
    turn = turn * attention_factor(rope)
    if traditional:
        pairs = (head[..., ::2] + 1j * head[..., 1::2]) * turn
        out = np.stack([pairs.real, pairs.imag], axis=-1).reshape(head.shape)
    else:
        pairs = (head[..., : n // 2] + 1j * head[..., n // 2 :]) * turn
        out = np.concatenate([pairs.real, pairs.imag], axis=-1)
    return np.concatenate([out, tail], axis=-1)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@every_variant
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("offset", [0, 37])
def test_a_head_turns_by_position_times_frequency(variant, traditional, offset):
    x = random(2, 3, 5, DIMS)
    got = RoPE(variant, traditional)(mx.array(x), offset)
    positions = np.arange(offset, offset + 5)
    expected = rotated(x, variant, positions, offset + 5, traditional)
    # float32 angles up to 42 radians: an error of 42 * 2**-24 = 2.5e-6 in the turn.
    np.testing.assert_allclose(np.array(got), expected, atol=2e-5)


@every_variant
def test_what_lies_beyond_the_rotary_part_is_left_alone(variant):
    x = random(1, 2, 4, DIMS + 8)
    got = np.array(RoPE(variant)(mx.array(x), 30))
    np.testing.assert_array_equal(got[..., DIMS:], x[..., DIMS:])
    expected = rotated(x, variant, np.arange(30, 34), 34, False)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@every_variant
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_neighbours_that_stand_still_are_left_alone_bit_for_bit(variant, dtype):
    x = mx.array(random(1, 2, 4, DIMS + 8)).astype(dtype)
    in_part = RoPE(variant, traditional=True)(x, 30)
    assert mx.array_equal(RoPE(variant, True, head_dim=DIMS + 8)(x, 30), in_part)


@every_variant
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_queries_and_keys_turn_as_they_do_alone_and_values_stay(monkeypatch, variant, B, on_cpu):
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    rope, x = RoPE(variant), mx.array(random(B, 5, 1, DIMS))
    offset = Positions(tuple(range(7, 7 + B))) if B > 1 else 7
    alone = mx.concatenate([rope(x[i : i + 1, :4], 7 + i) for i in range(B)])
    q, k, v = rope.of_qkv(x, 3, 1, offset)
    # A batch may be rotated by another kernel, which rounds differently.
    assert q.shape[1] == 3 and mx.allclose(q, alone[:, :3], atol=1e-5)
    assert k.shape[1] == 1 and mx.allclose(k, alone[:, 3:], atol=1e-5)
    assert mx.array_equal(v, x[:, 4:])


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"dynamic-past", "longrope-long"}))
def test_tokens_one_by_one_turn_like_the_chunk_they_are_part_of(name):
    """But for two variants: their frequencies change with the length of the sequence."""
    variant = VARIANTS[name]
    rope, x = RoPE(variant), mx.array(random(1, 2, 6, DIMS))
    chunk = np.array(rope(x, 11))
    single = [np.array(rope(x[:, :, i : i + 1], 11 + i)) for i in range(6)]
    # The same sums on both sides; only a vectorized kernel may round differently.
    np.testing.assert_allclose(np.concatenate(single, axis=2), chunk, atol=1e-6)


def test_each_row_of_a_batch_can_have_its_own_offset():
    rope, x = RoPE(config("yarn")), mx.array(random(3, 2, 4, DIMS))
    together = np.array(rope(x, mx.array([0, 7, 300])))
    for row, offset in enumerate((0, 7, 300)):
        alone = np.array(rope(x[row : row + 1], offset))
        np.testing.assert_allclose(together[row : row + 1], alone, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@every_variant
def test_the_dtype_is_kept(variant, dtype):
    assert RoPE(variant)(mx.zeros((1, 1, 3, DIMS), dtype), 5).dtype == dtype


def test_far_positions_are_still_precise():
    x = random(1, 1, 1, DIMS)
    got = np.array(RoPE(config(theta=1e6))(mx.array(x), 100_000))
    expected = rotated(x, config(theta=1e6), np.array([100_000]), 0, False)
    # 100,000 radians in float32 are good to 100000 * 2**-24 = 6e-3.
    np.testing.assert_allclose(got, expected, atol=3e-2)


# Frequencies


def test_default_frequencies_are_powers_of_the_base():
    np.testing.assert_allclose(inverse_frequencies(config()), plain(), rtol=1e-12)


def test_linear_divides_all_frequencies():
    np.testing.assert_allclose(inverse_frequencies(config("linear")), plain() / 4, rtol=1e-12)


def test_dynamic_is_the_default_up_to_the_context_and_grows_past_it():
    rope = config("dynamic", max_position_embeddings=100)
    for n in (0, 1, 99, 100):
        np.testing.assert_allclose(inverse_frequencies(rope, n), plain(), rtol=1e-12)
    # base * (factor * n / context - (factor - 1)) ** (dims / (dims - 2))
    base = 10000.0 * (4.0 * 150 / 100 - 3.0) ** (DIMS / (DIMS - 2))
    np.testing.assert_allclose(inverse_frequencies(rope, 150), plain(theta=base), rtol=1e-12)


def test_llama3_keeps_short_waves_divides_long_ones_and_ramps_between():
    rope = config("llama3")
    waves = 2 * math.pi / plain()
    got = inverse_frequencies(rope) / plain()
    for wave, ratio in zip(waves, got, strict=True):
        if wave < 256 / 4:
            assert ratio == pytest.approx(1.0)
        elif wave > 256 / 1:
            assert ratio == pytest.approx(1 / 4)
        else:
            smooth = (256 / wave - 1) / (4 - 1)
            assert ratio == pytest.approx((1 - smooth) / 4 + smooth)
            assert 1 / 4 < ratio < 1


def test_yarn_keeps_fast_dimensions_and_divides_slow_ones():
    ratio = inverse_frequencies(config("yarn", theta=1e6)) / plain(theta=1e6)
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(1 / 4)
    assert (np.diff(ratio) <= 0).all()


def test_yarn_without_truncation_ramps_between_the_exact_dimensions():
    whole = inverse_frequencies(config("yarn"))
    exact = inverse_frequencies(config("yarn", truncate=False))
    assert not np.allclose(whole, exact)

    def dimension(turns: float) -> float:
        return DIMS * math.log(256 / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = max(dimension(32), 0), min(dimension(1), DIMS - 1)
    ramp = np.clip((np.arange(DIMS // 2) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(exact, plain() / 4 * ramp + plain() * (1 - ramp), rtol=1e-12)


def test_longrope_takes_the_long_factors_past_the_original_context_only():
    rope = config("longrope", original_max_position_embeddings=64)
    for n, factors in ((0, rope.short_factor), (64, rope.short_factor), (65, rope.long_factor)):
        np.testing.assert_allclose(inverse_frequencies(rope, n), plain() / np.array(factors))


def test_proportional_turns_the_first_pairs_at_the_whole_heads_wavelengths():
    rope = config("proportional", n_turning=3, factor=2.0)
    np.testing.assert_allclose(inverse_frequencies(rope), [*plain()[:3] / 2, *[0.0] * 5])
    x = random(1, 2, 4, DIMS)
    out = np.array(RoPE(rope)(mx.array(x), 1000))
    half = DIMS // 2
    still = np.r_[3:half, half + 3 : DIMS]
    np.testing.assert_array_equal(out[..., still], x[..., still])
    assert (out[..., :3] != x[..., :3]).all()


# Attention factor


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "llama3"])
def test_only_yarn_and_longrope_scale_what_they_rotate(rope_type):
    assert attention_factor(config(rope_type)) == 1.0


def test_yarn_scales_queries_and_keys_both():
    # 0.1 ln(4) + 1, on each of the two: scores grow by its square.
    factor = 0.1 * math.log(4.0) + 1.0
    assert attention_factor(config("yarn")) == pytest.approx(factor)
    x = mx.array(random(1, 1, 1, DIMS))
    plain_score = mx.sum(x * x).item()
    turned = RoPE(config("yarn"))(x, 9)
    assert mx.sum(turned * turned).item() == pytest.approx(plain_score * factor**2, rel=1e-5)


def test_yarn_takes_mscale_only_with_mscale_all_dim():
    both = config("yarn", mscale=0.9, mscale_all_dim=0.4)
    log = math.log(4.0)
    assert attention_factor(both) == pytest.approx((0.09 * log + 1) / (0.04 * log + 1))
    alone = config("yarn", mscale=0.9)
    assert attention_factor(alone) == attention_factor(config("yarn"))
    assert attention_factor(config("yarn", attention_factor=1.7, mscale=0.9)) == 1.7
    assert attention_factor(config("yarn", factor=0.5)) == 1.0


def test_longrope_scales_by_the_logarithms_of_factor_and_original_context():
    rope = config("longrope", factor=8.0)
    expected = math.sqrt(1 + math.log(8.0) / math.log(256))
    assert attention_factor(rope) == pytest.approx(expected)
    assert attention_factor(config("longrope", factor=1.0)) == 1.0


# Reading it from a config


def read(scaling: Any = None, **top: Any) -> RopeConfig:
    head_dim = top.pop("head_dim", DIMS)
    raw = {"max_position_embeddings": 1024, "rope_theta": 1e4, "rope_scaling": scaling, **top}
    return rope_config(Fields(raw, "config.json"), head_dim, default_theta=None)


def test_the_base_is_read_from_either_style_and_never_guessed():
    assert read(rope_theta=5e5).theta == 5e5
    new = {"rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}}
    assert read(**new, rope_theta=None).theta == 3e5
    with pytest.raises(ConfigError, match=r"config\.json.*rope_theta"):
        read(rope_theta=None)


def test_the_original_context_is_not_the_models_limit():
    rope = read({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256})
    assert rope.max_position_embeddings == 1024
    assert rope.original_max_position_embeddings == 256


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_the_type_is_read_under_both_of_its_keys(key):
    assert read({key: "linear", "factor": 2.0}).rope_type == "linear"
    assert read({key: "default"}).rope_type == "default"


@pytest.mark.parametrize(("partial", "n_turning"), [(0.25, 2), (0.4, 3), (1.0, 8), (None, 8)])
def test_proportional_keeps_the_whole_head_and_turns_a_part_of_its_pairs(partial, n_turning):
    rope = read({"rope_type": "proportional"}, partial_rotary_factor=partial)
    assert (rope.dims, rope.n_turning, rope.factor) == (DIMS, n_turning, 1.0)


def test_su_is_an_old_name_of_longrope():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    assert read({"type": "su", **factors}).rope_type == "longrope"


@pytest.mark.parametrize(("partial", "dims"), [(0.25, 4), (0.5, 8), (1.0, 16), (None, 16)])
def test_a_partial_rotary_factor_is_read_from_either_style(partial, dims):
    assert read(partial_rotary_factor=partial).dims == dims
    nested = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": partial}}
    assert read(**nested).dims == dims


def test_scaling_in_the_hub_style_wins_over_an_unscaled_new_style():
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert read({"type": "linear", "factor": 2.0}, **both).rope_type == "linear"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"rope_type": "spiral", "factor": 2.0}, "rope_type"),
        ({"type": "spiral"}, "type"),
        ({"rope_type": ["yarn"]}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "linear", "factor": math.nan}, "factor"),
        ({"rope_type": "linear", "factor": math.inf}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "wobble": 3}, "wobble"),
        ({"rope_type": "dynamic"}, "factor"),
        ({"rope_type": "default", "mrope_section": [4, 4]}, "mrope_section"),
        ({**YARN, "beta_fast": -3}, "beta_fast"),
        ({**YARN, "beta_slow": -1}, "beta_slow"),
        ({**YARN, "attention_factor": 0}, "attention_factor"),
        ({**YARN, "truncate": "no"}, "truncate"),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": -10 / math.log(4.0)}, "mscale"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        ({**LLAMA3, "high_freq_factor": 0.5}, "high_freq_factor"),
        ({**LONGROPE, "short_factor": [1.0] * 4}, "short_factor"),
        ({**LONGROPE, "short_factor": [0.0] * 8}, "short_factor"),
        ({**LONGROPE, "long_factor": [math.nan] * 8}, "long_factor"),
        ({**LONGROPE, "long_factor": ["1"] * 8}, "long_factor"),
        ({**LONGROPE, "long_factor": 2.0}, "long_factor"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "original_max_position_embeddings"),
        *(
            ({k: v for k, v in full.items() if k != key}, key)
            for full in (LLAMA3, LONGROPE)
            for key in full
            if key.endswith("_factor")
        ),
    ],
)
def test_a_scaling_that_cannot_be_right_is_an_error_naming_file_and_key(scaling, key):
    with pytest.raises(ConfigError, match=rf"^config\.json.*{key}") as caught:
        RoPE(read(scaling))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("top", "key"),
    [
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": "yarn"}, "rope_parameters"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta"),
        ({"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_a_rope_that_cannot_be_right_is_an_error_naming_file_and_key(top, key):
    with pytest.raises(ConfigError, match=rf"^config\.json.*{key}"):
        RoPE(read(**{"scaling": top.pop("rope_scaling", None), **top}))
