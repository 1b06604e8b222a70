"""GPT-OSS: experts with biases, usually in MXFP4, and a sink for each head."""

from __future__ import annotations

from ..architecture import Architecture, Config, Tensors
from ..metadata import Metadata
from ..rope import linear_or_yarn
from .common import ATTENTION, grouped, theta


def gpt_oss_config(m: Metadata, tensors: Tensors) -> Config:
    """What the files leave out is that of the released models: every other layer slides, YaRN's
    range is not rounded, and the activation's two numbers are the definition's defaults."""
    config = grouped(m, tensors)
    window, n_layers = m.int("attention.sliding_window", 128), config["num_hidden_layers"]
    scaling = linear_or_yarn(m)
    if scaling and scaling["rope_type"] == "yarn":
        scaling = {"beta_fast": 32.0, "beta_slow": 1.0, **scaling, "truncate": False}
    if m.opt_int("expert_gating_func") not in (None, 0, 3):
        raise m.error("expert_gating_func", "must be 3, a softmax over the chosen")
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(n_layers)]
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **config,
        "intermediate_size": m.int("expert_feed_forward_length", config["intermediate_size"]),
        "num_local_experts": m.int("expert_count"),
        "num_experts_per_tok": m.int("expert_used_count"),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "layer_types": types,
        "sliding_window": window,
        "rope_theta": theta(m, 150_000.0),
        "rope_scaling": scaling or {"rope_type": "default"},
    }


GPT_OSS = Architecture(
    gpt_oss_config,
    {
        **ATTENTION,
        "attn_sinks.weight": "self_attn.sinks",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.router",
        "ffn_gate_exps": "mlp.experts.gate_proj",
        "ffn_up_exps": "mlp.experts.up_proj",
        "ffn_down_exps": "mlp.experts.down_proj",
    },
    "bfloat16",
)
