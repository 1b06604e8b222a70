"""A tiny Gemma 3n with random weights that takes pictures, with all files of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer

from mlxkv.models import gemma3n
from mlxkv.models.gemma3n_config import Config
from tests.families.oracle.gemma3n_cases import GEMMA3N_HUB, short
from tests.families.oracle.gemma3n_pictures import CONFIG, N_ROWS, SIZE
from tests.support.paths import TOKENIZERS
from tests.support.tiny import random_weights, write_checkpoint
from tests.support.tiny_media import TURNS, template

MARKS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")


def write_gemma3n(folder: Path) -> Path:
    """Sliding and full layers, shared KV, per-layer embeddings; pictures of 96 x 96, 4 rows each.

    Its weights are named as mlxkv names them, kernels as mlx-vlm writes them.
    """
    tokenizer = Tokenizer.from_file(str(TOKENIZERS / "gemma" / "tokenizer.json"))
    added = [AddedToken(mark, special=True, normalized=False) for mark in (*TURNS, *MARKS)]
    tokenizer.add_special_tokens(added)
    ids = tokenizer.get_vocab()
    vocabulary, ends = len(ids), [2, ids[TURNS[1]]]
    text = {**CONFIG["text_config"], **short(4), **GEMMA3N_HUB, "vocab_size": vocabulary}
    config: dict[str, Any] = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": {
            **{name: value for name, value in text.items() if type(value) is not object},
            "vocab_size_per_layer_input": vocabulary,
            "max_position_embeddings": 2048,
            "model_type": "gemma3n_text",
        },
        "vision_config": {**CONFIG["vision_config"], "vocab_offset": ids[MARKS[0]]},
        "vision_soft_tokens_per_image": N_ROWS,
        "boi_token_id": ids[MARKS[0]],
        "image_token_id": ids[MARKS[1]],
        "eoi_token_id": ids[MARKS[2]],
        "bos_token_id": 1,
        "eos_token_id": ends,
        "torch_dtype": "float32",
    }
    parameters: Any = tree_flatten(gemma3n.Model(Config.from_dict(config)).parameters())
    weights = random_weights({name: array.shape for name, array in parameters})
    write_checkpoint(folder, config, weights)
    tokenizer.save(str(folder / "tokenizer.json"))
    written = template("gemma3").replace("<start_of_image>", "<image_soft_token>")
    (folder / "chat_template.jinja").write_text(written)
    for name, content in {
        "preprocessor_config.json": {"size": {"height": SIZE, "width": SIZE}},
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<unk>",
            **dict(zip(("boi_token", "image_token", "eoi_token"), MARKS, strict=True)),
        },
        "generation_config.json": {"eos_token_id": ends},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    return folder
