"""Rotary position embedding: inverse frequencies and a factor for each variant, for `mx.fast.rope`.

Reference: transformers' `modeling_rope_utils.py`.
"""

from __future__ import annotations

import functools
import math

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.checkpoint.rope_config import RopeConfig
from mlxkv.kv.layout import Offset, Positions
from mlxkv.nn import kernels


def inverse_frequencies(config: RopeConfig, n_tokens: int = 0) -> list[float]:
    """Radians per position of each pair of values, `dims / 2` of them.

    `dynamic` and `longrope` depend on `n_tokens`, the length of the sequence so far.
    """
    theta = _dynamic_theta(config, n_tokens) if config.rope_type == "dynamic" else config.theta
    plain = [theta ** (-i / config.dims) for i in range(0, config.dims, 2)]
    match config.rope_type:
        case "proportional":
            turning = [f / config.factor for f in plain[: config.n_turning]]
            return turning + [0.0] * (len(plain) - config.n_turning)
        case "linear":
            return [f / config.factor for f in plain]
        case "llama3":
            return [_llama3(config, f) for f in plain]
        case "yarn":
            return _yarn(config, plain)
        case "longrope":
            long = n_tokens > config.original_max_position_embeddings
            factors = config.long_factor if long else config.short_factor
            return [f / factor for f, factor in zip(plain, factors, strict=True)]
        case _:
            return plain


def attention_factor(config: RopeConfig) -> float:
    """The factor on rotated queries and on rotated keys."""
    if config.rope_type not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    factor = config.factor
    if config.rope_type == "longrope":
        if factor <= 1.0:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(config.original_max_position_embeddings))
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(factor, config.mscale) / yarn_mscale(factor, config.mscale_all_dim)
    return yarn_mscale(factor, 1.0)


def _llama3(config: RopeConfig, plain: float) -> float:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between."""
    turns = config.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    ramp = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - ramp) * plain / config.factor + ramp * plain


def _yarn(config: RopeConfig, plain: list[float]) -> list[float]:
    """YaRN (https://arxiv.org/abs/2309.00071): interpolated and plain, ramped by dimension."""

    def dimension_of(n_rotations: float) -> float:
        turns = config.original_max_position_embeddings / (n_rotations * 2 * math.pi)
        return config.dims * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dims - 1)
    if low == high:
        high += 0.001  # as the reference does, against a division by zero
    ramps = (min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(plain)))
    return [f / config.factor * ramp + f * (1 - ramp) for f, ramp in zip(plain, ramps, strict=True)]


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's factor on queries and on keys, for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _dynamic_theta(config: RopeConfig, n_tokens: int) -> float:
    """NTK scaling that grows with the sequence once it is longer than the model's context."""
    context = config.max_position_embeddings
    stretch = config.factor * max(n_tokens, context) / context - (config.factor - 1)
    return config.theta * stretch ** (config.dims / (config.dims - 2))


