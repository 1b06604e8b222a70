"""Arithmetic on rows of logits [B, V]: are they numbers, what is likely, which token is drawn.

Everything is lazy. On a GPU each chain of elementwise operations is one kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxkv.base import device
from mlxkv.nn import kernels
from mlxkv.nn.layers import compiled

# Longer sums are taken over rows of this length first: MLX's CPU backend adds one value after the
# other, and a float32 sum over 262,144 probabilities is off by up to 4e-4 then (by rows: 2e-6). A
# GPU gives a whole sum or running sum to one group of threads, and each row to its own.
_ROW = 512


def _fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """One kernel on a GPU, compiled at the first call; see `layers.compiled`."""
    on_gpu = functools.cache(lambda: compiled(function))

    @functools.wraps(function)
    def call(*arrays: mx.array) -> mx.array:
        return function(*arrays) if device.on_cpu() else on_gpu()(*arrays)

    return call


@_fused
def biased(x: mx.array, bias: mx.array) -> mx.array:
    return x.astype(mx.float32) + bias


@_fused
def penalized(x: mx.array, penalty: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return mx.where(x > 0, x / penalty, x * penalty)


@_fused
def discounted(x: mx.array, counts: mx.array, presence: mx.array, frequency: mx.array) -> mx.array:
    return x.astype(mx.float32) - frequency * counts - mx.where(counts > 0, presence, 0)


@_fused
def masked(x: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask, x, mx.array(-mx.inf, x.dtype))


@_fused
def _minus(x: mx.array, y: mx.array) -> mx.array:
    return x.astype(mx.float32) - y


@_fused
def weigh(values: mx.array, largest: mx.array, temperature: mx.array) -> mx.array:
    """Unnormalized probabilities at this temperature; the largest is 1."""
    return mx.exp((values.astype(mx.float32) - largest.astype(mx.float32)) / temperature)


@_fused
def at_least(weights: mx.array, measure: mx.array, floor: mx.array) -> mx.array:
    return mx.where(measure >= floor, weights, 0)


@_fused
def likely(weights: mx.array, values: mx.array, largest: mx.array, log_min_p: mx.array) -> mx.array:
    floor = largest.astype(mx.float32) + log_min_p
    return mx.where(values.astype(mx.float32) >= floor, weights, 0)


@_fused
def _in_nucleus(
    rows: mx.array,
    within: mx.array,
    sums: mx.array,
    so_far: mx.array,
    total: mx.array,
    top_p: mx.array,
) -> mx.array:
    """The weights [B, R, 512] in the nucleus; inf where one is not."""
    before = (so_far - sums) + within - rows
    return mx.where(before < top_p * total, rows, mx.inf)


@_fused
def _past(weights: mx.array, running: mx.array, total: mx.array, u: mx.array) -> mx.array:
    """inf where the running sum is past u of the total; the weights elsewhere."""
    return mx.where((running > u * total) & (weights > 0), mx.inf, weights)


@_fused
def _place(row: mx.array, inside: mx.array, last: mx.array) -> mx.array:
    # Padding weighs nothing, but where the logits are no numbers.
    return mx.minimum(row * _ROW + inside, last)


def without(logits: mx.array, ids: tuple[int, ...]) -> mx.array:
    """Logits [B, V], -inf for these tokens."""
    places = mx.broadcast_to(mx.array(ids, mx.uint32), (logits.shape[0], len(ids)))
    return mx.put_along_axis(logits, places, mx.array(-mx.inf, logits.dtype), axis=-1)


def occurrences(ids: mx.array, n_vocab: int) -> mx.array:
    """How often each token is in ids [B, N]: float32 [B, V]; the id V stands for no token."""
    B = ids.shape[0]
    counts = mx.zeros((B, n_vocab + 1)).at[mx.arange(B)[:, None], ids].add(1.0)
    return counts[:, :n_vocab]


def rows_of(x: mx.array, rows: Sequence[int]) -> mx.array:
    """Some rows of x [B, ...], in a view where they follow each other."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return x if len(rows) == x.shape[0] else x[rows[0] : rows[0] + len(rows)]
    return x[mx.array(list(rows))]


def soundness(logits: mx.array) -> mx.array:
    """Finite where rows of logits [..., V] are sound: float [...], lazy.

    A row that holds a NaN or +inf, or nothing but -inf, is not: damaged or overflowing weights show
    here, and a sampler would go on with arbitrary tokens. Which value says so is left open, for the
    host can tell and a launch is saved.
    """
    if not device.on_cpu():
        # One pass: NaN where one is, +inf where one is, -inf where nothing else is.
        return mx.logsumexp(logits, axis=-1)
    # There exponentials cost eight times what these two passes do.
    logits = logits.astype(mx.float32)
    if (largest := kernels.largest(logits)) is not None:
        return largest
    total = logits.sum(axis=-1)
    # A maximum may pass a NaN over; a sum cannot.
    return mx.where(mx.isnan(total), total, logits.max(axis=-1))


