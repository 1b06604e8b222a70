"""mlxkv: language models on Apple silicon through MLX, with the KV cache as the product.

    import mlxkv
    llm = mlxkv.load("smollm2:135m")
    for chunk in llm.stream([{"role": "user", "content": "Why is the sky blue?"}]):
        print(chunk.text, end="", flush=True)

Importing the package is light; MLX is imported when the first name that needs it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxkv.base.device import load_blas
from mlxkv.errors import MlxkvError

if TYPE_CHECKING:
    from mlxkv.cache import KVCache, RotatingKVCache, make_caches
    from mlxkv.generation.outputs import Chunk, Result, Stats
    from mlxkv.llm.conversation import Conversation
    from mlxkv.llm.llm import LLM, load
    from mlxkv.llm.plan import plan
    from mlxkv.memory.plan import Plan
    from mlxkv.models.loader import load_model

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Chunk",
    "Conversation",
    "KVCache",
    "MlxkvError",
    "Plan",
    "Result",
    "RotatingKVCache",
    "Stats",
    "__version__",
    "load",
    "load_model",
    "make_caches",
    "plan",
]

_HOMES = {
    "KVCache": "cache",
    "RotatingKVCache": "cache",
    "make_caches": "cache",
    "LLM": "llm.llm",
    "Chunk": "generation.outputs",
    "Conversation": "llm.conversation",
    "Result": "generation.outputs",
    "Stats": "generation.outputs",
    "load": "llm.llm",
    "load_model": "models.loader",
    "Plan": "memory.plan",
    "plan": "llm.plan",
}

# Has to come before anything imports mlx.core, and importing mlxkv.anything passes here.
load_blas()


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mlxkv' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"mlxkv.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
