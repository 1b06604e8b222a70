"""Gemma 4's GGUF files: numbers that differ by layer, embeddings per layer, layers without KV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxkv.errors import WeightsError

from ..architecture import Architecture, Rows
from ..file import GGUFTensor, dequantize
from ..metadata import Metadata, short_number, token_ids
from ..rope import ROPE_FACTORS
from .common import block_of, fused_experts
from .gemma import FOUR_NORMS

PER_LAYER_TOP = {
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
PER_LAYER = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
_EXPERTS = {
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_exps": "experts.switch_glu.gate_proj",
    "ffn_up_exps": "experts.switch_glu.up_proj",
    "ffn_down_exps": "experts.switch_glu.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
FULL, SLIDING = "full_attention", "sliding_attention"


def gemma4_config(m: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    """The config of a Gemma 4, in the hub style."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{m.file.path}: the matrix 'token_embd.weight' is missing")
    n_layers = m.int("block_count")
    types = [SLIDING if s else FULL for s in m.each("attention.sliding_window_pattern", n_layers)]
    n_shared = m.opt_int("attention.shared_kv_layers") or 0
    wide = m.each("feed_forward_length", n_layers)
    own = _only(m, "feed_forward_length", wide[: n_layers - n_shared])
    shared = _only(m, "feed_forward_length", wide[n_layers - n_shared :])
    if shared not in (None, own, 2 * (own or 0)):
        raise m.error("feed_forward_length", f"is {own}, and {shared} in layers without KV")
    per_layer = m.opt_int("embedding_length_per_layer_input") or 0
    own_values = tensors.get("per_layer_token_embd.weight")
    full_dim, sliding_dim = m.int("attention.key_length"), m.int("attention.key_length_swa")
    _check_dims(m, full_dim, sliding_dim)
    cap = m.opt_number("final_logit_softcapping")
    m.ignore("vocab_size", "attention.causal", "suppress_tokens")
    full_kv = [i for i in range(n_layers - n_shared) if types[i] == FULL]
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_size": m.int("embedding_length"),
        "hidden_size_per_layer_input": per_layer,
        "num_hidden_layers": n_layers,
        "intermediate_size": own,
        "use_double_wide_mlp": shared == 2 * (own or 0),
        "num_attention_heads": m.int("attention.head_count"),
        **_kv_heads(m, types),
        "head_dim": sliding_dim,
        "global_head_dim": full_dim,
        "layer_types": types,
        "num_kv_shared_layers": n_shared,
        "sliding_window": m.int("attention.sliding_window"),
        "attention_k_eq_v": any(f"blk.{i}.attn_v.weight" not in tensors for i in full_kv),
        "rms_norm_eps": short_number(m.number("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": m.int("context_length"),
        "vocab_size": embedding.shape[0],
        "vocab_size_per_layer_input": own_values.shape[0] if own_values else embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "final_logit_softcapping": short_number(cap) if cap else None,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        # The file does not say it; of the published models those without embeddings per layer do.
        "use_bidirectional_attention": None if per_layer else "vision",
        **_experts(m),
        "rope_parameters": _ropes(m, tensors, full_dim),
        **token_ids(m.file.metadata),
    }


def reads_anothers_kv(name: str, config: Mapping[str, Any]) -> str:
    """Why a tensor is left out: it makes KV of a layer that reads another's."""
    block, kinds = block_of(name), ("attn_k", "attn_v", "attn_k_norm")
    first = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    is_unused = block is not None and block[0] >= first and block[1] in kinds
    return "its layer reads another's KV" if is_unused else ""


def _experts(m: Metadata) -> dict[str, Any]:
    """The keys of a mixture of experts, which stands beside each layer's own MLP."""
    n_experts = m.opt_int("expert_count") or 0
    width = m.opt_int("expert_feed_forward_length")
    if not n_experts:
        return {}
    return {
        "enable_moe_block": True,
        "num_experts": n_experts,
        "top_k_experts": m.int("expert_used_count"),
        "moe_intermediate_size": width,
    }


def _parts(tensor: GGUFTensor) -> Mapping[str, Rows]:
    return fused_experts(tensor, "experts.switch_glu")


def _only(m: Metadata, key: str, values: list[Any]) -> int | None:
    """The one number of several layers; None of no layers."""
    if len(set(values)) > 1:
        raise m.error(key, f"differs by layer, which is not supported; got {values[:8]}")
    return values[0] if values else None


def _kv_heads(m: Metadata, types: list[str]) -> dict[str, Any]:
    counts = m.each("attention.head_count_kv", len(types))
    sliding, full = (
        _only(
            m,
            "attention.head_count_kv",
            [n for n, t in zip(counts, types, strict=True) if t == kind],
        )
        for kind in (SLIDING, FULL)
    )
    return {
        "num_key_value_heads": sliding or full,
        "num_global_key_value_heads": full if full != sliding else None,
    }


def _check_dims(m: Metadata, full: int, sliding: int) -> None:
    for key, expected in (
        ("attention.value_length", full),
        ("attention.value_length_swa", sliding),
        ("rope.dimension_count", full),
        ("rope.dimension_count_swa", sliding),
    ):
        if (value := m.int(key, expected)) != expected:
            raise m.error(key, f"must equal the head's {expected}; got {value}")


def _ropes(m: Metadata, tensors: Mapping[str, GGUFTensor], full_dim: int) -> dict[str, Any]:
    """Both kinds' rotary embeddings; full layers turn a share of each head."""
    factor = 1.0
    if (freqs := tensors.get(ROPE_FACTORS)) is not None:
        values = dequantize(m.file.read_rows(freqs, 0, 1), freqs.type).ravel()
        n_turned = int(np.sum(values == 1.0))
        rest = values[n_turned:]
        if len(values) != full_dim // 2 or not (rest >= 1e20).all() or not n_turned:
            raise WeightsError(
                f"{m.file.path}: {ROPE_FACTORS} must be ones and then infinite, {full_dim // 2} "
                "values of them"
            )
        factor = n_turned / len(values)
    theta = short_number(m.number("rope.freq_base", 1_000_000.0))
    local = short_number(m.number("rope.freq_base_swa", 10_000.0))
    full = {"rope_type": "proportional", "partial_rotary_factor": factor, "rope_theta": theta}
    return {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": local}}


GEMMA4 = Architecture(
    gemma4_config,
    {**FOUR_NORMS, **PER_LAYER, **_EXPERTS, "layer_output_scale.weight": "layer_scalar"},
    "bfloat16",
    rope_factors=True,
    top_names=PER_LAYER_TOP,
    unused=reads_anothers_kv,
    parts=_parts,
)