def log_normalizer(logits: mx.array) -> mx.array:
    """log(sum(exp(logits))) of logits [B, V], in two levels: float32 [B, 1].

    It is finite where `soundness` is.
    """
    # In 16 bits each row's would be rounded to them.
    rows = _rows(padded(logits.astype(mx.float32), -mx.inf))
    return mx.logsumexp(mx.logsumexp(rows, axis=-1), axis=-1, keepdims=True)


def log_probabilities(logits: mx.array, ids: mx.array, normalizer: mx.array) -> mx.array:
    """The model's own log-probabilities of tokens `ids` [B, n], in float32: [B, n].

    They are those before anything that a Sampler does.

    Args:
        logits: [B, V].
        ids: any tokens.
        normalizer: `log_normalizer` of the logits.
    """
    return _minus(mx.take_along_axis(logits, ids, axis=-1), normalizer)


def nucleus_floor(weights: mx.array, top_p: mx.array) -> mx.array:
    """The smallest weight in the nucleus of weights [B, n]: [B, 1].

    The nucleus is the smallest set of largest weights that sums to top_p of all or more. On a GPU
    everything is sorted at once, for a partition is a sort there.
    """
    if device.on_cpu():
        return _selected_floor(weights, top_p)
    rows = _rows(mx.sort(weights, axis=-1))
    sums = rows.sum(axis=-1, keepdims=True)
    # From the largest down: the last row and the ends of the rows come first.
    so_far = mx.cumsum(sums, axis=1, reverse=True)
    within = mx.cumsum(rows, axis=-1, reverse=True)
    reached = _in_nucleus(rows, within, sums, so_far, so_far[:, :1], top_p)
    return reached.min(axis=(1, 2))[:, None]


def _selected_floor(weights: mx.array, top_p: mx.array) -> mx.array:
    """`nucleus_floor` on the CPU backend.

    It is found by a quickselect by mass whose shapes are fixed, so that it needs no evaluation:
    split at the median, go on with the half in which the mass reaches the target. That touches
    n + n/2 + n/4 ... values where a sort touches n log n, and is as exact as float32 sums.
    """
    target = top_p * row_sums(weights)
    above = mx.zeros_like(target)
    n = weights.shape[-1]
    halvings = max(0, math.ceil(math.log2(n / _ROW)))
    weights = mx.pad(weights, [(0, 0), (0, -n % (1 << halvings))])
    for _ in range(halvings):
        half = weights.shape[-1] // 2
        parted = mx.partition(weights, kth=half, axis=-1)
        low, high = parted[:, :half], parted[:, half:]
        with_high = above + row_sums(high)
        reached = with_high >= target
        weights = mx.where(reached, high, low)
        above = mx.where(reached, above, with_high)
    weights = mx.sort(weights, axis=-1)
    before = above + mx.cumsum(weights, axis=-1, reverse=True) - weights
    return mx.where(before < target, weights, mx.inf).min(axis=-1, keepdims=True)


def draw(weights: mx.array, u: mx.array, last: mx.array) -> mx.array:
    """Indices [B] drawn in proportion to weights [B, n], by inverting the running sum.

    Args:
        weights: padded to whole rows if there are more than one.
        u: [B, 2] random numbers, for the row and for the place in it.
        last: the largest index that is not padding.
    """
    if weights.shape[-1] <= _ROW:
        return _invert(weights, u[:, :1])[:, 0]
    rows = _rows(weights)
    row = _invert(rows.sum(axis=-1), u[:, :1])
    inside = mx.take_along_axis(rows, row[..., None], axis=1)[:, 0]
    return _place(row, _invert(inside, u[:, 1:]), last)[:, 0]


def _invert(weights: mx.array, u: mx.array) -> mx.array:
    """The first index at which the running sum of weights [B, n] passes u of the total: [B, 1].

    u * total may round up to the total itself, and a parallel running sum may fall by a rounding:
    the likeliest is taken where no index of any weight is past u.
    """
    running = mx.cumsum(weights, axis=-1)
    return mx.argmax(_past(weights, running, running[:, -1:], u), axis=-1, keepdims=True)


def padded(x: mx.array, value: float) -> mx.array:
    """x [B, n] up to whole rows, where it is longer than one."""
    n = x.shape[-1]
    if n <= _ROW or n % _ROW == 0:
        return x
    return mx.pad(x, [(0, 0), (0, -n % _ROW)], constant_values=value)


def _rows(x: mx.array) -> mx.array:
    """x [B, n] as [B, ceil(n / 512), 512], zeros at the end; [B, 1, n] if that is less."""
    x = padded(x, 0)
    return x.reshape(x.shape[0], -1, min(x.shape[-1], _ROW))


def row_sums(x: mx.array) -> mx.array:
    """Row sums of x [B, n], added in two levels: [B, 1]."""
    return _rows(x).sum(axis=-1).sum(axis=-1, keepdims=True)
