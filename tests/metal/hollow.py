"""Models of released proportions whose weights are one broadcast value, and their caches.

A hollow array has its contents, so that no graph reaches behind it, and takes no memory. Models
are built on the CPU device, where what they compute once is evaluated; steps are built on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from tests.metal import shim
from tests.metal.proportions import Config

AFFINE4 = {"group_size": 64, "bits": 4, "mode": "affine"}
AFFINE8 = {"group_size": 64, "bits": 8, "mode": "affine"}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def take_gpu_branches() -> None:
    """Have mlxkv decide as on a GPU, before its modules are imported: some decide at import."""
    from mlxkv.base import device

    device.on_cpu = lambda: False
    device.core_streams = lambda: (mx.default_stream(mx.default_device()),)


def hollow(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of one value."""
    x = mx.broadcast_to(mx.array(0, dtype), tuple(shape), stream=mx.cpu)
    mx.eval(x)
    return x


def arrays_in(*things: Any) -> list[mx.array]:
    """Arrays that caches, batches of them or modules hold, wherever they keep them."""
    return list(_arrays(things, set()))


def _arrays(thing: Any, seen: set[int]) -> Iterator[mx.array]:
    if id(thing) in seen or isinstance(thing, type):
        return
    seen.add(id(thing))
    if isinstance(thing, mx.array):
        yield thing
        return
    parts: list[Any] = []
    if isinstance(thing, Mapping):
        parts += thing.values()
    elif isinstance(thing, (list, tuple, set)):
        parts += thing
    if type(thing).__module__.split(".")[0] in ("mlx", "mlx_lm", "mlxkv"):
        slots = (name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()))
        parts += [getattr(thing, name, None) for name in slots]
        parts += getattr(thing, "__dict__", {}).values()
    for part in parts:
        yield from _arrays(part, seen)


def settle(*things: Any) -> None:
    """Make what `arrays_in` finds evaluated, as it is when the next step is built."""
    arrays = arrays_in(*things)
    pending = [x for x, done in zip(arrays, shim.are_done(arrays), strict=True) if not done]
    for array in pending:
        # Writing all of an array makes the very object that holds it another array.
        array[...] = hollow(array.shape, array.dtype)
    mx.eval(pending)


def hollow_out(module: nn.Module, dtype: mx.Dtype) -> None:
    """Replace all parameters, floats in `dtype`, and evaluate what a module keeps beside them."""

    def one(x: mx.array) -> mx.array:
        return hollow(x.shape, dtype if mx.issubdtype(x.dtype, mx.floating) else x.dtype)

    module.update(tree_map(one, module.parameters()))
    mx.eval(arrays_in(module))


def tokens(B: int, L: int) -> mx.array:
    """int32 `[B, L]`."""
    return hollow((B, L), mx.int32)


def model(config: Config, dtype: mx.Dtype, quantized: bool) -> Any:
    """One of mlxkv's models, as the loader leaves it."""
    from mlxkv.models import family_for
    from mlxkv.nn.layers import Prepared
    from mlxkv.nn.linear import QuantizedEmbedding

    family = family_for(dict(config), "config.json")
    built = family.build(family.config(dict(config), "config.json"))
    root = built.weights_root()
    hollow_out(root, dtype)
    if quantized:
        nn.quantize(root, class_predicate=lambda path, m: _quantization(config, path, m))
        hollow_out(root, dtype)
    built.compute_dtype = dtype
    for module in built.modules():
        if isinstance(module, QuantizedEmbedding):
            module.compute_dtype = dtype
    built.eval()
    for module in [m for m in built.modules() if isinstance(m, Prepared)]:
        module.prepare()
        module.update(tree_map(lambda x: hollow(x.shape, x.dtype), module.parameters()))
    mx.eval(arrays_in(built))
    return built


def adapted(base: Any, config: Config, rank: int) -> Any:
    """A model of Llama's shape under an adapter of all its projections."""
    from mlxkv.checkpoint.adapter import Adapter, Target
    from mlxkv.models import adapters, family_for

    E, F = config["hidden_size"], config["intermediate_size"]
    kv = E // config["num_attention_heads"] * config["num_key_value_heads"]
    sizes = {f"self_attn.{x}_proj": (E, n) for x, n in zip("qkvo", (E, kv, kv, E), strict=True)}
    sizes |= {"mlp.gate_proj": (E, F), "mlp.up_proj": (E, F), "mlp.down_proj": (F, E)}
    targets = {
        f"model.layers.{i}.{name}": Target(
            name, hollow((n_in, rank), mx.bfloat16), hollow((rank, out), mx.bfloat16), 2.0
        )
        for i in range(config["num_hidden_layers"])
        for name, (n_in, out) in sizes.items()
    }
    adapter = Adapter("a", "mlx-lm", "LoRA", "", targets, "0")
    family = family_for(dict(config), "config.json")
    return adapters.adapted(base, family, [adapters.Weighted(adapter)])


def _quantization(config: Config, path: str, module: nn.Module) -> bool | dict[str, Any]:
    """4 bits as released checkpoints have them: routers at 8, GPT-OSS' experts in mxfp4."""
    if not hasattr(module, "to_quantized") or module["weight"].shape[-1] % 64:
        return False
    if config["model_type"] == "gpt_oss" and "experts" in path:
        return MXFP4
    return AFFINE8 if path.endswith("router") else AFFINE4


def prefilled(model: Any, n_tokens: int) -> list[Any]:
    """Caches of one sequence that hold a prompt, computed as one chunk."""
    from mlxkv.cache import make_caches

    caches = make_caches(model)
    with shim.gpu():
        model.last_logits(tokens(1, n_tokens), caches)
    settle(caches, model)
    return caches


def twin(caches: Sequence[Any], n_tokens: int, kv_type: str = "native") -> list[Any]:
    """Other caches with the first tokens of these, as if loaded from pages."""
    from mlxkv.cache import make_cache

    twins = []
    with shim.gpu():
        for cache in caches:
            other = make_cache(cache.spec) if cache.spec is not None else type(cache)()
            other.load([cache.read(cache.first, n_tokens)])
            twins.append(other if kv_type == "native" else other.converted(kv_type))
    settle(twins)
    return twins


def batch_of(sequences: Sequence[Sequence[Any]], one_by_one: bool = False) -> Any:
    """The caches of several sequences as a step takes them; they start together, or join."""
    from mlxkv.nn.batch import batch

    with shim.gpu():
        for n in range(1, len(sequences)) if one_by_one else ():
            batch(sequences[:n], new=[n - 1])
        return batch(sequences, new=[len(sequences) - 1] if one_by_one else None)
