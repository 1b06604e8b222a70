"""Make ../golden_media/*-sound: what transformers (torch, CPU, float32) computes for sound.py.

    python -m tests.families.oracle.make_sound [CASE ...]

The rows of clips of many lengths, each alone, and for each prompt logits and 40 greedy tokens.
Weights, frames and pixels are not stored. Gemma 3n needs timm.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
import transformers

from tests.families.oracle.make_goldens import (
    DISTINCT,
    MARGIN,
    N_GREEDY,
    load,
    styles,
    tensor_shapes,
)
from tests.families.oracle.sound import (
    DIRECTORY,
    KEPT,
    LONGEST,
    SOUNDS,
    Prompt,
    Sound,
    kept_positions,
    picture,
    prompts,
    weight,
)
from tests.support.tiny import fingerprint


def features(sound: Sound, clips: list[int]) -> dict[str, torch.Tensor]:
    """The clips of a prompt as the processors batch them: padded to the longest, with a mask."""
    n = max(clips)
    frames, mask = np.zeros((len(clips), n, sound.width), np.float32), np.zeros((len(clips), n))
    for i, length in enumerate(clips):
        frames[i, :length], mask[i, :length] = sound.clip(length), 1
    return {
        "input_features": torch.tensor(frames),
        "input_features_mask": torch.tensor(mask, dtype=torch.bool),
    }


def inputs(sound: Sound, prompt: Prompt, tokens: list[int]) -> dict[str, Any]:
    """The reference's arguments."""
    given: dict[str, Any] = {"input_ids": torch.tensor([tokens])}
    if prompt.clips:
        given |= features(sound, prompt.clips)
    shown = [picture(sound, i) for i in range(prompt.n_pictures)]
    if shown and "pixels" in shown[0]:
        pixels = np.stack([each["pixels"] for each in shown])
        given["pixel_values"] = torch.tensor(pixels).permute(0, 3, 1, 2)
    elif shown:
        given["pixel_values"] = torch.tensor(np.stack([each["patches"] for each in shown]))
        positions = np.stack([each["positions"] for each in shown])
        given["image_position_ids"] = torch.tensor(positions).long()
    if not sound.case.architecture.startswith("Gemma3n"):
        kinds = torch.zeros(1, len(tokens), dtype=torch.long)
        kinds[given["input_ids"] == sound.image[0]] = 1
        kinds[given["input_ids"] == sound.audio[0]] = 3
        given["mm_token_type_ids"] = kinds
    return given


