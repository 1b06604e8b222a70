"""What most architectures have: names of a decoder's tensors, and the keys of its sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxkv.errors import WeightsError

from ..architecture import Config, Rows, Tensors
from ..file import GGUFTensor
from ..metadata import Metadata, short_number, token_ids

_BLOCK = re.compile(r"blk\.(\d{1,9})\.([^.]+)", re.ASCII)

ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
ATTENTION_AND_MLP = {
    **ATTENTION,
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}


def fused_experts(tensor: GGUFTensor, block: str = "mlp.switch_mlp") -> Mapping[str, Rows]:
    """Gates and the others of all experts, where each expert's are in one matrix.

    Args:
        tensor: of the file.
        block: our name of a layer's experts.
    """
    prefix, _, name = tensor.name.rpartition(".ffn_gate_up_exps.")
    if name != "weight" or len(tensor.shape) != 3 or tensor.shape[1] % 2:
        return {}
    n_experts, both, columns = tensor.shape
    shape, at = (n_experts, both // 2, columns), f"model.layers.{prefix.removeprefix('blk.')}"
    return {
        f"{at}.{block}.{part}_proj.weight": Rows(shape, start, both // 2, both)
        for part, start in (("gate", 0), ("up", both // 2))
    }


def sizes(m: Metadata, tensors: Tensors, *, extra_layers: int = 0) -> Config:
    """The sizes of every decoder; vocabularies and heads as the tensors have them.

    Args:
        extra_layers: blocks at the end that are not part of the model.
    """
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{m.file.path}: the matrix 'token_embd.weight' is missing")
    n_layers = m.int("block_count") - extra_layers
    if n_layers < 1:
        raise m.error("block_count", f"must be above {extra_layers}; got {m.int('block_count')}")
    # The embedding's rows count: the tokenizer's list may be shorter, the key may be missing.
    m.ignore("vocab_size", "attention.causal")
    return {
        "hidden_size": m.int("embedding_length"),
        "num_hidden_layers": n_layers,
        "num_attention_heads": m.int("attention.head_count"),
        "rms_norm_eps": short_number(m.number("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": m.int("context_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **token_ids(m.file.metadata),
    }


def grouped(
    m: Metadata,
    tensors: Tensors,
    *,
    extra_layers: int = 0,
    partial: bool = False,
    feed_forward: int | None = None,
) -> Config:
    """`sizes`, and those of grouped-query attention and a plain MLP.

    Args:
        extra_layers: see `sizes`.
        partial: whether a part of each head may be rotated, `partial_rotary_factor`.
        feed_forward: the width of the MLP; None for the one of the file.
    """
    config = sizes(m, tensors, extra_layers=extra_layers)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = m.int("attention.key_length", hidden // heads)
    value_dim = m.int("attention.value_length", head_dim)
    rotated = m.int("rope.dimension_count", head_dim)
    if value_dim != head_dim:
        raise m.error(
            "attention.value_length", f"must equal key_length {head_dim}; got {value_dim}"
        )
    if rotated != head_dim and not (partial and rotated < head_dim and rotated % 2 == 0):
        raise m.error("rope.dimension_count", f"must equal the head's {head_dim}; got {rotated}")
    return {
        **config,
        "intermediate_size": feed_forward or m.int("feed_forward_length"),
        "num_key_value_heads": m.int("attention.head_count_kv", heads),
        "head_dim": head_dim,
        **({"partial_rotary_factor": rotated / head_dim} if partial else {}),
    }


def theta(m: Metadata, default: float = 10000.0) -> float:
    """The base of the wavelengths; 10000 is llama.cpp's default."""
    return short_number(m.number("rope.freq_base", default))


def is_past_the_end(name: str, config: Mapping[str, Any]) -> str:
    """Why a tensor is left out: blocks behind the last predict the token after next.

    One of them is kept, where the config says that the file has it.
    """
    block, n_kept = block_of(name), config.get("num_nextn_predict_layers", 0)
    is_extra = block is not None and block[0] >= config["num_hidden_layers"] + n_kept
    return "predicts the token after next" if is_extra else ""


def block_of(name: str) -> tuple[int, str] | None:
    """The block that a tensor is of, and what it is there; None for another name."""
    match = _BLOCK.match(name)
    return None if match is None else (int(match[1]), match[2])


def sigmoid_experts(m: Metadata, n_layers: int) -> Config:
    """The keys of GLM's mixtures of experts.

    Raises:
        ConfigError: a router of another kind.
    """
    kind = m.opt_int("expert_gating_func")
    if kind not in (None, 0, 2):
        raise m.error("expert_gating_func", f"must be 2, a sigmoid; got {kind}")
    n_dense = m.opt_int("leading_dense_block_count") or 0
    if n_dense > n_layers:
        raise m.error("leading_dense_block_count", f"must be at most {n_layers}; got {n_dense}")
    return {
        "n_routed_experts": m.int("expert_count"),
        "num_experts_per_tok": m.int("expert_used_count"),
        "n_shared_experts": m.int("expert_shared_count"),
        "moe_intermediate_size": m.int("expert_feed_forward_length"),
        "n_group": m.int("expert_group_count", 1),
        "topk_group": m.int("expert_group_used_count", 1),
        "routed_scaling_factor": short_number(m.number("expert_weights_scale", 1.0)),
        "norm_topk_prob": m.any("expert_weights_norm") is True,
        "first_k_dense_replace": n_dense,
    }
