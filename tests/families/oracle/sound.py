"""Golden cases with sound; no torch here, see make_sound.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.families.oracle.case import Case
from tests.families.oracle.gemma3n_cases import GEMMA3N_HUB
from tests.families.oracle.gemma3n_pictures import TEXT as TEXT_3N
from tests.families.oracle.gemma3n_pictures import VISION as VISION_3N
from tests.families.oracle.gemma4_cases import AUDIO, BASE, DROP, E2B, FULL, K_IS_V, SLIDING, VISION
from tests.support.paths import GOLDEN
from tests.support.tiny import random_tensor

DIRECTORY = GOLDEN.parent / "golden_media"
BINS = 16
LENGTHS = (1, 2, 4, 5, 11, 12, 13, 24, 25, 45, 48, 49, 53, 96, 97, 181)
"""Clips whose rows are stored: ends of chunks of 12 encoder frames, of convolutions, odd ones."""
LONGEST = 2998
"""Mel frames of 30 seconds of Gemma 4."""
KEPT = 47
"""Of the longest clip every so-manieth row is stored."""
BEGIN_AUDIO, BEGIN_IMAGE = 70, 71
"""Ids; text has those below."""
CLIPS = ("input_min", "input_max", "output_min", "output_max")


@dataclass(frozen=True, eq=False)
class Sound:
    """A model that hears.

    Args:
        case: its checkpoint.
        audio: ids of a row of sound and of its end.
        image: ids of a row of a picture and of its end.
        audio_key: name of a clip's array, for `media_rows`.
        width: values of a frame.
        image_rows: rows of a picture; None for a case whose prompts have none.
    """

    case: Case
    audio: tuple[int, int]
    image: tuple[int, int]
    audio_key: str
    width: int
    image_rows: int | None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the clips whose rows are stored: fewer where each frame is a row."""
        return LENGTHS if self.audio_key == "mel" else LENGTHS[::4]

    def n_rows(self, n_frames: int) -> int:
        """Rows of a clip."""
        if self.audio_key == "samples":
            return n_frames
        if self.case.architecture.startswith("Gemma3n"):
            return self.case.config["audio_soft_tokens_per_image"]
        return -(-n_frames // 4)

    def clip(self, n_frames: int) -> np.ndarray:
        """Random frames."""
        noise = np.random.RandomState(n_frames).standard_normal((n_frames, self.width))
        return (2 * noise - 3 if self.audio_key == "mel" else noise / 4).astype(np.float32)


@dataclass(frozen=True)
class Prompt:
    """Tokens, with a row's id where media stand, and what stands there.

    Args:
        tokens: all of them.
        clips: frames of each clip.
        n_pictures: `picture(case, 0)` and so on.
    """

    tokens: list[int]
    clips: list[int]
    n_pictures: int = 0


def picture(sound: Sound, number: int) -> dict[str, np.ndarray]:
    """The arrays of a random picture of `image_rows` rows."""
    random = np.random.RandomState(number)
    if sound.case.architecture.startswith("Gemma3n"):
        return {"pixels": random.random_sample((96, 96, 3)).astype(np.float32)}
    config = sound.case.config["vision_config"]
    k = config.get("pooling_kernel_size", 3)
    side = config["patch_size"] * (k if "Unified" in sound.case.architecture else 1)
    assert sound.image_rows is not None
    columns = sound.image_rows * (1 if "Unified" in sound.case.architecture else k)
    rows = columns // sound.image_rows
    positions = [[x, y] for y in range(rows) for x in range(columns)]
    patches = random.random_sample((rows * columns, side * side * 3))
    return {
        "patches": patches.astype(np.float32),
        "positions": np.array(positions, np.int32),
    }


def prompts(sound: Sound, seed: int) -> dict[str, Prompt]:
    """What is computed for each case."""
    random = np.random.RandomState(seed)

    def text(n: int) -> list[int]:
        return random.randint(3, BEGIN_AUDIO, n).tolist()

    def heard(n_frames: int) -> list[int]:
        row, end = sound.audio
        return [BEGIN_AUDIO, *[row] * sound.n_rows(n_frames), end]

    made = {
        # Nothing before it, and more rows than the window.
        "first": Prompt([*heard(97)[1:], *text(6)], [97]),
        "several": Prompt(
            [*text(9), *heard(1), *text(5), *heard(53), *heard(24), *text(30)], [1, 53, 24]
        ),
        "none": Prompt([*text(20), sound.audio[1], *text(9)], []),
    }
    if sound.image_rows is not None:
        row, end = sound.image
        seen = [BEGIN_IMAGE, *[row] * sound.image_rows, end]
        tokens = [*text(7), *seen, *text(3), *heard(45), *text(2), *seen, *heard(12), *text(8)]
        made["both"] = Prompt(tokens, [45, 12], 2)
    return made


def kept_positions(tokens: Sequence[int]) -> list[int]:
    """Where a prompt's logits are stored: a third of all, and the last."""
    n = len(tokens)
    return sorted({*range(0, n, 3), n - 2, n - 1})


def weight(name: str, shape: list[int], seed: int, norm_mean: float) -> np.ndarray:
    """A random tensor; a kernel is as large as a matrix with its sums."""
    if name.endswith(CLIPS):
        # Where about a fifth of the values are clipped.
        noise = abs(float(random_tensor(name + ".0", [1], seed, 1.0)[0]))
        bound = (0.8 + 0.2 * noise) * (-1 if name.endswith("_min") else 1)
        return np.array(bound, np.float32)
    if ".norm_" in name:
        return norm_mean + random_tensor(name, shape, seed, norm_mean)
    if len(shape) < 3 or "table" in name or "pos_embedding" in name:
        return random_tensor(name, shape, seed, norm_mean)
    flat = [shape[0], int(np.prod(shape[1:]))]
    return random_tensor(name, flat, seed, norm_mean).reshape(shape)


def _hub(text: Mapping[str, Any], model_type: str, **changes: Any) -> dict[str, Any]:
    sizes = {key: text.get(key) for key in ("global_head_dim", "num_global_key_value_heads")}
    inner = {**text, **sizes, "model_type": model_type, "dtype": "float32", **changes}
    return {"text_config": inner, "torch_dtype": "float32", "dtype": DROP}


_IDS = {
    "boa_token_id": BEGIN_AUDIO,
    "boi_token_id": BEGIN_IMAGE,
    "audio_token_id": 72,
    "eoa_token_index": 73,
    "image_token_id": 74,
    "eoi_token_id": 75,
    "video_token_id": 76,
}
_E2B = {
    **BASE,
    **E2B,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
}
_UNIFIED = {
    **BASE,
    **K_IS_V,
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, SLIDING, FULL],
    "use_bidirectional_attention": "vision",
}
_3N_HUB = {key: value for key, value in {**TEXT_3N, **GEMMA3N_HUB}.items() if value is not DROP}

