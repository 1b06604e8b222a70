"""Golden cases of Qwen 3, Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from typing import Any

from tests.families.oracle.case import DROP, LONG, Case

FLAT = {"rope_parameters": DROP, "dtype": DROP, "torch_dtype": "float32"}

# Qwen 3

QWEN3 = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}


def qwen3(name: str, *, of: str = "Qwen3", theta: float = 1e6, **options: Any) -> Case:
    hub = {**FLAT, "rope_theta": theta, "rope_scaling": None, **options.pop("hub", {})}
    if of == "Qwen3Moe":
        hub |= {"num_experts": EXPERTS["num_experts"], "num_local_experts": DROP}
    case_options = {key: options.pop(key) for key in ("n_prompt",) if key in options}
    rope = {"rope_type": "default", "rope_theta": theta}
    return Case(
        f"qwen3-{name}",
        f"{of}ForCausalLM",
        {**QWEN3, **(EXPERTS if of == "Qwen3Moe" else {}), "rope_parameters": rope, **options},
        hub,
        per_expert=of == "Qwen3Moe",
        **case_options,
    )


# Qwen3-Next and Qwen3.5

HYBRID = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
TWO = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
MROPE = {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
NEXT_TOKEN = {"mtp.fc.weight": (48, 96), "mtp.layers.0.self_attn.q_proj.weight": (256, 48)}


def qwen3_next(name: str, **options: Any) -> Case:
    """A Qwen3-Next; the hub style is that of the released config.json."""
    hub = {
        **FLAT,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "partial_rotary_factor": 0.25,
        "layer_types": DROP,
        "full_attention_interval": 4,
        **options.pop("hub", {}),
    }
    case_options = {key: options.pop(key) for key in ("n_prompt", "extra") if key in options}
    config = {**HYBRID, **SHARED, "intermediate_size": 64, "rope_parameters": ROPE, **options}
    return Case(
        f"qwen3-next-{name}",
        "Qwen3NextForCausalLM",
        config,
        hub,
        norm_mean=0.0,
        per_expert=True,
        **case_options,
    )


def qwen3_5(name: str, *, moe: bool = False, **options: Any) -> Case:
    """A Qwen3.5's text model."""
    hub = {"dtype": DROP, "torch_dtype": "float32", "attn_output_gate": True}
    hub |= {"mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, **options.pop("hub", {})}
    case_options = {key: options.pop(key) for key in ("n_prompt", "extra") if key in options}
    sizes = {k: v for k, v in SHARED.items() if k != "norm_topk_prob"}
    own = sizes if moe else {"intermediate_size": 64}
    return Case(
        f"qwen3-5-{name}",
        f"Qwen3_5{'Moe' if moe else ''}ForCausalLM",
        {**HYBRID, **own, "rope_parameters": MROPE, **options},
        hub,
        norm_mean=0.0,
        **case_options,
    )


CASES = (
    qwen3("plain", n_prompt=LONG),
    qwen3("biases", attention_bias=True),
    qwen3(
        "sliding",
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
        n_prompt=LONG,
        hub={"layer_types": DROP},
    ),
    qwen3("moe", of="Qwen3Moe", num_hidden_layers=2),
    qwen3(
        "moe-some-dense",
        of="Qwen3Moe",
        norm_topk_prob=False,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        num_hidden_layers=4,
    ),
    qwen3_next("plain", n_prompt=LONG, extra=NEXT_TOKEN),
    qwen3_next(
        "one-key-head",
        linear_num_key_heads=1,
        linear_value_head_dim=16,
        norm_topk_prob=False,
        mlp_only_layers=[0],
        **TWO,
        hub={"full_attention_interval": 2},
    ),
    qwen3_5("plain", n_prompt=LONG, extra=NEXT_TOKEN),
    qwen3_5("equal-heads", linear_num_value_heads=2, **TWO),
    qwen3_5("moe", moe=True, **TWO),
)
