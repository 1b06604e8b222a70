"""Architectures without a native definition: mlx-lm's model definition on mlxkv's caches.

mlx-lm is imported only when such a model is loaded. Layers that attend get mlxkv's caches; a
recurrent state is kept as mlx-lm makes it, and can go forward or start again, not back.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxkv.cache import KVCache, RotatingKVCache
from mlxkv.checkpoint.config import MAX_SIZE, Fields, text_config
from mlxkv.errors import ConfigError, UnsupportedModel, UsageError
from mlxkv.kv.layout import Cache, Caches, LayerCache, Mask, Positions, Slice
from mlxkv.kv.storage import Ragged, dense
from mlxkv.kv.types import CacheSpec, KVFormat
from mlxkv.nn.batch import BatchCache, batch
from mlxkv.nn.model import POSITIONS, CausalLM, Embedded, Media
from mlxkv.nn.shared_buffers import padded


def defines(model_type: str) -> bool:
    """Whether an installed mlx-lm has a definition; imports it only for a renamed type."""
    return _module_name(model_type) is not None


def _module_name(model_type: str) -> str | None:
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not model_type.isidentifier():
        return None
    folders = [Path(folder) / "models" for folder in spec.submodule_search_locations or ()]
    if any((folder / f"{model_type}.py").exists() for folder in folders):
        return model_type
    utils = importlib.import_module("mlx_lm.utils")
    return utils.MODEL_REMAPPING.get(model_type)


@dataclass(frozen=True)
class Config:
    """What mlxkv reads of a config; mlx-lm's own class reads the rest from `raw`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    raw: Mapping[str, Any]
    source: str

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Raises ConfigError where a size is missing."""
        fields = Fields(text_config(raw), source)
        context = (
            fields.opt_int("max_position_embeddings")
            or fields.opt_int("n_positions")
            or fields.opt_int("max_seq_len")
            or fields.opt_int("seq_length")
        )
        if context is None:
            context = MAX_SIZE  # a recurrent model names no limit, and has none
        return cls(
            model_type=str(raw["model_type"]),
            vocab_size=fields.int("vocab_size"),
            hidden_size=fields.opt_int("hidden_size") or fields.int("n_embd"),
            num_hidden_layers=fields.opt_int("num_hidden_layers") or fields.int("n_layer"),
            max_position_embeddings=context,
            # mlx-lm's definitions decide about their head themselves.
            tie_word_embeddings=False,
            raw=dict(raw),
            source=source,
        )


class OpaqueCache:
    """A state that only mlx-lm's layer understands: forward or from the start, never back."""

    spec: CacheSpec | None

    def __init__(self, spec: OpaqueSpec):
        self.spec = self.spec_of_state = spec
        self.reset()

    def reset(self) -> None:
        self.offset = 0
        self.inner = self.spec_of_state.new()

    @property
    def state(self) -> list[mx.array]:
        return [leaf for _, leaf in tree_flatten(self.inner.state) if isinstance(leaf, mx.array)]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    def __len__(self) -> int:
        return self.offset

    def mask(self, L: int) -> Mask:
        return None if L == 1 else "causal"

    def update(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        raise UsageError("this layer keeps a state of its own and takes no keys and values")

    def read(self, start: int, stop: int) -> Slice:
        raise UsageError("this layer keeps a state of its own and has no keys and values")

    @property
    def first(self) -> int:
        return self.offset

    def load(self, parts: Sequence[Slice], room: int = 0) -> None:
        raise UsageError("this layer keeps a state of its own and has no keys and values")

    def rewind(self, offset: int) -> bool:
        """True at the tip and for 0, which starts again; what lies between is gone."""
        if not 0 <= offset <= self.offset:
            raise UsageError(f"cannot rewind to {offset}: allowed is 0 to {self.offset}")
        if offset == 0:
            self.reset()
        return offset in (0, self.offset)


class PaddedCache:
    """A layer's caches of several sequences as mlx-lm's definitions want them: one array each of
    keys and values, padded at the end, and a mask.

    Sequences that share buffers (`batch(..., one_part=True)`) have that array already.

    Attributes:
        masked: whether the definition has asked for the mask, without which the padding is seen.
    """

    def __init__(self, layer: BatchCache):
        self._layer = layer
        self.masked = False

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token, or `[B]` of them."""
        offset = self._layer.offset
        return offset.array if isinstance(offset, Positions) else offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append a token to each sequence; keys `[B, H, S, k_dim]` of the longest S, and values."""
        k, v = self._layer.update(keys, values)
        return _in_one(k), _in_one(v)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Which of the padded rows each sequence's next token sees: bool `[B, 1, 1, S]`."""
        self.masked = True
        caches = self._layer.caches
        self._layer.mask(N)
        bounds = [c.max_size if isinstance(c, RotatingKVCache) else len(c) + 1 for c in caches]
        held = [min(len(c) + 1, bound) for c, bound in zip(caches, bounds, strict=True)]
        window = max(held) if window_size is None else window_size
        if len(set(held)) == 1 and held[0] <= window:
            return None
        rows, own = mx.arange(max(held))[None], mx.array(held)[:, None]
        return ((rows < own) & (rows >= own - window))[:, None, None]


def _in_one(kv: Ragged) -> mx.array:
    """Rows of all sequences `[B, H, S, D]`, padded to the longest S."""
    rows = [padded(dense(part), kv.shape[2]) for part in kv.parts]
    out = rows[0] if len(rows) == 1 else mx.concatenate(rows)
    return out if kv.order is None else mx.take(out, kv.order.back, axis=0)


def _merged(caches: Sequence[OpaqueCache]) -> Any:
    """The states of several sequences in one of mlx-lm's caches, a row each."""
    merged = caches[0].spec_of_state.new()
    states = zip(*(cache.inner.cache for cache in caches), strict=True)
    merged.cache = [mx.concatenate(list(parts)) for parts in states]
    return merged


class OpaqueSpec(CacheSpec):
    """The memory of a layer that keeps a state of its own."""

    __slots__ = ("_index", "_inner")

    def __init__(self, inner: nn.Module, index: int):
        CacheSpec.__init__(self, 0, 0, 0, None)
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_index", index)

    def new(self) -> Any:
        """mlx-lm's own cache for this layer."""
        return self._inner.make_cache()[self._index]

    def nbytes(self, n_tokens: int, kv: KVFormat) -> int:
        """Not known before the layer has run."""
        return 0

    def make(self) -> Cache:
        return OpaqueCache(self)


class Model(CausalLM):
    """mlx-lm's definition behind mlxkv's interface."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        module = importlib.import_module(f"mlx_lm.models.{_module_name(config.model_type)}")
        try:
            args = module.ModelArgs.from_dict(dict(config.raw))
            self.inner = module.Model(args)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigError(f"{config.source}: mlx-lm cannot use it ({error})") from error
        self._specs: list[CacheSpec | None] | None = None
        self._batches: bool | None = None

    def weights_root(self) -> nn.Module:
        return self.inner

    @property
    def mixes_dtypes(self) -> bool:
        """No: mlx-lm's layers go on in the dtype that a product has."""
        return False

    def cache_specs(self) -> list[CacheSpec | None]:
        """Shapes seen by tracing one token through the definition, with nothing computed."""
        if self._specs is None:
            caches = self._blank_caches()
            self._run(mx.zeros((1, 1), mx.int32), caches)
            self._specs = [_spec_of(cache) for cache in caches]
        return self._specs

    @property
    def batches(self) -> bool:
        """Whether the definition takes a batch: two sequences are traced, with nothing computed.

        One that makes its masks itself would see the padding.
        """
        if self._batches is None:
            self._batches = self._trace_batch()
        return self._batches

    @property
    def merges_adapters(self) -> bool:
        return False

    @property
    def one_part(self) -> bool:
        """True: a definition calls attention itself, once for all sequences."""
        return True

    def _trace_batch(self) -> bool:
        sequences = [self._blank_caches() for _ in range(2)]
        try:
            for n, caches in enumerate(sequences, start=1):
                self._run(mx.zeros((1, n), mx.int32), caches)
            # Nothing is moved: that would compute.
            lent = self._lent(batch(sequences, lambda n_bytes: False))
            self.inner(mx.zeros((2, 1), mx.int32), cache=lent)
        except Exception:  # foreign code may raise anything at all
            return False
        padded = [cache for cache in lent if isinstance(cache, PaddedCache)]
        return not padded or any(cache.masked for cache in padded)

    def _blank_caches(self) -> list[Cache]:
        if not hasattr(self.inner, "make_cache"):
            return [KVCache() for _ in self.inner.layers]
        return [self._own(cache, i) for i, cache in enumerate(self.inner.make_cache())]

    def _own(self, cache: Any, index: int) -> Cache:
        kind = type(cache).__name__
        if kind == "KVCache":
            return KVCache()
        if kind == "RotatingKVCache" and not getattr(cache, "keep", 0):
            return RotatingKVCache(cache.max_size)
        if kind in ("ArraysCache", "MambaCache"):
            return OpaqueCache(OpaqueSpec(self.inner, index))
        raise UnsupportedModel(
            f"{self.config.source}: mlx-lm's {self.config.model_type} keeps its KV in a {kind}, "
            f"which mlxkv has no cache for"
        )

    def _run(self, tokens: mx.array, caches: Sequence[LayerCache] | None) -> mx.array:
        if caches is None:
            return self.inner(tokens)
        lent = self._lent(caches)
        logits = self.inner(tokens, cache=lent)
        for cache, inner in zip(caches, lent, strict=True):
            if isinstance(cache, OpaqueCache):
                cache.offset += tokens.shape[1]
            elif isinstance(cache, BatchCache) and not isinstance(inner, PaddedCache):
                for i, opaque in enumerate(cache.caches):
                    assert isinstance(opaque, OpaqueCache)
                    opaque.inner.cache = [state[i : i + 1] for state in inner.cache]
                    opaque.offset += 1
        return logits

    def _lent(self, caches: Sequence[LayerCache]) -> list[Any]:
        """What mlx-lm's layers are given."""
        lent: list[Any] = []
        for cache in caches:
            if isinstance(cache, OpaqueCache):
                lent.append(cache.inner)
            elif isinstance(cache, BatchCache):
                opaque = [one for one in cache.caches if isinstance(one, OpaqueCache)]
                lent.append(_merged(opaque) if opaque else PaddedCache(cache))
            else:
                lent.append(cache)
        return lent

    def embed(self, tokens: mx.array, media: Media = ()) -> mx.array:
        raise self._is_one_piece()

    def forward(self, inputs: Embedded, caches: Caches, last_only: bool = False) -> mx.array:
        raise self._is_one_piece()

    def logits(self, hidden: mx.array) -> mx.array:
        raise self._is_one_piece()

    def _is_one_piece(self) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.config.source}: mlx-lm's {self.config.model_type} takes tokens and gives "
            "logits; embeddings and hidden states are not to be had of it"
        )

    def __call__(self, tokens: mx.array, caches: Caches = None, media: Media = ()) -> mx.array:
        return self._run(tokens, caches)

    def position_logits(
        self, tokens: mx.array, caches: Caches = None, media: Media = ()
    ) -> Iterator[mx.array]:
        whole = self._run(tokens, None)[0] if caches is None else None
        for i in range(0, tokens.shape[1], POSITIONS):
            positions = slice(i, i + POSITIONS)
            yield self._run(tokens[:, positions], caches)[0] if whole is None else whole[positions]

    def last_logits(self, tokens: mx.array, caches: Caches = None, media: Media = ()) -> mx.array:
        # A definition gives logits of every token it is given: those of a chunk that are not read
        # are never computed, so the last token goes by itself.
        if tokens.shape[1] > 1 and caches is not None:
            self._run(tokens[:, :-1], caches)
            tokens = tokens[:, -1:]
        return self._run(tokens, caches)[:, -1]


def _spec_of(cache: Cache) -> CacheSpec:
    if isinstance(cache, OpaqueCache) and cache.spec is not None:
        return cache.spec
    if not cache.state:
        return CacheSpec(0, 0, 0, None)
    k, v = cache.state
    window = cache.max_size if isinstance(cache, RotatingKVCache) else None
    return CacheSpec(k.shape[1], k.shape[3], v.shape[3], window)


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """mlx-lm's own renaming; what it drops is named."""
    model = Model(config)
    before = dict(weights)
    after = model.inner.sanitize(dict(before)) if hasattr(model.inner, "sanitize") else before
    kept = {id(array) for array in after.values()}
    skipped = [name for name, array in before.items() if id(array) not in kept]
    return after, skipped if len(after) <= len(before) - len(skipped) else []