@torch.no_grad()
def logits_of(model: Any, sound: Sound, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    if sound.case.architecture.startswith("Gemma3n") and len(set(prompt.clips)) > 1:
        return _clips_apart(model, sound, prompt, tokens)
    given = inputs(sound, prompt, tokens)
    if sound.case.architecture.startswith("Gemma4Unified"):
        # Its bare forward pass lets pictures see themselves both ways in full layers too;
        # `generate`, which all its users call, gives it these masks.
        text = model.config.text_config
        given["attention_mask"] = model.create_masks_for_generate(
            model.config,
            torch.zeros(1, len(tokens), text.hidden_size),
            None,
            None,
            torch.arange(len(tokens))[None],
            mm_token_type_ids=given["mm_token_type_ids"],
        )
    return model(**given, use_cache=False).logits[0]


def _clips_apart(model: Any, sound: Sound, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    """Gemma 3n's convolutions see a batch's padding: each clip is encoded alone, as it is sent."""
    whole = inputs(sound, prompt, tokens)
    outer = model.model
    rows = [heard(model, sound, n) for n in prompt.clips]
    known = outer.get_audio_features

    def together(*args: Any, **kwargs: Any) -> Any:
        out = known(*args, **kwargs)
        out.pooler_output = torch.stack(rows)
        out.audio_mel_mask = torch.zeros(out.pooler_output.shape[:2], dtype=torch.bool)
        return out

    outer.get_audio_features = together
    try:
        return model(**whole, use_cache=False).logits[0]
    finally:
        del outer.get_audio_features


@torch.no_grad()
def heard(model: Any, sound: Sound, n_frames: int) -> torch.Tensor:
    """The rows of one clip alone, as they are put among the embeddings."""
    given = features(sound, [n_frames])
    captured = []
    embeddings = model.get_input_embeddings()
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: captured.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    n = sound.n_rows(n_frames)
    tokens = torch.tensor([[sound.audio[0]] * n])
    try:
        model(input_ids=tokens, **given, use_cache=False)
    finally:
        handle.remove()
    assert embeddings is not None and captured[0].shape[1] == n
    return captured[0][0]


def greedy(model: Any, sound: Sound, prompt: Prompt) -> tuple[list[int], float]:
    """40 greedy tokens and the narrowest margin, in standard deviations; a medium's own token is
    no answer that the reference could go on from.
    """
    tokens, margin = list(prompt.tokens), np.inf
    config = sound.case.config
    media = {config[f"{kind}_token_id"] for kind in ("image", "audio")} | {
        config.get("video_token_id")
    }
    for _ in range(N_GREEDY):
        last = logits_of(model, sound, prompt, tokens)[-1]
        best = torch.topk(last, 2).values
        margin = min(margin, float((best[0] - best[1]) / last.std()))
        tokens.append(int(last.argmax()))
        if tokens[-1] in media or margin < MARGIN:
            return [], 0.0
    return tokens[len(prompt.tokens) :], margin


def clear_answer(model: Any, sound: Sound, name: str) -> tuple[int, list[int], float]:
    """The first seed of a prompt whose answer rounding does not decide; answer and margin."""
    for seed in range(400):
        answer, margin = greedy(model, sound, prompts(sound, seed)[name])
        if len(set(answer)) >= DISTINCT:
            return seed, answer, margin
    raise SystemExit(f"{sound.case.name}, {name}: no seed gives clear greedy tokens")


def make(sound: Sound) -> None:
    """Write one directory."""
    case = sound.case
    new, hub = styles(case)
    for part in (new, *(value for value in new.values() if isinstance(value, dict))):
        for key in ("id2label", "label2id"):
            part.pop(key, None)
            hub.pop(key, None)
    shapes = tensor_shapes(case)
    weights = {name: weight(name, shape, 0, case.norm_mean) for name, shape in shapes.items()}
    model, other = load(case, new, weights), load(case, hub, weights)
    arrays: dict[str, np.ndarray] = {}
    margins = []
    for name in prompts(sound, 0):
        seed, answer, margin = clear_answer(model, sound, name)
        margins.append(margin)
        prompt = prompts(sound, seed)[name]
        logits = logits_of(model, sound, prompt, prompt.tokens)
        same = torch.equal(logits_of(other, sound, prompt, prompt.tokens), logits)
        assert same, f"{case.name}: the hub style means something else"
        arrays[f"seed.{name}"] = np.int32(seed)
        arrays[f"logits.{name}"] = logits.numpy()[kept_positions(prompt.tokens)]
        arrays[f"std.{name}"] = np.float32(logits.std())
        arrays[f"greedy.{name}"] = np.array(answer, np.int32)
    for n in sound.lengths:
        arrays[f"rows.{n}"] = heard(model, sound, n).numpy()
    if not case.architecture.startswith("Gemma3n"):
        arrays["rows.longest"] = heard(model, sound, LONGEST).numpy()[::KEPT]
    directory = DIRECTORY / case.name
    directory.mkdir(parents=True, exist_ok=True)
    for style, config in (("new", new), ("hub", hub)):
        (directory / f"config.{style}.json").write_text(json.dumps(config, indent=1) + "\n")
    manifest = {
        "made_with": {package.__name__: package.__version__ for package in (transformers, torch)},
        "margin": round(min(margins), 4),
        "sha256": fingerprint(weights),
        "tensors": shapes,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest) + "\n")
    np.savez_compressed(directory / "golden.npz", **arrays)
    print(f"{case.name}: margin {min(margins):.3g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the goldens with sound.")
    parser.add_argument("case", nargs="*", help="names of cases; all without one")
    wanted = parser.parse_args().case
    torch.set_num_threads(1)
    for sound in SOUNDS:
        if not wanted or sound.case.name in wanted:
            make(sound)


if __name__ == "__main__":
    main()
