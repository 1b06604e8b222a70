"""Models of mlx-community for our own families, for searches without a network.

Sizes are rounded and memory is an estimate; `mlxkv plan NAME` computes it once there is a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WORKSPACE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A repository, and what it takes.

    Args:
        name: `org/name`.
        model_type: of its config.json.
        weights_bytes: its download.
        kv_bytes_per_token: in 16 bits, of the layers that see everything.
        window_bytes: of the layers with a window, once that is full.
    """

    name: str
    model_type: str
    weights_bytes: int
    kv_bytes_per_token: int
    window_bytes: int = 0

    def needs(self, context: int) -> int:
        """Bytes for one sequence of that many tokens, about: weights, KV and a tenth for work."""
        kv = self.kv_bytes_per_token * context + self.window_bytes
        return round(self.weights_bytes * (1 + _WORKSPACE_SHARE)) + kv


def _known(
    name: str, model_type: str, gigabytes: float, kv: int, window_megabytes: int = 0
) -> KnownModel:
    weights, window = round(gigabytes * 1e9), window_megabytes * 10**6
    return KnownModel(f"mlx-community/{name}", model_type, weights, kv, window)


KNOWN = (
    _known("SmolLM2-135M-Instruct", "llama", 0.27, 23_040),
    _known("SmolLM2-360M-Instruct", "llama", 0.72, 40_960),
    _known("SmolLM2-1.7B-Instruct-4bit", "llama", 0.96, 196_608),
    _known("Llama-3.2-1B-Instruct-4bit", "llama", 0.70, 32_768),
    _known("Llama-3.2-3B-Instruct-4bit", "llama", 1.81, 114_688),
    _known("Meta-Llama-3.1-8B-Instruct-4bit", "llama", 4.52, 131_072),
    _known("Meta-Llama-3.1-8B-Instruct-8bit", "llama", 8.54, 131_072),
    _known("Llama-3.3-70B-Instruct-4bit", "llama", 39.7, 327_680),
    _known("Mistral-7B-Instruct-v0.3-4bit", "mistral", 4.08, 131_072),
    _known("Mistral-Nemo-Instruct-2407-4bit", "mistral", 6.89, 163_840),
    _known("gemma-2-2b-it-4bit", "gemma2", 1.47, 53_248, 218),
    _known("gemma-2-9b-it-4bit", "gemma2", 5.20, 172_032, 705),
    _known("gemma-2-27b-it-4bit", "gemma2", 15.3, 188_416, 772),
    _known("gemma-3-1b-it-4bit", "gemma3_text", 0.73, 4_096, 12),
    _known("gemma-3-4b-it-4bit", "gemma3", 3.40, 20_480, 122),
    _known("gemma-3-12b-it-4bit", "gemma3", 8.07, 65_536, 336),
    _known("gemma-3-27b-it-qat-4bit", "gemma3", 16.9, 81_920, 436),
    _known("gemma-3n-E4B-it-lm-4bit", "gemma3n", 3.90, 8_192, 17),
    _known("gemma-4-e2b-it-4bit", "gemma4", 3.60, 6_144, 13),
    _known("gemma-4-e4b-it-4bit", "gemma4", 5.20, 16_384, 42),
    _known("gemma-4-26b-a4b-it-4bit", "gemma4", 15.6, 20_480, 210),
    _known("gemma-4-31b-it-4bit", "gemma4", 18.4, 81_920, 839),
    _known("GLM-4-9B-0414-4bit", "glm4", 5.30, 40_960),
    _known("GLM-4-32B-0414-4bit", "glm4", 18.3, 62_464),
    _known("GLM-4.5-Air-4bit", "glm4_moe", 60.2, 188_416),
    _known("GLM-4.7-Flash-4bit", "glm4_moe_lite", 16.9, 54_144),
    _known("gpt-oss-20b-MXFP4-Q8", "gpt_oss", 12.1, 24_576, 3),
    _known("gpt-oss-120b-MXFP4-Q8", "gpt_oss", 63.4, 36_864, 5),
)


def matching(words: Sequence[str]) -> list[KnownModel]:
    """The known models whose name or type has all these words, in any case."""
    wanted = [word.lower() for word in words]
    return [
        model
        for model in KNOWN
        if all(word in f"{model.name} {model.model_type}".lower() for word in wanted)
    ]
