"""Llama and Mistral, and their relatives: Ministral 3, and SmolLM3, which leaves rotations out."""

from __future__ import annotations

from ..architecture import Architecture, Config, Tensors
from ..metadata import Metadata, short_number
from ..rope import ROPE_FACTORS, linear_or_yarn, scaling_from_factors
from .common import ATTENTION_AND_MLP, grouped, theta


def llama_config(m: Metadata, tensors: Tensors) -> Config:
    config, base = grouped(m, tensors), theta(m)
    scaling = linear_or_yarn(m)
    freqs = tensors.get(ROPE_FACTORS)
    if freqs is not None:
        if scaling is not None:
            raise m.error("rope.scaling.type", "and rope_freqs.weight cannot both be used")
        scaling = scaling_from_factors(
            m.file, freqs, base, config["head_dim"], config["max_position_embeddings"]
        )
    window = m.opt_int("attention.sliding_window")
    # The layout of Meta's original files, and keys of experts that a dense file may have.
    m.ignore("tensor_data_layout", "expert_count", "expert_used_count")
    return {
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "model_type": "mistral" if window else "llama",
        **config,
        "hidden_act": "silu",
        "rope_theta": base,
        "rope_scaling": scaling,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        **({"sliding_window": window} if window else {}),
    }


def mistral3_config(m: Metadata, tensors: Tensors) -> Config:
    """Ministral 3, whose queries grow with the position; without that Mistral Small 3.1.

    The file's context is of the whole model; YaRN's own has the key of the original.
    """
    growth = m.opt_number("attention.temperature_scale")
    mscale_all = m.opt_number("rope.scaling.yarn_log_multiplier")
    original = m.opt_int("rope.scaling.original_context_length")
    m.ignore("attention.temperature_length")
    config = llama_config(m, tensors)
    if growth is None:
        if mscale_all is not None:
            raise m.error("rope.scaling.yarn_log_multiplier", "needs attention.temperature_scale")
        return config
    yarn = config.pop("rope_scaling")
    if not yarn or yarn["rope_type"] != "yarn" or not original:
        raise m.error("rope.scaling.type", "must be yarn, with its original context")
    if config.pop("attention_bias") or config.pop("mlp_bias"):
        raise m.error("attention.temperature_scale", "is not supported beside biases")
    return {
        **config,
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "sliding_window": None,
        "rope_parameters": {
            **yarn,
            "type": "yarn",
            "rope_theta": config["rope_theta"],
            "mscale": 1.0,  # not in the file; of every published model
            "mscale_all_dim": short_number(1.0 if mscale_all is None else mscale_all),
            "llama_4_scaling_beta": short_number(growth),
        },
    }


def smollm3_config(m: Metadata, tensors: Tensors) -> Config:
    """llama.cpp's files do not say it: every fourth layer has no rotation."""
    config = llama_config(m, tensors)
    return {
        **config,
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
    }


_NAMES = {**ATTENTION_AND_MLP, "ffn_norm": "post_attention_layernorm"}
_PERMUTED = frozenset({"attn_q", "attn_k"})
LLAMA = Architecture(llama_config, _NAMES, "float16", permuted=_PERMUTED, rope_factors=True)
MISTRAL3 = Architecture(mistral3_config, _NAMES, "bfloat16", permuted=_PERMUTED, rope_factors=True)
SMOLLM3 = Architecture(smollm3_config, _NAMES, "bfloat16", permuted=_PERMUTED, rope_factors=True)
