"""Gated delta nets: a layer that keeps a state in place of keys and values (`nn.delta_rule`).

Queries, keys and values go through a short causal convolution. Reference: transformers
`modeling_qwen3_next.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.checkpoint.config import Fields
from mlxkv.kv.layout import StateCache
from mlxkv.kv.types import RecurrentSpec
from mlxkv.nn import delta_rule
from mlxkv.nn.layers import Fusing, compiled, silu
from mlxkv.nn.linear import Linear
from mlxkv.nn.wide import WideStates

L2_EPS = 1e-6
"""Added to the sum of a query's and a key's squares."""
IN_FLOAT32 = ("A_log", "dt_bias")
"""Parameters that stay as they are: they make decays."""


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """The numbers of a gated delta net; in config.json their names begin with `linear_`."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_dim: int

    @classmethod
    def read(cls, fields: Fields) -> DeltaConfig:
        """Raises ConfigError where a key is missing or wrong."""
        config = cls(
            fields.int("linear_num_key_heads"),
            fields.int("linear_num_value_heads"),
            fields.int("linear_key_head_dim"),
            fields.int("linear_value_head_dim"),
            fields.int("linear_conv_kernel_dim", at_most=64),
        )
        if config.num_value_heads % config.num_key_heads:
            raise fields.error(
                "linear_num_key_heads",
                f"{config.num_key_heads} must divide {config.num_value_heads}",
            )
        if config.conv_kernel_dim < 2:
            raise fields.error("linear_conv_kernel_dim", "must be at least 2")
        return config

    @property
    def key_dim(self) -> int:
        """Values of all key heads."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Values of all value heads."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    @property
    def spec(self) -> RecurrentSpec:
        """The memory of a layer."""
        return RecurrentSpec(
            n_channels=self.conv_dim,
            n_tail=self.conv_kernel_dim - 1,
            n_heads=self.num_value_heads,
            key_dim=self.key_head_dim,
            value_dim=self.value_head_dim,
        )


class Taps(nn.Module):
    """The weights of a convolution of each channel by itself, `[C, taps, 1]`."""

    def __init__(self, n_channels: int, n_taps: int):
        super().__init__()
        self.weight = mx.zeros((n_channels, n_taps, 1))


class GatedDeltaNet(Fusing):
    """out(norm(rule(conv(q k v), beta, decay)) * silu(z))."""

    fusions: ClassVar = {
        "ordered_qkvz": ("in_proj_qkv", "in_proj_z"),
        "ordered_ba": ("in_proj_b", "in_proj_a"),
    }

    def __init__(self, hidden_size: int, eps: float, config: DeltaConfig):
        super().__init__()
        c = self._config = config
        self._eps = eps
        self.add_projections(hidden_size)
        self.conv1d = Taps(c.conv_dim, c.conv_kernel_dim)
        self.A_log = mx.zeros((c.num_value_heads,))
        self.dt_bias = mx.zeros((c.num_value_heads,))
        self.norm = nn.RMSNorm(c.value_head_dim, eps=eps)
        self.out_proj = Linear(c.value_dim, hidden_size, bias=False)
        # A norm by the mean is one by the sum, times the root of the size.
        D = c.key_head_dim
        self._scales = mx.array([1 / D, D**-0.5])[:, None, None]

    def add_projections(self, hidden_size: int) -> None:
        """The input's, under the checkpoint's names."""
        c = self._config
        self.in_proj_qkv = Linear(hidden_size, c.conv_dim, bias=False)
        self.in_proj_z = Linear(hidden_size, c.value_dim, bias=False)
        self.in_proj_b = Linear(hidden_size, c.num_value_heads, bias=False)
        self.in_proj_a = Linear(hidden_size, c.num_value_heads, bias=False)

    def __call__(
        self,
        x: mx.array,
        cache: StateCache | WideStates | None,
        norm: nn.Module | None = None,
        plus: mx.array | None = None,
    ) -> mx.array:
        """The layer of x `[B, L, E]`, or of norm(x), plus `plus`."""
        c = self._config
        y = x if norm is None else norm(x)
        mixed, z = mx.split(self.project("ordered_qkvz", y), (c.conv_dim,), axis=-1)
        b, a = mx.split(self.project("ordered_ba", y), 2, axis=-1)
        if isinstance(cache, WideStates):
            o = cache.each(self._read, mixed, b, a)
        else:
            o = self._read(cache, mixed, b, a)
        y = mx.fast.rms_norm(o, self["norm"]["weight"].astype(mx.float32), self._eps)
        y = _gated(y.astype(x.dtype), mx.unflatten(z, -1, (-1, c.value_head_dim)))
        return self["out_proj"](y.flatten(-2), plus=plus)

    def _read(
        self, cache: StateCache | None, mixed: mx.array, b: mx.array, a: mx.array
    ) -> mx.array:
        """What sequences read of their states `[B, L, Hv, Dv]`, which go on."""
        B, L, _ = mixed.shape
        held = self._held(cache, B, mixed.dtype)
        if cache is None or not cache.is_drafted:
            o, after = self._gone_on(held, mixed, b, a)
            if cache is not None:
                cache.store(_flat(after), L)
            return o
        # A draft's tokens as they are computed alone, where that costs no launches.
        run = self._one_by_one if device.on_cpu() else self._gone_on

        def replay(n: int) -> tuple[mx.array, mx.array]:
            return _flat(run(held, mixed[:, :n], b[:, :n], a[:, :n])[1] if n else held)

        o, after = run(held, mixed, b, a)
        cache.store(_flat(after), L, replay)
        return o

    def _gone_on(
        self, held: tuple[mx.array, mx.array], mixed: mx.array, b: mx.array, a: mx.array
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """What L tokens read, and what is held behind them."""
        mixed, tail = self._convolved(mixed, held[0])
        o, state = self._of_rule(mixed, b, a, held[1])
        return o, (tail, state)

    def _one_by_one(
        self, held: tuple[mx.array, mx.array], *rows: mx.array
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """`_gone_on`, in a step for each token."""
        found = []
        for i in range(rows[0].shape[1]):
            o, held = self._gone_on(held, *(x[:, i : i + 1] for x in rows))
            found.append(o)
        return mx.concatenate(found, axis=1), held

    def _held(self, cache: StateCache | None, B: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The last inputs of the convolution `[B, n, C]`, and the state `[B, Hk, r, Dk, Dv]`."""
        c = self._config
        groups = c.num_key_heads, c.num_value_heads // c.num_key_heads
        held = () if cache is None else cache.arrays
        if not held:
            tail = mx.zeros((B, c.conv_kernel_dim - 1, c.conv_dim), dtype)
            return tail, mx.zeros((B, *groups, c.key_head_dim, c.value_head_dim))
        tail, state = held
        return tail, mx.unflatten(state, 1, groups)

    def _convolved(self, x: mx.array, tail: mx.array) -> tuple[mx.array, mx.array]:
        """silu of the convolution of x `[B, L, C]` behind a tail, and the tail behind x."""
        n, L = tail.shape[1], x.shape[1]
        x = mx.concatenate([tail, x], axis=1)
        weight = self["conv1d"]["weight"].squeeze(-1)
        return _taps(*(x[:, i : i + L] for i in range(n + 1)), *weight.T), x[:, L:]

    def _of_rule(
        self, mixed: mx.array, b: mx.array, a: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The rule's results `[B, L, Hv, Dv]` in float32, and the state behind them."""
        c = self._config
        B, L, _ = mixed.shape
        Hk, r = c.num_key_heads, c.num_value_heads // c.num_key_heads
        qk, v = mx.split(mixed.astype(mx.float32), (2 * c.key_dim,), axis=-1)
        qk = mx.fast.rms_norm(qk.reshape(B, L, 2, Hk, -1), None, L2_EPS / c.key_head_dim)
        qk, v = qk * self["_scales"], v.reshape(B, L, Hk, r, -1)
        g, beta = _rates(a, b, self["A_log"], self["dt_bias"])
        g, beta = g.reshape(B, L, Hk, r), beta.reshape(B, L, Hk, r)
        if L == 1:
            qk = qk[:, 0].swapaxes(1, 2)
            decay = mx.exp(g[:, 0])[..., None]
            o, state = delta_rule.step(qk, v[:, 0], decay, beta[:, 0][..., None], state)
        else:
            o, state = delta_rule.chunk(qk[:, :, 0], qk[:, :, 1], v, g, beta, state)
        return o.reshape(B, L, c.num_value_heads, -1), state


def _flat(held: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """As a cache holds it: the heads along one axis."""
    tail, state = held
    return tail, state.flatten(1, 2)


@compiled
def _taps(*inputs_and_weights: mx.array) -> mx.array:
    n = len(inputs_and_weights) // 2
    pairs = zip(inputs_and_weights[:n], inputs_and_weights[n:], strict=True)
    first, *others = (x * w for x, w in pairs)
    return silu(sum(others, first))


@compiled
def _rates(
    a: mx.array, b: mx.array, A_log: mx.array, dt_bias: mx.array
) -> tuple[mx.array, mx.array]:
    """The logarithm of the decay, and beta, in float32."""
    grown = mx.logaddexp(a.astype(mx.float32) + dt_bias.astype(mx.float32), 0.0)
    return -mx.exp(A_log.astype(mx.float32)) * grown, mx.sigmoid(b).astype(mx.float32)


@compiled
def _gated(y: mx.array, z: mx.array) -> mx.array:
    return (y.astype(mx.float32) * silu(z.astype(mx.float32))).astype(y.dtype)
