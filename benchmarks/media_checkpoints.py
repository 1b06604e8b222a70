"""Gemma 3 4B and Gemma 4 E2B scaled down, with random weights and pictures of their real size.

A picture has as many pixels, patches and tokens as in the released models, and heads are as wide;
there are fewer of them, and fewer layers. The files are those of `tests.support.tiny_media`, with a
tokenizer, a chat template and a processor's config that both engines read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import tiny_media

VOCABULARY = 16384
SLIDING, FULL = tiny_media.SLIDING, tiny_media.FULL


def write_gemma3(folder: Path) -> Path:
    """Gemma 3 4B, a quarter as wide; 2 of 27 layers of SigLIP, 6 of 34 of the language model."""
    base = tiny_media.gemma3_config()
    text = base["text_config"] | {
        "vocab_size": VOCABULARY,
        "hidden_size": 640,
        "intermediate_size": 2560,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
    }
    vision = base["vision_config"] | {
        "hidden_size": 288,
        "intermediate_size": 1076,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 896,
    }
    tiny_media.write_gemma3(
        folder, text_config=text, vision_config=vision, mm_tokens_per_image=256, hidden_size=640
    )
    _name_all_tokens(folder / "tokenizer.json")
    for name in ("preprocessor_config.json", "processor_config.json"):
        _change(folder / name, lambda keys: keys | {"image_seq_length": 256})
    return folder


def write_gemma4(folder: Path) -> Path:
    """Gemma 4 E2B, a third as wide; 2 of 16 layers of the ViT, 10 of 35 of the language model."""
    base = tiny_media.gemma4_config()
    text = base["text_config"] | {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": 512,
        "hidden_size_per_layer_input": 64,
        "intermediate_size": 2048,
        "num_hidden_layers": 10,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": 5,
        "sliding_window": 512,
        "layer_types": ([SLIDING] * 4 + [FULL]) * 2,
        "max_position_embeddings": 131072,
    }
    vision = base["vision_config"] | {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "position_embedding_size": 10240,
        "standardize": False,
    }
    tiny_media.write_gemma4(
        folder,
        text_config=text,
        vision_config=vision,
        audio_config=None,
        hidden_size=512,
        vision_soft_tokens_per_image=280,
    )

    _name_all_tokens(folder / "tokenizer.json")

    def with_280_tokens(keys: dict[str, Any]) -> dict[str, Any]:
        image = keys["image_processor"] | {"max_soft_tokens": 280}
        return keys | {"image_seq_length": 280, "image_processor": image}

    _change(folder / "processor_config.json", with_280_tokens)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {"gemma3": write_gemma3, "gemma4": write_gemma4}


def write_pictures(folder: Path, n: int) -> list[Path]:
    """Photo-like JPEG files of 1600 x 1200 pixels, as a phone's at half size, none like another."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(n):
        rough = np.random.RandomState(i).randint(0, 256, (12, 16, 3)).astype(np.uint8)
        noise = np.random.RandomState(100 + i).randint(0, 12, (1200, 1600, 3)).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(rough).resize((1600, 1200), Image.Resampling.BICUBIC))
        files.append(folder / f"{i}.jpg")
        Image.fromarray(np.minimum(smooth, 243) + noise).save(files[-1], quality=90)
    return files


def _name_all_tokens(path: Path) -> None:
    """Have a text for every id: random weights choose any, and mlx-vlm's detokenizer wants one."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    # Those that are added are put into the vocabulary too, or they get other ids behind its gap.
    added = {token["content"]: token["id"] for token in whole["added_tokens"]}
    words = range(max(added.values()) + 1, VOCABULARY)
    whole["model"]["vocab"] |= added | {f"▁word{i}": i for i in words}
    path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")


def _change(path: Path, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    keys = changed(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(keys, indent=1) + "\n", encoding="utf-8")
