"""Write what transformers computes for `assistant_cases`; run as a module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families.oracle.assistant_cases import (
    CASES,
    FULL,
    N_HELD,
    SLIDING,
    config,
    inputs,
    weights,
)

FOLDER = Path(__file__).parent.parent / "golden_assistant"


def outputs(case: str) -> dict[str, np.ndarray]:
    """Logits and hidden states of a draft, one guess behind the other, in float64."""
    raw = config(case)
    parsed = AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager").double().eval()
    given = {name: torch.tensor(a) for name, a in weights(case).items()}
    missing, unknown = model.load_state_dict(given, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    model.tie_weights()
    x = {name: torch.tensor(a, dtype=torch.float64) for name, a in inputs().items()}
    kv = {kind: (x[f"{kind}.k"], x[f"{kind}.v"]) for kind in (FULL, SLIDING)}
    hidden, found = x["hidden"], []
    with torch.no_grad():
        for embedding in x["embeddings"]:
            out = model(
                inputs_embeds=torch.cat([embedding, hidden], dim=-1),
                position_ids=torch.tensor([[N_HELD]]),
                shared_kv_states=kv,
                use_cache=False,
            )
            hidden = out.last_hidden_state
            found.append((out.logits.numpy(), hidden.numpy()))
    logits, states = (np.concatenate(each) for each in zip(*found, strict=True))
    return {"logits": logits.astype(np.float32), "hidden": states.astype(np.float32)}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        np.savez_compressed(FOLDER / f"{case}.npz", **outputs(case))
