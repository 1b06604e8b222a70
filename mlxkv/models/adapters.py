"""Adapters on a loaded model.

The base's weights stay as they are; a module of `nn.lora` stands in the place of each projection
that changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.models import Family
from mlxkv.models.adapter_targets import Change, Changes, Place, Weighted
from mlxkv.nn.kernels import Settled
from mlxkv.nn.latent_attention import HeadLinear, QuantizedHeadLinear
from mlxkv.nn.lora import (
    Adapted,
    AdaptedEmbedding,
    AdaptedExperts,
    AdaptedHeads,
    AdaptedLinear,
    AdaptedRouter,
    AdaptedSwitch,
    LowRank,
    dora,
    total,
)
from mlxkv.nn.lora_kernel import KernelLinear, takes
from mlxkv.nn.model import CausalLM
from mlxkv.nn.moe import ExpertLinear, GatedExperts
from mlxkv.nn.sigmoid_moe import Router
from mlxkv.nn.tree import replaced

__all__ = ["Weighted", "adapted", "adapted_bytes", "attach", "key_of"]


def key_of(adapters: Sequence[Weighted]) -> str:
    """What names adapters with their weights wherever their KV is kept; "" for none."""
    if not adapters:
        return ""
    parts = [[each.adapter.digest, each.weight] for each in adapters]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def attach(model: CausalLM, family: Family, adapters: Sequence[Weighted]) -> list[Adapted]:
    """Add adapters to a loaded or hollow model, lazily; the modules that it gets.

    Raises:
        WeightsError: a target that the model does not have, or of another shape, with its key.
        UnsupportedModel: a target that cannot be changed here.
    """
    made = _made(model, family, adapters)
    for place, module in made:
        place.parent[place.name] = module
        if isinstance(place.parent, GatedExperts):
            place.parent.settle()
    model.adapter_key = key_of(adapters)
    return [module for _, module in made]


def adapted(
    model: CausalLM,
    family: Family,
    adapters: Sequence[Weighted],
    take: Callable[[int], None] = lambda n_bytes: None,
) -> CausalLM:
    """A model under adapters, beside the one that it shares all other arrays with.

    Args:
        model: loaded; its own adapters do not count.
        family: of the model.
        adapters: all that the result has; their matrices are computed here.
        take: called with their bytes before that; may raise.

    Raises:
        As `attach`.
    """
    plain = without_adapters(model)
    made = _made(plain, family, adapters)
    take(sum(module.own_bytes for _, module in made))
    new = {(id(place.parent), place.name): module for place, module in made}
    copy = replaced(plain, lambda parent, name, _: new.get((id(parent), name)))
    for _, module in made:
        mx.eval(module.own_arrays())
        if isinstance(module, Settled):
            module.settle()
    _settle_experts(copy)
    copy.adapter_key, copy.__dict__["adapted_from"] = key_of(adapters), plain
    return copy


def without_adapters(model: CausalLM) -> CausalLM:
    """The model that one with adapters is made of: the same from call to call."""
    if not model.adapter_key or model.adapted_from is not None:
        return model.plain

    def base_of(parent: object, name: object, child: Any) -> nn.Module | None:
        return child["base"] if isinstance(child, Adapted) else None

    plain = replaced(model, base_of)
    _settle_experts(plain)
    plain.adapter_key = ""
    model.__dict__["adapted_from"] = plain
    return plain


def _settle_experts(model: CausalLM) -> None:
    for module in model.modules():
        if isinstance(module, GatedExperts):
            module.settle()


def _made(
    model: CausalLM, family: Family, adapters: Sequence[Weighted]
) -> list[tuple[Place, Adapted]]:
    """The modules that stand in for others, all known before the first is put in its place: an
    error leaves the model as it was."""
    groups: dict[tuple[int, Any], list[Change]] = {}
    for each in adapters:
        for change in Changes(model, family, each):
            place = change.place
            groups.setdefault((id(place.parent), place.name), []).append(change)
    return [(changes[0].place, _adapted(model, changes)) for changes in groups.values()]


def adapted_bytes(model: CausalLM) -> int:
    """What the adapters of a model take."""
    modules = model.weights_root().modules()
    return sum(module.own_bytes for module in modules if isinstance(module, Adapted))


def _adapted(model: CausalLM, changes: Sequence[Change]) -> Adapted:
    """The module that takes the place of the one that all of these change."""
    module = changes[0].place.module
    dtype = mx.float32 if isinstance(module, Router) else model.compute_dtype
    n_rows = module["weight"].shape[-2]

    def summed(of_rows: bool = False) -> LowRank | None:
        found = [c for c in changes if c.of_rows == of_rows]
        if not found:
            return None
        weighed = [(c, _weighed(c)) for c in found]
        return total([x if of_rows else x.within(c.place.start, n_rows) for c, x in weighed])

    def computed(change: LowRank | None) -> LowRank | None:
        if change is None:
            return None
        change = change.folded()
        factor = None if change.factor is None else change.factor.astype(dtype)
        return LowRank(change.a.astype(dtype), change.b.astype(dtype), factor)

    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return AdaptedEmbedding(module, computed(summed(of_rows=True)), computed(summed()))
    as_read = summed()
    if as_read is not None and takes(module, as_read, dtype):
        return KernelLinear(module, as_read)
    change = computed(as_read)
    assert change is not None
    if isinstance(module, ExpertLinear):
        return AdaptedExperts(module, change)
    if isinstance(module, HeadLinear | QuantizedHeadLinear):
        return AdaptedHeads(module, change)
    if isinstance(module, Router):
        return AdaptedRouter(module, change)
    return (AdaptedSwitch if module["weight"].ndim == 3 else AdaptedLinear)(module, change)


def _weighed(change: Change) -> LowRank:
    """A change times its adapter's weight."""
    w, found = change.weight, change.change
    if change.magnitude is None:
        return replace(found, scales=tuple([w * scale for scale in found.own_scales]))
    found = dora(_dense(change.place), found.folded(), change.magnitude)
    assert found.factor is not None
    return LowRank(found.a, w * found.b, 1 + w * (found.factor - 1))


def _dense(place: Place) -> mx.array:
    """The rows of a projection in float32."""
    module, rows = place.module, slice(place.start, place.stop)
    if "scales" not in module:
        return module["weight"][rows].astype(mx.float32)
    biases = module.get("biases")
    return mx.dequantize(
        module["weight"][rows],
        scales=module["scales"][rows],
        biases=None if biases is None else biases[rows],
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    ).astype(mx.float32)
