"""mlx-lm's definitions, caches and samplers for the same models, to be counted beside ours."""

from __future__ import annotations

import importlib.util
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tests.metal import shim
from tests.metal.hollow import AFFINE4, MXFP4, arrays_in, hollow_out, settle, tokens
from tests.metal.proportions import Config

CHUNK = 2048


def installed() -> bool:
    """Whether mlx-lm is."""
    return importlib.util.find_spec("mlx_lm") is not None


def model(config: Config, dtype: mx.Dtype, quantized: bool) -> Any:
    """mlx-lm's model, quantized as its own conversion does it."""
    from mlx_lm.utils import _get_classes

    kind, arguments = _get_classes(_as_known(config))
    built = kind(arguments.from_dict(_as_known(config)))
    hollow_out(built, dtype)
    if quantized:
        own = getattr(built, "quant_predicate", None)

        def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
            if not hasattr(module, "to_quantized") or module["weight"].shape[-1] % 64:
                return False
            if config["model_type"] == "gpt_oss" and "experts" in path:
                return MXFP4
            wanted = True if own is None else own(path, module)
            return {**AFFINE4, **wanted} if isinstance(wanted, dict) else wanted and AFFINE4

        nn.quantize(built, class_predicate=predicate)
        hollow_out(built, dtype)
    built.eval()
    mx.eval(arrays_in(built))
    return built


def _as_known(config: Config) -> dict[str, Any]:
    """The config under a type that mlx-lm knows."""
    raw = dict(config)
    if raw["model_type"] == "ministral":
        return raw | {"model_type": "llama"}
    if raw["model_type"] == "gemma3n_text":
        return {"model_type": "gemma3n", "text_config": raw}
    return raw


def prefilled(model: Any, n_tokens: int, batch: int | None = None) -> list[Any]:
    """Caches of one sequence, or of a batch of equal ones, that hold a prompt."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(model)
    if batch is not None:
        caches = [_batched(cache, batch) for cache in caches]
    for start in range(0, n_tokens, CHUNK):
        with shim.gpu():
            model(tokens(batch or 1, min(CHUNK, n_tokens - start)), cache=caches)
        settle(caches, model)
    return caches


def _batched(cache: Any, batch: int) -> Any:
    from mlx_lm.models.cache import (
        BatchKVCache,
        BatchRotatingKVCache,
        CacheList,
        RotatingKVCache,
    )

    if isinstance(cache, CacheList):
        return CacheList(*[_batched(part, batch) for part in cache.caches])
    if isinstance(cache, RotatingKVCache):
        return BatchRotatingKVCache(cache.max_size, [0] * batch)
    return BatchKVCache([0] * batch)


def last_logits(model: Any, ids: mx.array, caches: list[Any]) -> mx.array:
    """Logits `[B, V]` of the last token, as generate_step takes them."""
    return model(ids, cache=caches)[:, -1]


def sampled(logits: mx.array, **settings: Any) -> list[mx.array]:
    """What a decode step evaluates of sampling: the token and the log-probabilities."""
    from mlx_lm.sample_utils import make_sampler

    sampler = make_sampler(**settings)
    logprobs = logits - mx.logsumexp(logits, keepdims=True)
    return [sampler(logprobs), logprobs.squeeze(0)]
