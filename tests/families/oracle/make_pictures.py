"""Make ../golden_media/*-pictures: what transformers (torch, CPU, float32) computes for them.

    python -m tests.families.oracle.make_pictures [CASE ...]

The rows of each picture, and for each prompt logits and 40 greedy tokens. Weights and pixels are
not stored. Masks are those of `generate`: for Gemma 4 12B a single forward pass makes others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from tests.families.oracle.make_goldens import (
    DISTINCT,
    N_GREEDY,
    checkpoint_name,
    load,
    styles,
    tensor_shapes,
)
from tests.families.oracle.pictures import (
    BEGIN,
    DIRECTORY,
    PICTURES,
    PROMPTS,
    SOFT,
    Pictures,
    kept_positions,
    weight,
)
from tests.support.tiny import fingerprint

MARGIN = 0.004
"""See make_goldens; here the answers of one seed to all prompts must have it."""


def features(pictures: Pictures, shown: Sequence[int]) -> dict[str, torch.Tensor]:
    """The pictures of a prompt as the processors batch them, padded to the largest."""
    data = [pictures.data(picture) for picture in shown]
    if not pictures.values:
        pixels = np.stack([each["pixels"] for each in data])
        return {"pixel_values": torch.tensor(pixels).permute(0, 3, 1, 2)}
    n = max(len(each["patches"]) for each in data)
    patches = np.zeros((len(data), n, pictures.values), np.float32)
    positions = np.full((len(data), n, 2), -1)
    for i, each in enumerate(data):
        patches[i, : len(each["patches"])] = each["patches"]
        positions[i, : len(each["patches"])] = each["positions"]
    return {
        "pixel_values": torch.tensor(patches),
        "image_position_ids": torch.tensor(positions),
    }


@torch.no_grad()
def rows_of(model: Any, pictures: Pictures, picture: int) -> np.ndarray:
    given = features(pictures, [picture])
    pixels = given.pop("pixel_values")
    return model.get_image_features(pixels, **given).pooler_output[0].numpy()


@torch.no_grad()
def logits_of(
    model: Any, pictures: Pictures, shown: Sequence[int], tokens: list[int]
) -> torch.Tensor:
    given: dict[str, Any] = {"input_ids": torch.tensor([tokens])}
    is_picture = (given["input_ids"] == SOFT).long()
    masks = {}
    if shown:
        given |= features(pictures, shown)
        key = "token_type_ids" if "gemma3" in pictures.case.name else "mm_token_type_ids"
        masks = {key: is_picture}
    given["attention_mask"] = model.create_masks_for_generate(
        model.config,
        torch.zeros(1, len(tokens), model.config.get_text_config().hidden_size),
        None,
        None,
        torch.arange(len(tokens))[None],
        **masks,
    )
    return model(**given, use_cache=False).logits[0]


def greedy(
    model: Any, pictures: Pictures, shown: Sequence[int], prompt: list[int]
) -> tuple[list[int], float]:
    """40 greedy tokens of text and the narrowest margin, in standard deviations."""
    tokens, margin = list(prompt), np.inf
    while len(tokens) < len(prompt) + N_GREEDY and margin > MARGIN:
        last = logits_of(model, pictures, shown, tokens)[-1, :BEGIN]
        best = torch.topk(last, 2).values
        margin = min(margin, float((best[0] - best[1]) / last.std()))
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :], margin


def make(pictures: Pictures) -> str:
    """Write one directory; returns what is worth printing."""
    case = pictures.case
    new, hub = styles(case)
    shapes = tensor_shapes(case)
    for seed in range(300):
        weights = {n: weight(n, shape, seed, case.norm_mean) for n, shape in shapes.items()}
        model = load(case, new, weights)
        answers: dict[str, list[int]] = {}
        for name, prompt in PROMPTS.items():
            tokens = prompt.tokens(pictures, seed)
            answers[name], margin = greedy(model, pictures, prompt.pictures, tokens)
            if margin <= MARGIN or len(set(answers[name])) < DISTINCT:
                break
        else:
            break
    else:
        raise SystemExit(f"{case.name}: no seed gives clear greedy tokens")
    stored = {checkpoint_name(case, name): array for name, array in weights.items()}
    other = load(case, hub, stored)
    arrays: dict[str, np.ndarray] = {}
    for i in range(len(pictures.sizes)):
        arrays[f"rows.{i}"] = rows_of(model, pictures, i)
    for name, prompt in PROMPTS.items():
        tokens = prompt.tokens(pictures, seed)
        logits = logits_of(model, pictures, prompt.pictures, tokens).numpy()
        again = logits_of(other, pictures, prompt.pictures, tokens).numpy()
        assert np.abs(again - logits).max() == 0, "the hub style means something else"
        arrays[f"{name}.logits"] = logits[kept_positions(len(tokens))]
        arrays[f"{name}.std"] = np.float32(logits.std())
        arrays[f"{name}.greedy"] = np.array(answers[name], np.int32)
    directory = DIRECTORY / case.name
    directory.mkdir(parents=True, exist_ok=True)
    manifest = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__},
        "seed": seed,
        "sha256": fingerprint(weights),
        "tensors": shapes,
    }
    for name, content in (("config.new", new), ("config.hub", hub), ("manifest", manifest)):
        (directory / f"{name}.json").write_text(json.dumps(content) + "\n")
    np.savez_compressed(directory / "golden.npz", **arrays)
    return f"seed {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the goldens with pictures.")
    parser.add_argument("case", nargs="*", help="names of cases; all without one")
    wanted = parser.parse_args().case
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for pictures in PICTURES:
        if not wanted or pictures.case.name in wanted:
            print(f"{pictures.case.name:28} {make(pictures)}", flush=True)


if __name__ == "__main__":
    main()
