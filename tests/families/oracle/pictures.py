"""Golden cases of Gemma 3 and 4 with pictures; `make_pictures.py` makes them. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.families.oracle import gemma4_cases as gemma4
from tests.families.oracle.case import DROP, Case
from tests.support.paths import ROOT
from tests.support.tiny import GEMMA, random_tensor

DIRECTORY = ROOT / "tests" / "families" / "golden_media"
BEGIN, SOFT, END = 90, 91, 92
"""Tokens around a picture and in its place; those of text are below."""
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 8
"""Fewer tokens than the largest picture has, and more than the smallest."""

Size = tuple[int, int]
"""Columns and rows of patches."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """One golden model and the pictures that it is given.

    Args:
        case: the model.
        sizes: of the pictures.
        square: patches on a side that become one row.
        values: of one patch; 0 where the picture is pixels.
        two_way: the layers in which the tokens of a picture see each other.
    """

    case: Case
    sizes: Sequence[Size]
    square: int
    values: int = 0
    two_way: Sequence[str] = ()
    patch_size: int = 4

    def n_tokens(self, picture: int) -> int:
        """Rows of one picture."""
        columns, rows = self.sizes[picture]
        return columns * rows // self.square**2

    def data(self, picture: int) -> dict[str, np.ndarray]:
        """What an encoder takes of one picture, as the processors make it."""
        columns, rows = self.sizes[picture]
        rng = np.random.RandomState(1000 + picture)
        if not self.values:
            shape = (rows * self.patch_size, columns * self.patch_size, 3)
            return {"pixels": rng.uniform(-1, 1, shape).astype(np.float32)}
        y, x = np.divmod(np.arange(columns * rows, dtype=np.int32), columns)
        patches = rng.uniform(0, 1, (columns * rows, self.values)).astype(np.float32)
        return {"patches": patches, "positions": np.stack([x, y], axis=1)}


@dataclass(frozen=True)
class Prompt:
    """Text and pictures in turn.

    Args:
        parts: how many tokens of text, or `(picture,)`.
    """

    parts: Sequence[int | tuple[int]]
    pictures: list[int] = field(init=False)

    def __post_init__(self):
        shown = [part[0] for part in self.parts if isinstance(part, tuple)]
        object.__setattr__(self, "pictures", shown)

    def tokens(self, pictures: Pictures, seed: int) -> list[int]:
        """With `SOFT` in the places of rows."""
        rng, tokens = np.random.RandomState(seed), [2]
        for part in self.parts:
            if isinstance(part, tuple):
                tokens += [BEGIN, *[SOFT] * pictures.n_tokens(part[0]), END]
            else:
                tokens += rng.randint(3, BEGIN, part).tolist()
        return tokens


PROMPTS = {
    "one": Prompt((5, (0,), 7)),
    "first": Prompt(((1,), 30)),
    # Text before, between and behind; two together; the same one again; past every window.
    "several": Prompt((20, (0,), (1,), 25, (2,), 3, (0,), 18)),
    "last": Prompt((13, (1,))),
}


def weight(name: str, shape: Sequence[int], seed: int, norm_mean: float) -> np.ndarray:
    """One tensor; where `random_tensor` is made for text, larger or smaller."""
    array = random_tensor(name, shape, seed, norm_mean)
    if name.endswith(("std_bias", "std_scale")):
        return 1 + array
    if "embedding_projection" in name or "mm_input_projection" in name:
        return 0.3 * array  # as large as the embeddings of tokens
    return array


def kept_positions(n: int) -> list[int]:
    """Where logits are stored."""
    return sorted({*range(0, n, 7), n - 2, n - 1})


def _gemma3() -> Pictures:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "vision_use_head": False,
    }
    text = {
        **GEMMA,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
        "rope_parameters": {
            FULL: {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
        },
    }
    hub_text = {key: text[key] for key in text if key != "rope_parameters"} | {
        "model_type": "gemma3_text",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    tokens = {"boi_token_index": BEGIN, "image_token_index": SOFT, "eoi_token_index": END}
    case = Case(
        "gemma3-pictures",
        "Gemma3ForConditionalGeneration",
        {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 16, **tokens},
        {"text_config": hub_text, "torch_dtype": "float32", "dtype": DROP},
        norm_mean=0.0,
        renamed={
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "model.language_model.": "language_model.model.",
        },
    )
    return Pictures(case, [(8, 8)] * 3, 2, two_way=(FULL, SLIDING))


def _gemma4(name: str, vision: dict[str, Any], text: dict[str, Any], **options: Any) -> Case:
    config = {**gemma4.BASE, "sliding_window": WINDOW, **text}
    ids = {"boi_token_id": BEGIN, "image_token_id": SOFT, "eoi_token_id": END}
    ids |= {"audio_token_id": 93, "video_token_id": 94}
    return gemma4.multimodal(name, {"vision_config": vision, **ids}, **config, **options)


VIT = {
    **gemma4.VISION,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "position_embedding_size": 16,
}
THREE_LAYERS = {
    **gemma4.K_IS_V,
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, SLIDING, FULL],
}
TWO_WAY = {**THREE_LAYERS, "use_bidirectional_attention": "vision"}
SIZES: list[Size] = [(6, 9), (12, 9), (3, 12)]

PICTURES = (
    _gemma3(),
    Pictures(
        _gemma4(
            "e2b-pictures",
            {**VIT, "use_clipped_linears": True},
            {
                **gemma4.E2B,
                "num_hidden_layers": 5,
                "num_kv_shared_layers": 2,
                "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
            },
        ),
        SIZES,
        3,
        48,
    ),
    Pictures(
        _gemma4(
            "moe-pictures",
            {**VIT, "standardize": True, "num_key_value_heads": 1},
            {**TWO_WAY, **gemma4.MOE},
        ),
        SIZES,
        3,
        48,
        (SLIDING,),
    ),
    Pictures(
        _gemma4("dense-pictures", {**VIT, "standardize": True}, TWO_WAY),
        SIZES,
        3,
        48,
        (SLIDING,),
    ),
    Pictures(
        _gemma4(
            "unified-pictures",
            {"mm_embed_dim": 24, "mm_posemb_size": 16, "output_proj_dims": 24, "patch_size": 4},
            THREE_LAYERS,
            architecture="Gemma4Unified",
        ),
        [(2, 3), (4, 3), (1, 5)],
        1,
        432,
        (SLIDING,),
    ),
)