GEMMA4 = Sound(
    Case(
        "gemma4-sound",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": _E2B,
            "vision_config": VISION,
            "audio_config": {
                **AUDIO,
                "num_hidden_layers": 2,
                "subsampling_conv_channels": [BINS, 4],
                "output_proj_dims": 20,
                "use_clipped_linears": True,
                # Small enough to matter; released ones have 1e10.
                "gradient_clipping": 1.5,
            },
            **_IDS,
        },
        _hub(_E2B, "gemma4_text"),
        norm_mean=0.5,
    ),
    (72, 73),
    (74, 75),
    "mel",
    BINS,
    2,
)
UNIFIED = Sound(
    Case(
        "gemma4-unified-sound",
        "Gemma4UnifiedForConditionalGeneration",
        {
            "text_config": _UNIFIED,
            "vision_config": {
                "patch_size": 2,
                "mm_embed_dim": 16,
                "mm_posemb_size": 8,
                "output_proj_dims": 16,
            },
            "audio_config": {"audio_embed_dim": 20},
            **_IDS,
        },
        _hub(_UNIFIED, "gemma4_unified_text"),
        norm_mean=0.5,
    ),
    (72, 73),
    (74, 75),
    "samples",
    20,
    5,
)
GEMMA3N_SOUND = Sound(
    Case(
        "gemma3n-sound",
        "Gemma3nForConditionalGeneration",
        {
            "text_config": TEXT_3N,
            "vision_config": VISION_3N,
            "audio_config": {
                "vocab_size": 8,
                "vocab_offset": 88,
                "hidden_size": 24,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 2,
                "sscp_conv_channel_size": [8, 4],
                "input_feat_size": BINS,
                "gradient_clipping": 1.5,
            },
            "vision_soft_tokens_per_image": 4,
            "audio_soft_tokens_per_image": 13,
            "boa_token_id": BEGIN_AUDIO,
            "boi_token_id": BEGIN_IMAGE,
            "eoi_token_id": 80,
            "image_token_id": 81,
            "eoa_token_id": 88,
            "audio_token_id": 89,
        },
        {"text_config": _3N_HUB, "torch_dtype": "float32", "dtype": DROP},
    ),
    (89, 88),
    (81, 80),
    "mel",
    BINS,
    4,
)
SOUNDS = (GEMMA4, UNIFIED, GEMMA3N_SOUND)
