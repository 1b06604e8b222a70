"""A GGUF file as a Hugging Face checkpoint: its config, and its tensors under their names.

To add an `Architecture` (an entry of `general.architecture`), write its config function and its
table of names. Keys that are not understood are errors, so it lists every key it reads or ignores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxkv.errors import UnsupportedModel, WeightsError

from .file import GGUFFile, GGUFTensor, check_readable
from .gemma4 import LAYER_NAMES, TOP_NAMES, gemma4_config, is_unused
from .metadata import Metadata, short_number, token_ids
from .rope import ROPE_FACTORS, linear_or_yarn, scaling_from_factors
from .weight import GGUFWeight

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one GGUF architecture maps.

    Attributes:
        config: makes the config.json in Hugging Face's hub style.
        layer_names: name within a block -> name within our layer.
        dtype: of dequantized values without `--dtype`: bfloat16 for Gemma, where activations
            overflow float16; else float16, which has more digits.
        permuted: names within a block of the tensors with rows permuted per head.
        norms_plus_one: norms are stored with 1 added.
        top_names: names of single tensors that only it has -> ours.
        is_unused: whether a tensor of this name is left out, with the config.
    """

    config: Callable[[Metadata, Mapping[str, GGUFTensor]], dict[str, Any]]
    layer_names: Mapping[str, str]
    dtype: str
    permuted: frozenset[str] = frozenset()
    norms_plus_one: bool = False
    top_names: Mapping[str, str] = field(default_factory=dict)
    is_unused: Callable[[str, Mapping[str, Any]], bool] = lambda name, config: False

    @property
    def scale_dtype(self) -> str:
        """The dtype that keeps a quantized tensor's float16 scales without loss.

        float32 beside bfloat16: MLX gives embeddings the dtype of their scales, and in float16 the
        residual stream of such a model overflows.
        """
        return "float16" if self.dtype == "float16" else "float32"


_ATTENTION_AND_MLP = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def architecture_of(file: GGUFFile) -> Architecture:
    """A file's architecture.

    Raises:
        UnsupportedModel: it is not in the table, or a mixture of experts.
    """
    name = file.architecture
    found = _ARCHITECTURES.get(name)
    if found is None:
        raise UnsupportedModel(
            f"{file.path}: GGUF architecture {name!r} is not supported; "
            f"supported are {', '.join(sorted(_ARCHITECTURES))}"
        )
    experts = [t for t in file.tensors if "_exps" in t or "ffn_gate_inp" in t]
    if experts or file.metadata.get(f"{name}.expert_count"):
        raise UnsupportedModel(
            f"{file.path}: mixture-of-experts GGUF files of architecture {name!r} are not "
            f"supported{f' (tensor {experts[0]!r})' if experts else ''}"
        )
    return found


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """config.json of a GGUF file, in Hugging Face's hub style.

    Raises:
        UnsupportedModel: another architecture.
        ConfigError: a key is missing, wrong or not understood.
    """
    architecture = architecture_of(file)
    metadata = Metadata(file)
    config = architecture.config(metadata, file.tensors)
    metadata.finish()
    return config


def gguf_weights(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, GGUFWeight]:
    """The tensors of a GGUF file under their Hugging Face names.

    Raises:
        WeightsError: names that the architecture does not have.
        UnsupportedModel: a ggml type that cannot be dequantized.
    """
    architecture = architecture_of(file)
    found: dict[str, GGUFWeight] = {}
    unknown = []
    for tensor in file.tensors.values():
        if tensor.name == ROPE_FACTORS or architecture.is_unused(tensor.name, config):
            continue
        name = _our_name(tensor.name, architecture)
        if name is None:
            unknown.append(tensor.name)
            continue
        check_readable(file, tensor)
        inner = _LAYER.fullmatch(tensor.name)
        permuted = inner is not None and inner[2] in architecture.permuted
        added = 1.0 if architecture.norms_plus_one and "norm" in tensor.name else 0.0
        head_dim = config["head_dim"] if permuted else 0
        if head_dim and tensor.shape[0] % head_dim:
            raise WeightsError(
                f"{file.path}: {tensor.name!r} has {tensor.shape[0]} rows, which are not heads of "
                f"{head_dim}"
            )
        found[name] = GGUFWeight(file, tensor, name, head_dim, added, architecture.scale_dtype)
    if unknown:
        raise WeightsError(
            f"{file.path}: {len(unknown)} tensors that architecture {file.architecture!r} does "
            f"not have: {', '.join(sorted(unknown)[:12])}"
        )
    return found


