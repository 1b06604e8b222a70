"""Checkpoints of every family as GGUF files, as llama.cpp's converter writes them.

Names are those of the gguf package's map, what is done to the arrays is told after llama.cpp's
converter; independent of `mlxkv.convert`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from tests.support import gguf_gemma4, gguf_qwen
from tests.support.gguf_files import permuted, tokens, write_gguf

Arrays = Mapping[str, np.ndarray]
ARCHITECTURES = {
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3n_text": MODEL_ARCH.GEMMA3N,
    "gemma4_text": MODEL_ARCH.GEMMA4,
    "glm4": MODEL_ARCH.GLM4,
    "glm4_moe": MODEL_ARCH.GLM4_MOE,
    "glm4_moe_lite": MODEL_ARCH.DEEPSEEK2,
    "gpt_oss": MODEL_ARCH.GPT_OSS,
    "mistral": MODEL_ARCH.MISTRAL3,
    "ministral3": MODEL_ARCH.MISTRAL3,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "qwen3_next": MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_text": MODEL_ARCH.QWEN35,
    "qwen3_5_moe_text": MODEL_ARCH.QWEN35MOE,
}
_PERMUTED = ("mistral", "ministral3", "smollm3")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+_proj)\.weight")


def write_family(
    path: Path, config: Mapping[str, Any], weights: Arrays, kind: str = "F32", **changes: Any
) -> Path:
    """A checkpoint as a GGUF file.

    Args:
        config: in the hub style.
        weights: under Hugging Face's names.
        kind: ggml's type of every matrix that may be quantized.
        changes: of the metadata.
    """
    arch = ARCHITECTURES[config["model_type"]]
    n_blocks = config["num_hidden_layers"] + (config.get("num_nextn_predict_layers") or 0)
    names = get_tensor_name_map(arch, n_blocks)
    tensors = {}
    for name, array in _changed(config, _stacked(weights)).items():
        ours = names.get_name(name, (".weight", ".bias")) or _named_by_hand(name)
        assert ours is not None, f"the gguf package does not map {name}"
        tensors[ours] = np.ascontiguousarray(array)
    if arch is MODEL_ARCH.GEMMA4:
        pairs = config["global_head_dim"] // 2
        factors = np.where(np.arange(pairs) < pairs // 4, 1.0, 1e30)
        tensors["rope_freqs.weight"] = factors.astype(np.float32)
    metadata = {**keys(config), **tokens(config["vocab_size"]), **changes}

    def kind_of(name: str) -> str:
        is_plain = "norm" in name or "inp" in name or ".scale" in name or "altup" in name
        return "F32" if is_plain or name.endswith("bias") else kind

    return write_gguf(path, tensors, MODEL_ARCH_NAMES[arch], metadata, kind_of)


def _named_by_hand(name: str) -> str | None:
    """Scales of Gemma 4's routers, which the converter names itself."""
    layer = name.split(".")[2]
    if name.endswith("router.scale"):
        return f"blk.{layer}.ffn_gate_inp.scale"
    return f"blk.{layer}.ffn_down_exps.scale" if "per_expert_scale" in name else None


def _stacked(weights: Arrays) -> dict[str, np.ndarray]:
    """One tensor of all experts, and of all projections of Gemma 3n's streams."""
    found: dict[str, Any] = {}
    for name, array in weights.items():
        if match := _EXPERT.fullmatch(name):
            stem, number, part = match.groups()
            found.setdefault(f"{stem}.{part}.weight", {})[int(number)] = array
        elif match := re.fullmatch(r"(model\.altup_\w+)\.(\d)\.weight", name):
            found.setdefault(f"{match[1]}.weight", {})[int(match[2])] = array
        else:
            found[name] = array
    return {
        name: np.stack([parts[i] for i in range(len(parts))]) if isinstance(parts, dict) else parts
        for name, parts in found.items()
    }


