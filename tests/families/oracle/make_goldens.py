"""Make ../golden: what transformers (torch, CPU, float32) computes for the cases of cases.py.

    pip install -e '.[oracle]'
    python -m tests.families.oracle.make_goldens [CASE ...]

Each directory holds config.new.json and config.hub.json, manifest.json (names and shapes of the
tensors, the seed, how they were made) and golden.npz: prompt, positions, logits at those positions,
and 40 greedy tokens. Weights are not stored: tests/tiny.py makes them from the seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from tests.families.oracle.cases import CASES, DROP, Case
from tests.support.paths import GOLDEN
from tests.support.tiny import fingerprint, random_tensor

N_GREEDY = 40
# A step whose two best logits are closer than this (in standard deviations) could be decided by
# rounding: such a seed is passed over, and so is one whose answer says little.
MARGIN = 0.01
DISTINCT = 8
NOT_IN_CONFIG = ("transformers_version", "_name_or_path", "_attn_implementation_autoset")


def load(case: Case, config: dict[str, Any], stored: dict[str, np.ndarray]) -> Any:
    """The reference model, read from a checkpoint as a user's would be: no tensor missing."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        save_file(stored, Path(directory) / "model.safetensors", {"format": "pt"})
        model, info = getattr(transformers, case.architecture).from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    unexpected = {name for name in info["unexpected_keys"] if "inv_freq" not in name}
    unexpected -= set(case.extra)
    assert not info["missing_keys"] and not unexpected, (case.name, info)
    return model.eval()


def tensor_shapes(case: Case) -> dict[str, list[int]]:
    """Names and shapes of the reference's tensors, under the names the checkpoint gives them."""
    config = getattr(transformers, case.architecture).config_class(**case.config)
    with torch.device("meta"):
        model = getattr(transformers, case.architecture)(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = getattr(config, "text_config", config).tie_word_embeddings
    if tied and "lm_head.weight" in shapes:
        del shapes["lm_head.weight"]
    if case.per_expert:
        shapes = {k: v for name, shape in shapes.items() for k, v in split_experts(name, shape)}
    return {**shapes, **{name: list(shape) for name, shape in case.extra.items()}}


def split_experts(name: str, shape: list[int]) -> list[tuple[str, list[int]]]:
    """A tensor of all experts as the checkpoint has them, one by one; gate and up apart."""
    prefix, _, kind = name.rpartition(".experts.")
    if kind not in ("gate_up_proj", "down_proj"):
        return [(name, shape)]
    n_experts, rows, columns = shape
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return [
        (f"{prefix}.experts.{i}.{part}.weight", [rows // len(parts), columns])
        for i in range(n_experts)
        for part in parts
    ]


def checkpoint_name(case: Case, name: str) -> str:
    for ours, theirs in case.renamed.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def styles(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config as transformers writes it, and in the hub style."""
    config = getattr(transformers, case.architecture).config_class(**case.config)
    config.architectures = [case.architecture]
    config.dtype = "float32"
    new = json.loads(config.to_json_string(use_diff=False))
    for key in NOT_IN_CONFIG:
        new.pop(key, None)
    hub = {key: value for key, value in {**new, **case.hub}.items() if value is not DROP}
    return new, hub


@torch.no_grad()
def logits_of(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


@torch.no_grad()
def greedy(case: Case, model, prompt: list[int]) -> tuple[list[int], float]:
    """40 greedy tokens and the narrowest margin, in standard deviations.

    Every step computes the whole sequence anew, except where the frequencies depend on its length:
    there a cache keeps the keys as they were rotated, in the reference as in every engine.
    """
    tokens, margin, cache = list(prompt), np.inf, None
    for step in range(N_GREEDY):
        if case.prefill_in_one:
            given = tokens if step == 0 else tokens[-1:]
            out = model(torch.tensor([given]), past_key_values=cache, use_cache=True)
            last, cache = out.logits[0, -1], out.past_key_values
        else:
            last = logits_of(model, tokens)[-1]
        best = torch.topk(last, 2).values
        margin = min(margin, float((best[0] - best[1]) / last.std()))
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :], margin


def positions(n_prompt: int) -> list[int]:
    """Where logits are stored: both ends, around windows and steps, and a few between."""
    near = [0, 1, 2, 19, 20, 23, 24, 25, 31, 32, 33, 47, 48, 63, 64, 65, 128, 254, 255, 256, 257]
    far = [268, 269, 270, 271, 300, n_prompt - 3, n_prompt - 2, n_prompt - 1]
    return sorted({p for p in (*near, *far) if 0 <= p < n_prompt})


def make(case: Case) -> dict[str, Any]:
    """Write one directory; returns what is worth printing."""
    new, hub = styles(case)
    shapes = tensor_shapes(case)
    for seed in range(200):
        weights = {
            name: random_tensor(name, shape, seed, case.norm_mean) for name, shape in shapes.items()
        }
        prompt = np.random.RandomState(seed).randint(3, 96, case.n_prompt).tolist()
        stored = {checkpoint_name(case, name): array for name, array in weights.items()}
        model = load(case, new, stored)
        answer, margin = greedy(case, model, prompt)
        if margin > MARGIN and len(set(answer)) >= DISTINCT:
            break
    else:
        raise SystemExit(f"{case.name}: no seed gives clear greedy tokens")
    # A fresh model: frequencies that grew with the answer must not colour the prompt's logits.
    logits = logits_of(load(case, new, stored), prompt).numpy()
    difference = np.abs(logits_of(load(case, hub, stored), prompt).numpy() - logits).max()
    assert difference == 0, f"{case.name}: the hub style means something else ({difference})"

    kept = positions(case.n_prompt)
    directory = GOLDEN / case.name
    directory.mkdir(parents=True, exist_ok=True)
    for style, config in (("new", new), ("hub", hub)):
        (directory / f"config.{style}.json").write_text(json.dumps(config, indent=1) + "\n")
    manifest = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__},
        "seed": seed,
        "norm_mean": case.norm_mean,
        "prefill_in_one": case.prefill_in_one,
        "margin": round(margin, 4),
        "sha256": fingerprint(stored),
        # checkpoint's name -> the reference's, which the weights are made from
        "tensors": {checkpoint_name(case, n): [n, shape] for n, shape in shapes.items()},
    }
    text = json.dumps(manifest, indent=1)
    (directory / "manifest.json").write_text(text + "\n")
    np.savez_compressed(
        directory / "golden.npz",
        prompt=np.array(prompt, np.int32),
        positions=np.array(kept, np.int32),
        logits=logits[kept].astype(np.float32),
        std=np.float32(logits.std()),
        greedy=np.array(answer, np.int32),
    )
    return {"seed": seed, "margin": margin, "distinct": len(set(answer)), "std": logits.std()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tests/families/golden.")
    parser.add_argument("case", nargs="*", help="names of cases; all without one")
    wanted = parser.parse_args().case
    unknown = set(wanted) - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for case in CASES:
        if not wanted or case.name in wanted:
            facts = ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float | np.floating) else f"{k} {v}"
                for k, v in make(case).items()
            )
            print(f"{case.name:28} {facts}", flush=True)


if __name__ == "__main__":
    main()