def _our_name(name: str, architecture: Architecture) -> str | None:
    inner = _LAYER.fullmatch(name)
    if inner is None:
        return architecture.top_names.get(name) or _TOP_NAMES.get(name)
    ours = architecture.layer_names.get(inner[2])
    if ours is None:
        return None
    kind = "" if ours == "layer_scalar" else f".{inner[3]}"
    return f"model.layers.{int(inner[1])}.{ours}{kind}"


def unused_names(file: GGUFFile, config: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that `gguf_weights` leaves out though they are part of a layer."""
    architecture = architecture_of(file)
    return [name for name in file.tensors if architecture.is_unused(name, config)]


def default_dtype(file: GGUFFile) -> str:
    """The dtype of what is not quantized: the one that all matrices have, or the architecture's.

    The architecture's also for F16: Gemma's activations leave the range of float16.
    """
    architecture = architecture_of(file)
    types = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    plain = {"F32": "float32", "BF16": "bfloat16"}
    return plain.get(types.pop(), architecture.dtype) if len(types) == 1 else architecture.dtype


def _common_config(m: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{m.file.path}: the matrix 'token_embd.weight' is missing")
    heads = m.int("attention.head_count")
    hidden = m.int("embedding_length")
    head_dim = m.int("attention.key_length", hidden // heads)
    value_dim = m.int("attention.value_length", head_dim)
    rotated = m.int("rope.dimension_count", head_dim)
    if value_dim != head_dim:
        raise m.error(
            "attention.value_length", f"must equal key_length {head_dim}; got {value_dim}"
        )
    if rotated != head_dim:
        raise m.error("rope.dimension_count", f"must equal the head's {head_dim}; got {rotated}")
    # The embedding's rows count: the tokenizer's list may be shorter, the key may be missing.
    m.ignore("vocab_size")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": m.int("block_count"),
        "intermediate_size": m.int("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": m.int("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": short_number(m.number("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": m.int("context_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **token_ids(m.file.metadata),
    }


def _llama_config(m: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    config = _common_config(m, tensors)
    theta = short_number(m.number("rope.freq_base", 10000.0))  # llama.cpp's default, and Llama's
    scaling = linear_or_yarn(m)
    freqs = tensors.get(ROPE_FACTORS)
    if freqs is not None:
        if scaling is not None:
            raise m.error("rope.scaling.type", "and rope_freqs.weight cannot both be used")
        scaling = scaling_from_factors(
            m.file, freqs, theta, config["head_dim"], config["max_position_embeddings"]
        )
    window = m.opt_int("attention.sliding_window")
    # The layout of Meta's original files, and keys of experts that a dense file may have.
    m.ignore("tensor_data_layout", "attention.causal", "expert_count", "expert_used_count")
    return {
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "model_type": "mistral" if window else "llama",
        **config,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        **({"sliding_window": window} if window else {}),
    }


def _gemma3_config(m: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    config = _common_config(m, tensors)
    # The 27B model, with 62 layers, scales by its share of the hidden size and not by head_dim.
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    scalar: float = hidden // heads if config["num_hidden_layers"] == 62 else config["head_dim"]
    scale = m.opt_number("attention.scale")
    if scale:
        scalar = round(scale**-2)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if m.opt_number(key):
            raise m.error(key, "must be absent: Gemma 3 has none")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **config,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "rope_theta": short_number(m.number("rope.freq_base", 1_000_000.0)),
        "rope_local_base_freq": short_number(m.number("rope.freq_base_swa", 10000.0)),
        "rope_scaling": linear_or_yarn(m),
        "sliding_window": m.int("attention.sliding_window"),
        "sliding_window_pattern": m.int("attention.sliding_window_pattern", 6),
        "attention_bias": False,
    }


_GEMMA = {
    **_ATTENTION_AND_MLP,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        config=_llama_config,
        layer_names={**_ATTENTION_AND_MLP, "ffn_norm": "post_attention_layernorm"},
        dtype="float16",
        permuted=frozenset({"attn_q", "attn_k"}),
    ),
    "gemma3": Architecture(
        config=_gemma3_config,
        layer_names=_GEMMA,
        dtype="bfloat16",
        norms_plus_one=True,
    ),
    "gemma4": Architecture(
        config=gemma4_config,
        layer_names={**_GEMMA, **LAYER_NAMES},
        dtype="bfloat16",
        top_names=TOP_NAMES,
        is_unused=is_unused,
    ),
}
