"""The adapters that `make_adapters.py` stores logits of, on cases of `cases.py`. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.families.oracle.cases import CASES, Case
from tests.support.paths import GOLDEN
from tests.support.tiny import random_tensor

FOLDER: Path = GOLDEN.parent / "golden_adapters"
POSITIONS = (0, 1, 19, 33, 48)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True, eq=False)
class AdapterCase:
    """One adapter.

    Args:
        name: of its files.
        base: name of its case.
        config: arguments of PEFT's `LoraConfig`.
    """

    name: str
    base: str
    config: Mapping[str, Any]

    @property
    def case(self) -> Case:
        return next(case for case in CASES if case.name == self.base)

    def prompt(self) -> list[int]:
        return np.random.RandomState(7).randint(3, 96, 49).tolist()


def tensor(name: str, shape: list[int]) -> np.ndarray:
    """One tensor of an adapter: as strong as the weights it is added to; norms are near 1."""
    if name.endswith("magnitude_vector"):
        return 1 + abs(random_tensor(name, shape, 5, 1.0))
    return random_tensor(name, shape, 5, 1.0)


LORA = {"r": 4, "lora_alpha": 4}
ALL = {**LORA, "target_modules": "all-linear"}
TEXT = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
CASES_OF_ADAPTERS = (
    AdapterCase("llama-all", "llama-biases", ALL),
    AdapterCase("llama-head", "llama-gqa", {**LORA, "target_modules": ["v_proj", "lm_head"]}),
    AdapterCase(
        "llama-rslora",
        "llama-tied",
        {**LORA, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "up_proj"]},
    ),
    AdapterCase(
        "llama-patterns",
        "llama-gqa",
        {
            **LORA,
            "target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "rank_pattern": {"o_proj": 2, "layers.2.self_attn.q_proj": 7},
            "alpha_pattern": {"down_proj": 9, "layers.0.mlp.(gate|up)_proj": 1},
            "layers_to_transform": [0, 2],
        },
    ),
    AdapterCase("llama-dora", "llama-biases", {**ALL, "use_dora": True}),
    AdapterCase(
        "gemma-embedding", "gemma-untied", {**LORA, "target_modules": ["embed_tokens", "v_proj"]}
    ),
    AdapterCase("gemma2", "gemma2-text", ALL),
    AdapterCase("gemma3", "gemma3-multimodal-new", {**LORA, "target_modules": TEXT}),
    AdapterCase("gemma3n", "gemma3n-text", ALL),
    AdapterCase("gemma4-moe", "gemma4-moe", {**ALL, "target_parameters": [e[4:] for e in EXPERTS]}),
    AdapterCase("glm4-dora", "glm4-plain", {**ALL, "use_dora": True}),
    AdapterCase("glm4-moe", "glm4-moe-plain", {**ALL, "target_parameters": EXPERTS}),
    AdapterCase("glm4-moe-lite", "glm4-moe-lite-plain", {**ALL, "target_parameters": EXPERTS}),
    AdapterCase("gpt-oss", "gpt-oss-plain", {**ALL, "target_parameters": EXPERTS}),
)
