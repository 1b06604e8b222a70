"""The peak memory of a model's step, found by tracing it: nothing is computed.

MLX exports the graph of a step (`graph`) with the shapes and dtypes of all its arrays, and
`simulation` runs it through a model of MLX's allocator. Weights are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
from mlx.utils import tree_map, tree_unflatten

from mlxkv.base import device
from mlxkv.cache import KVCache, RecurrentCache, RotatingKVCache, make_caches
from mlxkv.kv.layout import Cache
from mlxkv.kv.types import CacheSpec, RecurrentSpec
from mlxkv.memory.graph import Graph
from mlxkv.memory.simulation import Memory
from mlxkv.memory.types import Held
from mlxkv.models.adapters import Weighted, attach
from mlxkv.models.loader import Layout
from mlxkv.nn import kernels
from mlxkv.nn.kernels import settle
from mlxkv.nn.layers import Prepared
from mlxkv.nn.model import CausalLM
from mlxkv.nn.moe import GatedExperts

_Traced = KVCache | RotatingKVCache | RecurrentCache
"""Caches whose arrays are known; others keep what only a definition of mlx-lm understands."""


def prefill_step(model: CausalLM, kv_type: str, n_held: int, n_new: int, *, last: bool) -> Held:
    """Trace a chunk of `n_new` prompt tokens behind `n_held`, with logits if `last`.

    Raises:
        ValueError, RuntimeError: MLX cannot trace this model.
    """
    return _step(model, _caches_at(model, kv_type, n_held, n_new), n_new, last)


def decode_step(model: CausalLM, kv_type: str, n_held: int) -> Held:
    """Trace one token behind `n_held`; arguments and errors as for `prefill_step`."""
    return _step(model, _caches_at(model, kv_type, n_held, 1), 1, True)


def hollow(layout: Layout, adapters: Sequence[Weighted] = ()) -> CausalLM:
    """A model as from `load_model`, with weights that take no memory; clears the layout's."""
    model = layout.model
    arrays = {name: hollow_array(x.shape, x.dtype) for name, x in layout.weights.items()}
    layout.weights.clear()
    model.weights_root().update(tree_unflatten(list(arrays.items())))
    layout.settle_dtype()
    for module in [m for m in model.modules() if isinstance(m, Prepared)]:
        module.prepare()
        module.update(tree_map(lambda x: hollow_array(x.shape, x.dtype), module.parameters()))
    settle(model, is_hollow=True)
    for module in attach(model, layout.checkpoint.family, adapters):
        for name, array in module.own_arrays().items():
            module[name] = hollow_array(array.shape, array.dtype)
        if isinstance(module, kernels.Settled):
            module.settle(is_hollow=True)
    if not device.on_cpu():
        # Else they are broadcasts in each step's graph, which products copy. On the CPU backend
        # that copy stays: it makes up for tasks in flight that the trace misses. Without it tight
        # limits were exceeded by up to 8%.
        mx.eval(model.parameters())
    return model


def hollow_array(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An array of any size that takes a few bytes of memory."""
    return mx.broadcast_to(mx.array(0, dtype), tuple(shape))


def _caches_at(model: CausalLM, kv_type: str, n_held: int, n_chunk: int) -> list[Cache]:
    """Hollow caches, as they are after `n_held` tokens in chunks."""
    caches = make_caches(model, kv_type)
    n_before = min(n_chunk, n_held)
    for cache in caches:
        if not isinstance(cache, _Traced) or cache.spec is None:
            continue
        # MLX cannot export `contiguous`; a maximum with itself is a copy as well.
        cache.copied = lambda x: mx.maximum(x, x)
        if isinstance(cache, RecurrentCache):
            if n_held:
                cache.store(_state(cache.spec, model.compute_dtype), n_held)
                cache.buffers = [hollow_array(x.shape, x.dtype) for x in cache.buffers]
            continue
        for n in (n_held - n_before, n_before):
            if n:
                cache.update(*_rows(cache.spec, n, model.compute_dtype))
                cache.buffers = [hollow_array(x.shape, x.dtype) for x in cache.buffers]
    return caches


def _rows(spec: CacheSpec, n: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    return (
        hollow_array((1, spec.n_kv_heads, n, spec.k_dim), dtype),
        hollow_array((1, spec.n_kv_heads, n, spec.v_dim), dtype),
    )


def _state(spec: CacheSpec, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    assert isinstance(spec, RecurrentSpec)
    return (
        hollow_array((1, spec.n_tail, spec.n_channels), dtype),
        hollow_array((1, spec.n_heads, spec.key_dim, spec.value_dim), mx.float32),
    )


def _step(model: CausalLM, caches: Sequence[Cache], n_new: int, last: bool) -> Held:
    growing = [cache for cache in caches if isinstance(cache, _Traced)]
    lengths = [len(cache.buffers) for cache in growing]

    def run(tokens: mx.array, *buffers: mx.array) -> list[mx.array]:
        rest = iter(buffers)
        for cache, n in zip(growing, lengths, strict=True):
            cache.buffers = [next(rest) for _ in range(n)]
        logits = model.last_logits(tokens, caches)
        # Outputs that are alive after the step; MLX evaluates the first of them.
        kept = [buffer for cache in growing for buffer in cache.buffers]
        return [logits, *kept] if last else kept

    buffers = [buffer for cache in growing for buffer in cache.buffers]
    with _traced(model), kernels.traced():
        graph = Graph.of(run, mx.zeros((1, n_new), mx.int32), *buffers)
    n_roots = 1 if last else len(graph.outputs)
    before = sum(graph.nbytes[name] for name in graph.inputs[1:])
    return Held(before, Memory(graph, graph.order(n_roots)).peak())


@contextmanager
def _traced(model: CausalLM) -> Iterator[None]:
    """Have a model's experts build their graph without evaluating any array."""
    experts = [module for module in model.modules() if isinstance(module, GatedExperts)]
    for module in experts:
        module.traced = True
    try:
        yield
    finally:
        for module in experts:
            module.traced = False
