"""An upper bound of the memory that a step holds, from a model's shapes alone.

Where more than it is free, the step is not traced (`trace`: up to a third of a second for a long
chunk).

    2 KV after the step                              caches that grow are copied, layer by layer
    + the largest attention of a layer               below
    + 4 B * 4 * n * W                                activations
    + 4 B * 2 * V                                    logits
    + 4 B * weights of one layer and of the head     dequantized, on the CPU backend

A layer's attention takes, where it is one fused kernel (`fused.is_fused`):

    4 B * 4 * n * S                                  the mask of a sliding window
    + 4 B * 2 * Hk * S * (k_dim + v_dim)             keys and values, dequantized

and elsewhere

    4 B * 4 * H * n * S                              scores
    + 4 B * 2 * H * S * (k_dim + v_dim)              keys and values of all heads, dequantized

and a layer that keeps a state `RecurrentSpec.values(n)`.

n tokens behind h; S keys, h + n or the window's; H query heads, Hk KV heads; W the sum of the
results of the widest layer's products for a token, experts as often as they are chosen. Bytes are
those of float32.
`tests/memory/test_step_bound.py` compares it with the trace of every family,
`tests/metal/test_bounds.py` with that of released models' proportions on Metal.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.kv.types import CacheSpec, KVFormat, RecurrentSpec, ceil_step, is_quantized
from mlxkv.nn.encoders import serves_media
from mlxkv.nn.fused import is_fused
from mlxkv.nn.lora import Adapted
from mlxkv.nn.model import CausalLM
from mlxkv.nn.moe import GatedExperts

FLOAT = 4
BASE_BYTES = 2**26
"""For pages that are cut, a sampler's arrays, masks and positions."""
_HEADS = "lm_head", "shared_head.head"
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class StepBound:
    """The bound for one model.

    Args:
        specs: one per layer.
        itemsize: bytes a value of the compute dtype.
        n_heads: query heads.
        is_capped: whether scores have a soft cap.
        width: values a token of all products of the widest layer.
        vocab_size: of the logits.
        dequantized: values of weights that are dequantized at a time.
    """

    specs: tuple[CacheSpec | None, ...]
    itemsize: int
    n_heads: int
    is_capped: bool
    width: int
    vocab_size: int
    dequantized: int

    @classmethod
    def of(cls, model: CausalLM) -> StepBound | None:
        """The bound of a model; None for mlx-lm's definitions.

        Those may keep a state instead of KV, KV of another shape than they attend with, or scores
        beside a kernel: no bound follows from their weights.
        """
        specs = tuple(model.cache_specs())
        if (predictor := model.predictor()) is not None:
            specs = (*specs, predictor.spec)
        n_heads = getattr(model.config, "num_attention_heads", None)
        known = (spec is None or not spec.opaque or _is_state(spec) for spec in specs)
        if not isinstance(n_heads, int) or not all(known):
            return None
        widths, values = _layers(model)
        return cls(
            specs,
            model.compute_dtype.size,
            n_heads,
            getattr(model.config, "attn_logit_softcapping", None) is not None,
            max(widths.values(), default=0) + widths[""],
            model.config.vocab_size,
            max(values.values(), default=0) + values[""],
        )

    def __call__(self, kv_type: str, n_held: int, n_new: int) -> int:
        """Bytes of KV and computation during a step of `n_new` tokens behind `n_held`."""
        layers = list(KVFormat(kv_type, self.itemsize).layers(self.specs))
        attention = max(
            (self._attention(spec, own.name, n_held, n_new) for spec, own in set(layers)), default=0
        )
        values = attention + 4 * n_new * self.width + 2 * self.vocab_size + self.dequantized
        held = sum(spec.nbytes(n_held + n_new, own) for spec, own in layers)
        # A rotating cache holds a whole chunk beside its window until the next update.
        surplus = sum(
            spec.token_bytes(own) * n_new for spec, own in layers if spec.window is not None
        )
        return BASE_BYTES + 2 * (held + surplus) + FLOAT * values

    def _attention(self, spec: CacheSpec, kv_type: str, n_held: int, n_new: int) -> int:
        """Values that one layer's attention holds beside its queries and its result."""
        if isinstance(spec, RecurrentSpec):
            return spec.values(n_new)
        n_keys = ceil_step(n_held + n_new)
        if spec.window is not None:
            n_keys = min(n_keys, spec.window + n_new)
        fused = is_fused(
            n_new,
            spec.k_dim,
            spec.v_dim,
            self.n_heads // spec.n_kv_heads,
            quantized=is_quantized(kv_type),
            capped=self.is_capped,
        )
        if fused:
            n_heads, n_scores = spec.n_kv_heads, n_new if spec.window is not None else 0
        else:
            n_heads, n_scores = self.n_heads, self.n_heads * n_new
        return n_keys * (4 * n_scores + 2 * n_heads * (spec.k_dim + spec.v_dim))


def _is_state(spec: CacheSpec) -> bool:
    return isinstance(spec, RecurrentSpec)


def _layers(model: CausalLM) -> tuple[Counter[str], Counter[str]]:
    """Layer ("" for none) -> values of its products' inputs and results a token, and of its
    quantized weights."""
    modules = dict(model.named_modules())
    experts = {path for path, module in modules.items() if isinstance(module, GatedExperts)}
    widths: Counter[str] = Counter()
    values: Counter[str] = Counter()
    for path, module in modules.items():
        found = _LAYER.search(f"{path}.")
        layer = found[1] if found else ""
        if isinstance(module, Adapted):
            n_result = sum(max(array.shape[-2:]) for array in module.own_arrays().values())
            is_expert = path.rpartition(".")[0] in experts
            widths[layer] += n_result * (_n_chosen(model, 1) if is_expert else 1)
        path = path.removesuffix(".base")
        if serves_media(path) or not isinstance(weight := module.get("weight"), mx.array):
            continue
        if weight.ndim < 2:  # a norm
            widths[layer] += weight.size
            continue
        *leading, n_out, _ = weight.shape
        n_in, n_matrices = _n_in(module), prod(leading)
        is_expert = path.rpartition(".")[0] in experts
        # A token gets a row of an embedding; the head runs for the last token alone.
        is_table = isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        n_result = 0 if is_table or path.endswith(_HEADS) else n_out
        times = _n_chosen(model, n_matrices) if is_expert else n_matrices
        widths[layer] += times * (n_in + n_result)
        if "scales" in module and device.on_cpu():  # experts one at a time
            values[layer] += (1 if is_expert else n_matrices) * n_out * n_in
    return widths, values


def _n_in(module: nn.Module) -> int:
    """Values in a row of a weight, quantized or not."""
    n = module["weight"].shape[-1]
    return n * 32 // module.bits if "scales" in module else n


def _n_chosen(model: CausalLM, n_experts: int) -> int:
    """Experts of a token; all of them where the config does not say."""
    for owner in (model.config, getattr(model.config, "moe", None)):
        for name in ("num_experts_per_tok", "top_k_experts"):
            if isinstance(n := getattr(owner, name, None), int):
                return n
    return n_experts