def _changed(config: Mapping[str, Any], weights: Arrays) -> dict[str, np.ndarray]:
    """The arrays as the file has them, some under names that the map has."""
    kind, found = config["model_type"], {}
    for name, array in weights.items():
        if kind.startswith(("qwen3_5", "qwen3_next")):
            if not name.startswith("mtp."):
                found |= gguf_qwen.changed(config, name, array)
            continue
        if kind in ("gemma", "gemma2") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        elif kind in _PERMUTED and re.search(r"[qk]_proj", name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            array = permuted(array, config[key])
        elif name.endswith("e_score_correction_bias"):
            name = name.replace("_bias", ".bias")
        elif name.endswith(("layer_scalar", "correct_output_scale", "sinks")):
            name += ".weight"
        elif ".kv_b_proj." in name:
            found |= _latent_halves(config, name, array)
            continue
        elif ".experts." in name and kind in ("gpt_oss", "gemma4_text"):
            found |= _fused_experts(kind, name, array)
            continue
        found[name] = array
    return found


def _latent_halves(config: Mapping[str, Any], name: str, array: np.ndarray) -> Arrays:
    nope = config["qk_nope_head_dim"]
    heads = array.reshape(config["num_attention_heads"], nope + config["v_head_dim"], -1)
    keys_, values = heads[:, :nope].swapaxes(1, 2), heads[:, nope:]
    return {name.replace("kv_b", "k_b"): keys_, name.replace("kv_b", "v_b"): values}


def _fused_experts(kind: str, name: str, array: np.ndarray) -> Arrays:
    if kind == "gemma4_text":
        return {f"{name}.weight": array}
    name = name.replace("_proj_bias", "_proj.bias")
    if not name.endswith(".bias"):
        name, array = f"{name}.weight", array.swapaxes(-1, -2)
    if "gate_up_proj" not in name:
        return {name: array}
    parts = {"gate": array[:, 0::2], "up": array[:, 1::2]}
    return {name.replace("gate_up", part): rows for part, rows in parts.items()}


def keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an architecture, without its prefix."""
    c, kind = config, config["model_type"]
    if kind == "gemma4_text":
        return gguf_gemma4.keys(c) | _experts(c)
    heads, head_dim = c["num_attention_heads"], c.get("head_dim")
    found = {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": c["num_hidden_layers"] + (c.get("num_nextn_predict_layers") or 0),
        "feed_forward_length": c.get("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    if kind not in ("gemma", "gemma2"):
        found["rope.freq_base"] = float((c.get("rope_parameters") or c)["rope_theta"])
    if kind in _PERMUTED:
        found |= {"rope.dimension_count": head_dim, "vocab_size": c["vocab_size"]}
    if kind in ("glm4", "glm4_moe"):
        found["rope.dimension_count"] = int(head_dim * c["partial_rotary_factor"])
    if kind in ("gemma2", "gpt_oss", "gemma3n_text"):
        found["attention.sliding_window"] = c["sliding_window"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        found[key] = c.get(key)
    return found | _experts(c) | _rope(c) | _special(c) | gguf_qwen.keys(c)


def _experts(c: Mapping[str, Any]) -> dict[str, Any]:
    gpt_oss, glm = c["model_type"] == "gpt_oss", "n_routed_experts" in c
    count = c.get("n_routed_experts") or c.get("num_local_experts") or c.get("num_experts")
    if not count:
        return {}
    width = c["intermediate_size"] if gpt_oss else c["moe_intermediate_size"]
    return {
        "expert_count": count,
        "expert_used_count": c.get("num_experts_per_tok") or c["top_k_experts"],
        "expert_feed_forward_length": width,
        "expert_shared_count": c["n_shared_experts"] if glm else None,
        "expert_group_count": c["n_group"] if glm else None,
        "expert_group_used_count": c["topk_group"] if glm else None,
        "expert_weights_scale": float(c["routed_scaling_factor"]) if glm else None,
        "expert_weights_norm": c["norm_topk_prob"] if glm else None,
        "leading_dense_block_count": c["first_k_dense_replace"] if glm else None,
        "expert_gating_func": 2 if c["model_type"] == "glm4_moe" else None,
        "nextn_predict_layers": c.get("num_nextn_predict_layers") or None,
    }


def _rope(c: Mapping[str, Any]) -> dict[str, Any]:
    scaling = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if scaling.get("rope_type") != "yarn":
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling["factor"]),
        "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(scaling.get("beta_fast", 32)),
        "rope.scaling.yarn_beta_slow": float(scaling.get("beta_slow", 1)),
    }


def _special(c: Mapping[str, Any]) -> dict[str, Any]:
    kind = c["model_type"]
    if kind == "ministral3":
        rope = c["rope_parameters"]
        return {
            "rope.scaling.yarn_log_multiplier": float(rope["mscale_all_dim"]),
            "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
        }
    if kind == "glm4_moe_lite":
        rank, rope_dim = c["kv_lora_rank"], c["qk_rope_head_dim"]
        return {
            "attention.head_count_kv": 1,
            "attention.kv_lora_rank": rank,
            "attention.q_lora_rank": c["q_lora_rank"],
            "attention.key_length": rank + rope_dim,
            "attention.value_length": rank,
            "attention.key_length_mla": c["qk_nope_head_dim"] + rope_dim,
            "attention.value_length_mla": c["v_head_dim"],
            "rope.dimension_count": rope_dim,
            "vocab_size": c["vocab_size"],
        }
    if kind != "gemma3n_text":
        return {}
    # The normal distribution's quantiles of 0, 0.5, 0.7 and 0.9.
    quantiles = {0.0: float("-inf"), 0.5: 0.0, 0.7: 0.524400512708, 0.9: 1.281551565545}
    return {
        "altup.active_idx": c["altup_active_idx"],
        "altup.num_inputs": c["altup_num_inputs"],
        "embedding_length_per_layer_input": c["hidden_size_per_layer_input"],
        "attention.shared_kv_layers": c["num_kv_shared_layers"],
        "activation_sparsity_scale": [quantiles[s] for s in c["activation_sparsity_pattern"]],
        "attention.sliding_window_pattern": [t == "sliding_attention" for t in c["layer_types"]],
        "rope.freq_base_swa": c["rope_local_base_freq"],
    }
