"""Make ../golden_adapters: what PEFT computes on transformers (torch, CPU, float32).

    pip install -e '.[oracle]' peft
    python -m tests.families.oracle.make_adapters [CASE ...]

Each case has NAME.json (PEFT's adapter_config.json, names and shapes of the tensors) and NAME.npz
(logits at `POSITIONS`). Neither weights nor tensors of adapters are stored: a seed makes them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import peft
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from tests.families.oracle.adapter_cases import (
    CASES_OF_ADAPTERS,
    FOLDER,
    POSITIONS,
    AdapterCase,
    tensor,
)
from tests.families.oracle.make_goldens import load, logits_of
from tests.support.paths import GOLDEN
from tests.support.tiny import random_tensor


def make(case: AdapterCase) -> str:
    model = load(case.case, *_base(case.base))
    plain = logits_of(model, case.prompt()).numpy()[list(POSITIONS)]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **case.config)).eval()
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shapes = {name: list(array.shape) for name, array in state.items()}
    made = {name: torch.tensor(tensor(name, shape)) for name, shape in shapes.items()}
    set_peft_model_state_dict(adapted, made)
    logits = logits_of(adapted, case.prompt()).numpy()[list(POSITIONS)]
    config: dict[str, Any] = adapted.peft_config["default"].to_dict()
    config = {key: _plain(value) for key, value in config.items()}
    config["base_model_name_or_path"] = "org/base"  # it was a temporary folder
    entry = {"made_with": {"peft": peft.__version__}, "config": config, "tensors": shapes}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{case.name}.json").write_text(json.dumps(entry) + "\n")
    np.savez_compressed(FOLDER / f"{case.name}.npz", logits=logits.astype(np.float32))
    return f"{len(shapes)} tensors, moved by {abs(logits - plain).max() / plain.std():.2f} std"


def _base(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and weights of a golden case."""
    manifest = json.loads((GOLDEN / name / "manifest.json").read_text())
    weights = {
        stored: random_tensor(reference, shape, manifest["seed"], manifest["norm_mean"])
        for stored, (reference, shape) in manifest["tensors"].items()
    }
    return json.loads((GOLDEN / name / "config.new.json").read_text()), weights


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, set):
        return sorted(value)
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


def main() -> None:
    torch.set_num_threads(1)
    for case in CASES_OF_ADAPTERS:
        if not sys.argv[1:] or case.name in sys.argv[1:]:
            print(f"{case.name:20} {make(case)}", flush=True)


if __name__ == "__main__":
    main()