class RoPE(nn.Module):
    """Rotates the first `dims` values of each head by position.

    Args:
        config: the variant.
        traditional: pairs are neighbours instead of halves.
        head_dim: values of a head, `dims` or more.
    """

    def __init__(self, config: RopeConfig, traditional: bool = False, head_dim: int | None = None):
        super().__init__()
        self._config, self._traditional = config, traditional
        self._dims = config.dims
        self._factor = attention_factor(config)
        if traditional and head_dim is not None and self._factor == 1.0:
            # MLX's kernel copies heads that it rotates in part: rotate the rest by nothing.
            self._dims = head_dim
        self._grows = config.rope_type in ("dynamic", "longrope")
        self._periods = self._periods_at(0)
        self._frequencies = mx.array(inverse_frequencies(config))

    @property
    def turning(self) -> tuple[mx.array, float] | None:
        """What the kernels rotate heads with: radians per position of each pair, and a factor on
        the result; None for rotations that they do not have."""
        if self._grows or self._traditional:
            return None
        return self._frequencies, self._factor

    @property
    def stable_tokens(self) -> int | None:
        """Length of a sequence up to which its rotations stay as they are; None for any."""
        match self._config.rope_type:
            case "dynamic":
                return self._config.max_position_embeddings
            case "longrope":
                return self._config.original_max_position_embeddings
            case _:
                return None

    def _periods_at(self, n_tokens: int) -> mx.array:
        # The period of a pair that is not rotated is infinite: the kernels use its reciprocal, 0.
        frequencies = inverse_frequencies(self._config, n_tokens)
        frequencies += [0.0] * (self._dims // 2 - len(frequencies))
        return mx.array([1.0 / f if f else math.inf for f in frequencies])

    def __call__(self, x: mx.array, offset: Offset = 0) -> mx.array:
        """Rotate x `[B, H, L, D]` from position `offset` on, or from one for each row."""
        if device.on_cpu() and x.shape[2] == 1 and self._has_no_kernel(x):
            return self._of_token(x, offset)
        if self._grows:
            return self._of_growing(x, offset)
        at = offset.array if isinstance(offset, Positions) else offset
        return self._rotated(x, at, self["_periods"])

    def of_qkv(
        self, qkv: mx.array, n_heads: int, n_kv_heads: int, offset: Offset = 0
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Split `[B, H + 2 Hk, L, D]`; rotate queries and keys in one operation.

        Returns:
            `[B, H, L, D]`, `[B, Hk, L, D]`, `[B, Hk, L, D]`.
        """
        B, _, _, D = qkv.shape
        n = n_heads + n_kv_heads
        if B > 1 and self._factor == 1.0 and self._dims == D and not device.on_cpu():
            # MLX's kernel copies a part of each row of a batch; rotating all heads costs less.
            q, k, _ = mx.split(self(qkv, offset), (n_heads, n), axis=1)
        else:
            q, k = mx.split(self(qkv[:, :n], offset), (n_heads,), axis=1)
        return q, k, qkv[:, n:]

    def of_rows(
        self,
        qkv: mx.array,
        n_heads: int,
        n_kv_heads: int,
        offset: Offset,
        norms: tuple[nn.Module, nn.Module] | None = None,
    ) -> tuple[mx.array, mx.array, mx.array] | None:
        """`of_qkv` of rows `[B, L, (H + 2 Hk) D]`, heads of queries and keys under their norms.

        None for what the kernels do not take.
        """
        if (turning := self.turning) is None:
            return None
        frequencies, factor = turning
        heads = kernels.rotated(qkv, n_heads, n_kv_heads, frequencies, offset, factor, norms)
        if heads is None:
            return None
        q, k, v = mx.split(heads, (n_heads, n_heads + n_kv_heads), axis=1)
        return q, k, v

    def _of_token(self, x: mx.array, offset: Offset) -> mx.array:
        if not isinstance(offset, Positions):
            return x @ rotation(self._config, offset, x.shape[-1])
        return _turned(x, self._dims, *rotations(self._config, offset, x.shape[-1]))

    def _of_growing(self, x: mx.array, offset: Offset) -> mx.array:
        if not isinstance(offset, Positions):
            return self._rotated(x, offset, self._periods_at(offset + x.shape[2]))
        stable = self.stable_tokens
        if stable is None or max(offset.of) + x.shape[2] <= stable:
            return self._rotated(x, offset.array, self["_periods"])
        rows = mx.split(x, x.shape[0])
        return mx.concatenate([self(row, at) for row, at in zip(rows, offset.of, strict=True)])

    def _rotated(self, x: mx.array, offset: int | mx.array, periods: mx.array) -> mx.array:
        if self._factor != 1.0:
            if self._dims == x.shape[-1]:
                x = x * self._factor
            else:
                x = mx.concatenate(
                    [x[..., : self._dims] * self._factor, x[..., self._dims :]], axis=-1
                )
        return mx.fast.rope(
            x,
            self._dims,
            traditional=self._traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=periods,
        )

    def _has_no_kernel(self, x: mx.array) -> bool:
        return x.dtype == mx.float32 and not (self._grows or self._traditional)


@functools.lru_cache(maxsize=8)
def rotation(config: RopeConfig, offset: int, D: int) -> mx.array:
    """The rotation of one position as a float32 matrix `[D, D]`, made once for a step's layers.

    One product with it is cheaper than the fifteen operations that the CPU backend has for a
    rotation.
    """
    stays, turns = _factors(config, (offset,), D)
    return _turned(mx.eye(D), config.dims, stays[0, 0], turns[0, 0])


@functools.lru_cache(maxsize=8)
def rotations(config: RopeConfig, offset: Positions, D: int) -> tuple[mx.array, mx.array]:
    """The rotations of one token of each sequence: factors on values and on their partners, which
    are half the rotated dimensions away; float32 `[B, 1, 1, D]` both.

    A matrix per sequence, read for a few rows only, is three times slower at 256 dimensions.
    """
    return _factors(config, offset.of, D)


def _factors(config: RopeConfig, positions: tuple[int, ...], D: int) -> tuple[mx.array, mx.array]:
    # float32 angles, as in the reference and the kernels.
    at = mx.array(positions, dtype=mx.float32)[:, None]
    angles = at * mx.array(inverse_frequencies(config))  # [B, dims / 2]
    factor = attention_factor(config)
    c, s = mx.cos(angles) * factor, mx.sin(angles) * factor
    rest = len(positions), D - 2 * angles.shape[1]
    stays = mx.concatenate([c, c, mx.ones(rest)], axis=1)
    turns = mx.concatenate([-s, s, mx.zeros(rest)], axis=1)
    return stays[:, None, None], turns[:, None, None]


def _turned(x: mx.array, dims: int, stays: mx.array, turns: mx.array) -> mx.array:
    """x times one factor, and its partners in the first `dims` values times the other."""
    half = dims // 2
    parts = [x[..., half:dims], x[..., :half], x[..., dims:]]
    return x * stays + mx.concatenate(parts[: 2 if dims == x.shape[-1] else 3], axis=-1) * turns
