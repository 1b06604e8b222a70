"""The golden case of Gemma 3n with pictures; no torch here, see make_gemma3n_pictures.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.families.oracle.gemma3n_cases import GEMMA3N, GEMMA3N_HUB, gemma3n_rope
from tests.support.paths import GOLDEN
from tests.support.tiny import random_tensor

DIRECTORY = GOLDEN.parent / "golden_media" / "gemma3n-pictures"
N_ROWS = 4
BEGIN, END, SOFT = 70, 80, 81
"""Ids around a picture, and of each of its rows; 80 to 87 are the picture embedder's."""
SIZE = 96
"""Rows and columns of the pictures of prompts."""
SIZES = (SIZE, 64, 80)
"""Pictures whose rows are stored: the adapter takes means of 3 x 3 or of 2 x 2, or interpolates."""
TEXT: dict[str, Any] = {
    **GEMMA3N,
    "num_hidden_layers": 4,
    "layer_types": GEMMA3N["layer_types"][:4],
    "num_kv_shared_layers": 2,
    "intermediate_size": [128, 64, 64, 96],
    "activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0],
    "rope_parameters": gemma3n_rope(),
}
VISION: dict[str, Any] = {
    "vocab_size": 8,
    "vocab_offset": 80,
    "model_args": {"channel_multiplier": 0.0625, "msfa_output_resolution": 2},
}
CONFIG: dict[str, Any] = {
    "text_config": TEXT,
    "vision_config": VISION,
    "audio_config": {
        "vocab_size": 8,
        "vocab_offset": 88,
        "hidden_size": 32,
        "conf_num_attention_heads": 4,
        "conf_num_hidden_layers": 1,
        "sscp_conv_channel_size": [8, 4],
        "input_feat_size": 16,
    },
    "vision_soft_tokens_per_image": N_ROWS,
    "audio_soft_tokens_per_image": 6,
    "boi_token_id": BEGIN,
    "eoi_token_id": END,
    "image_token_id": SOFT,
    "boa_token_id": 71,
    "eoa_token_id": 88,
    "audio_token_id": 89,
}
HUB_TEXT = GEMMA3N_HUB


def picture(number: int, size: int = SIZE) -> np.ndarray:
    """Random pixels `[size, size, 3]` in 0..1."""
    return np.random.RandomState(number).random_sample((size, size, 3)).astype(np.float32)


def prompts(seed: int) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens, and the numbers of the pictures, of each prompt."""
    random = np.random.RandomState(seed)

    def text(n: int) -> list[int]:
        return random.randint(3, BEGIN, n).tolist()

    shown = [BEGIN, *[SOFT] * N_ROWS, END]
    return {
        # The picture is first, and two tokens of its embedder stand in the text.
        "one": ([*shown, *text(9), 83, *text(3), 87], [0]),
        # Text before, between and behind; the first picture leaves the window of 24.
        "two": ([*text(11), *shown, *text(17), *shown, *text(13)], [0, 1]),
        "none": (text(30), []),
    }


def weight(name: str, shape: list[int], seed: int) -> np.ndarray:
    """A random tensor; a kernel is as large as a matrix with its sums."""
    if len(shape) != 4:
        return random_tensor(name, shape, seed, 1.0)
    return random_tensor(name, [shape[0], int(np.prod(shape[1:]))], seed, 1.0).reshape(shape)
