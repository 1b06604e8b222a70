"""Tiny checkpoints with random weights that take pictures and sound, with all files of a real one.

The weights have Hugging Face's names. What a prompt holds for a picture is as in the real models:
Gemma 3 makes `N_GEMMA3` rows of every picture, Gemma 4 at most `N_GEMMA4` of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer

from mlxkv.models import gemma4
from mlxkv.models.gemma4_config import Config as Gemma4Config
from tests.support import tiny
from tests.support.paths import TOKENIZERS

N_GEMMA3, N_GEMMA4 = 4, 70
FULL, SLIDING = "full_attention", "sliding_attention"
VOCABULARY = 512
TURNS = ("<start_of_turn>", "<end_of_turn>")
MARKS = {
    "gemma3": ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    "gemma4": ("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>"),
}
"""Begin, soft token and end, of pictures and then of sound."""

Shapes = dict[str, tuple[int, ...]]


def gemma3_config(**changes: Any) -> dict[str, Any]:
    """A Gemma 3 in the hub style: pictures of 56 x 56 in patches of 14, four rows each."""
    begin, soft, end = token_ids("gemma3")
    text = tiny.gemma3_config(vocab_size=VOCABULARY, max_position_embeddings=2048)
    del text["architectures"], text["bos_token_id"], text["eos_token_id"]
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": N_GEMMA3,
        "boi_token_index": begin,
        "image_token_index": soft,
        "eoi_token_index": end,
        "bos_token_id": 1,
        "eos_token_id": [2, _turn_end("gemma3")],
        "torch_dtype": "float32",
        **changes,
    }


def gemma4_config(**changes: Any) -> dict[str, Any]:
    """An E2B in the hub style: per-layer embeddings, shared KV, clipped linears, sound."""
    image, audio = token_ids("gemma4")[:3], token_ids("gemma4")[3:]
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": {
            "model_type": "gemma4_text",
            "vocab_size": VOCABULARY,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size": 48,
            "hidden_size_per_layer_input": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "global_head_dim": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "sliding_window": 32,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "position_embedding_size": 1024,
            "rms_norm_eps": 1e-6,
            "use_clipped_linears": True,
            "standardize": True,
        },
        "audio_config": {
            "model_type": "gemma4_audio",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [128, 4],
            "output_proj_dims": 24,
            "use_clipped_linears": True,
        },
        **dict(zip(("boi_token_id", "image_token_id", "eoi_token_id"), image, strict=True)),
        **dict(zip(("boa_token_id", "audio_token_id", "eoa_token_id"), audio, strict=True)),
        "eoa_token_index": audio[2],
        "vision_soft_tokens_per_image": N_GEMMA4,
        "bos_token_id": 1,
        "eos_token_id": [2, _turn_end("gemma4")],
        "torch_dtype": "float32",
        **changes,
    }


def _scaled(mean: float, deviation: float) -> dict[str, Any]:
    """What all processors of pictures do."""
    scaled = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}
    return {**scaled, "image_mean": [mean] * 3, "image_std": [deviation] * 3}


def write_gemma3(folder: Path, *, dtype: mx.Dtype = mx.float32, **changes: Any) -> Path:
    """A Gemma 3 with pictures, tokenizer, chat template and processor."""
    config = gemma3_config(**changes)
    shapes: Shapes = {
        f"language_model.{name}": shape
        for name, shape in tiny.tensor_shapes(config["text_config"]).items()
    }
    E = config["text_config"]["hidden_size"]
    shapes |= siglip_shapes(config["vision_config"], E)
    _write(folder, "gemma3", config, shapes, 0.0, dtype)
    side = config["vision_config"]["image_size"]
    processor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        **_scaled(0.5, 0.5),
        "image_seq_length": N_GEMMA3,
        "resample": 2,
        "size": {"height": side, "width": side},
        "processor_class": "Gemma3Processor",
    }
    _json(folder / "preprocessor_config.json", processor)
    names = {"image_seq_length": N_GEMMA3, "processor_class": "Gemma3Processor"}
    _json(folder / "processor_config.json", names)
    return folder


def write_gemma4(folder: Path, *, dtype: mx.Dtype = mx.float32, **changes: Any) -> Path:
    """A Gemma 4 E2B with pictures and sound, tokenizer, chat template and processor."""
    config = gemma4_config(**changes)
    text = {k: v for k, v in config.items() if k not in ("vision_config", "audio_config")}
    model = gemma4.Model(Gemma4Config.from_dict(text))
    parameters: Any = tree_flatten(model.parameters())
    shapes: Shapes = {
        name.replace("model.", "model.language_model.", 1): array.shape
        for name, array in parameters
    }
    E = config["text_config"]["hidden_size"]
    if vision := config.get("vision_config"):
        shapes |= vit_shapes(vision, E)
    if audio := config.get("audio_config"):
        shapes |= conformer_shapes(audio, E)
    _write(folder, "gemma4", config, shapes, 0.5, dtype)
    image = {
        "image_processor_type": "Gemma4ImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": False,
        **_scaled(0.0, 1.0),
        "max_soft_tokens": N_GEMMA4,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "resample": 3,
    }
    sound = {
        "feature_extractor_type": "Gemma4AudioFeatureExtractor",
        "feature_size": 128,
        "sampling_rate": 16000,
        "padding_value": 0.0,
        "frame_length": 320,
        "hop_length": 160,
        "fft_length": 512,
        "min_frequency": 0.0,
        "max_frequency": 8000.0,
        "mel_floor": 0.001,
    }
    processor = {
        "processor_class": "Gemma4Processor",
        "image_seq_length": N_GEMMA4,
        "audio_seq_length": 750,
        "audio_ms_per_token": 40,
        "image_processor": image,
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
        "feature_extractor": sound,
    }
    _json(folder / "processor_config.json", processor)
    return folder


def siglip_shapes(vision: Mapping[str, Any], text_size: int) -> Shapes:
    """Tensors of Gemma 3's tower and projector, as the published checkpoints name them."""
    E, wide, P = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    tower = "vision_tower.vision_model."
    shapes: Shapes = {
        f"{tower}embeddings.patch_embedding.weight": (E, 3, P, P),
        f"{tower}embeddings.patch_embedding.bias": (E,),
        f"{tower}embeddings.position_embedding.weight": ((vision["image_size"] // P) ** 2, E),
    }
    products = {f"self_attn.{name}": (E, E) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    products |= {"mlp.fc1": (wide, E), "mlp.fc2": (E, wide)}
    products |= dict.fromkeys(("layer_norm1", "layer_norm2"), (E,))
    for i in range(vision["num_hidden_layers"]):
        for name, shape in products.items():
            shapes[f"{tower}encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"{tower}encoder.layers.{i}.{name}.bias"] = shape[:1]
    shapes |= {f"{tower}post_layernorm.{kind}": (E,) for kind in ("weight", "bias")}
    shapes["multi_modal_projector.mm_input_projection_weight"] = (E, text_size)
    shapes["multi_modal_projector.mm_soft_emb_norm.weight"] = (E,)
    return shapes


def vit_shapes(vision: Mapping[str, Any], text_size: int) -> Shapes:
    """Tensors of Gemma 4's vision tower and projection."""
    E, wide, P = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    D, clipped = vision["head_dim"], vision.get("use_clipped_linears", False)
    rows, kv_rows = vision["num_attention_heads"] * D, vision["num_key_value_heads"] * D
    tower = "model.vision_tower."
    table = (2, vision["position_embedding_size"], E)
    shapes: Shapes = {
        f"{tower}patch_embedder.input_proj.weight": (E, 3 * P * P),
        f"{tower}patch_embedder.position_embedding_table": table,
        "model.embed_vision.embedding_projection.weight": (text_size, E),
    }
    if vision.get("standardize"):
        shapes |= {f"{tower}std_{kind}": (E,) for kind in ("bias", "scale")}
    norms = {f"{name}_layernorm": E for name in ("input", "post_attention")}
    norms |= {f"{name}_feedforward_layernorm": E for name in ("pre", "post")}
    norms |= {"self_attn.q_norm": D, "self_attn.k_norm": D}
    attention = {"q_proj": (rows, E), "k_proj": (kv_rows, E), "v_proj": (kv_rows, E)}
    attention["o_proj"] = (E, rows)
    mlp = {"gate_proj": (wide, E), "up_proj": (wide, E), "down_proj": (E, wide)}
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}."
        shapes |= {f"{layer}{name}.weight": (size,) for name, size in norms.items()}
        for part, products in (("self_attn", attention), ("mlp", mlp)):
            for name, shape in products.items():
                shapes |= linear_shapes(f"{layer}{part}.{name}", shape, clipped)
    return shapes


def conformer_shapes(audio: Mapping[str, Any], text_size: int) -> Shapes:
    """Tensors of Gemma 4's audio tower and projection."""
    E, (first, second) = audio["hidden_size"], audio["subsampling_conv_channels"]
    clipped, out = audio.get("use_clipped_linears", True), audio["output_proj_dims"]
    tower, conv = "model.audio_tower.", "model.audio_tower.subsample_conv_projection."
    shapes: Shapes = {
        f"{conv}layer0.conv.weight": (first, 1, 3, 3),
        f"{conv}layer0.norm.weight": (first,),
        f"{conv}layer1.conv.weight": (second, first, 3, 3),
        f"{conv}layer1.norm.weight": (second,),
        f"{conv}input_proj_linear.weight": (E, 32 * second),  # of 128 mels, halved twice
        f"{tower}output_proj.weight": (out, E),
        f"{tower}output_proj.bias": (out,),
        "model.embed_audio.embedding_projection.weight": (text_size, out),
    }
    norms = ("norm_pre_attn", "norm_post_attn", "norm_out", "lconv1d.pre_layer_norm")
    norms += ("lconv1d.conv_norm",)
    norms += tuple(f"feed_forward{i}.{at}_layer_norm" for i in (1, 2) for at in ("pre", "post"))
    products = {f"self_attn.{name}": (E, E) for name in ("q_proj", "k_proj", "v_proj", "post")}
    products |= {"lconv1d.linear_start": (2 * E, E), "lconv1d.linear_end": (E, E)}
    for i in (1, 2):
        products |= {f"feed_forward{i}.ffw_layer_1": (4 * E, E)}
        products |= {f"feed_forward{i}.ffw_layer_2": (E, 4 * E)}
    for i in range(audio["num_hidden_layers"]):
        layer = f"{tower}layers.{i}."
        shapes |= {f"{layer}{name}.weight": (E,) for name in norms}
        for name, shape in products.items():
            shapes |= linear_shapes(f"{layer}{name}", shape, clipped)
        shapes[f"{layer}self_attn.relative_k_proj.weight"] = (E, E)
        shapes[f"{layer}self_attn.per_dim_scale"] = (E // audio["num_attention_heads"],)
        shapes[f"{layer}lconv1d.depthwise_conv1d.weight"] = (E, 1, audio.get("conv_kernel_size", 5))
    return shapes


def linear_shapes(name: str, shape: tuple[int, ...], clipped: bool) -> Shapes:
    """A clippable linear's tensors."""
    bounds = ("input_min", "input_max", "output_min", "output_max") if clipped else ()
    return {f"{name}.linear.weight": shape, **{f"{name}.{bound}": () for bound in bounds}}


def tokenizer(family: str) -> Tokenizer:
    """The tests' Gemma-like tokenizer with the family's marks, which follow its other tokens."""
    made = Tokenizer.from_file(str(TOKENIZERS / "gemma" / "tokenizer.json"))
    marks = (*TURNS, *MARKS[family])
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return made


def token_ids(family: str) -> list[int]:
    """The ids of `MARKS`."""
    vocabulary = tokenizer(family).get_vocab()
    return [vocabulary[mark] for mark in MARKS[family]]


def template(family: str) -> str:
    """A chat template in Gemma's form, which writes one mark for a picture or a piece of sound."""
    parts = {"image": "<start_of_image>"}
    if family == "gemma4":
        parts = {"image": "<|image|>", "audio": "<|audio|>"}
    media = "".join(
        "{%- elif part['type'] == '" + kind + "' -%}{{- '" + mark + "' -}}"
        for kind, mark in parts.items()
    )
    return (
        "{{- bos_token -}}{%- for message in messages -%}"
        "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{- '<start_of_turn>' + role + '\n' -}}"
        "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
        "{%- elif message['content'] is iterable -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{{- part['text'] | trim -}}" + media + "{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{{- '<end_of_turn>\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
    )


def _turn_end(family: str) -> int:
    return tokenizer(family).get_vocab()[TURNS[1]]


def _write(
    folder: Path,
    family: str,
    config: dict[str, Any],
    shapes: Shapes,
    norm_mean: float,
    dtype: mx.Dtype,
) -> None:
    weights = tiny.random_weights(shapes, 0, norm_mean)
    tiny.write_checkpoint(folder, config, weights, dtype=dtype)
    tokenizer(family).save(str(folder / "tokenizer.json"))
    kinds = ("boi", "image", "eoi", "boa", "audio", "eoa")
    names = {f"{kind}_token": mark for kind, mark in zip(kinds, MARKS[family], strict=False)}
    names |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    (folder / "chat_template.jinja").write_text(template(family))
    _json(folder / "tokenizer_config.json", names)
    ends = {"eos_token_id": config["eos_token_id"]}
    _json(folder / "generation_config.json", ends)


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
