"""The interface of every family: tokens to hidden states to logits, over caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.kv.layout import Caches, LayerCache, Mask, two_way_mask, windowed_mask
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.encoders import Waiting
from mlxkv.nn.fused import VECTOR_QUERIES
from mlxkv.nn.rope import RoPE

POSITIONS = 64
"""Positions whose logits are held at once, where those of all are wanted: `[64, V]`."""


class Placed(NamedTuple):
    """Rows of a picture or of sound among the embeddings of tokens.

    Args:
        kind: see `mlxkv.media.types`.
        start: index of the first among the tokens of this call.
        rows: `[n, E]`, from `CausalLM.media_rows`.
    """

    kind: str
    start: int
    rows: mx.array


Media = Sequence[Placed]
"""In order and apart, all of them within the tokens of the call, whose B is 1."""


class Embedded(NamedTuple):
    """The layers' input; see `CausalLM.hidden`."""

    x: mx.array
    per_layer: mx.array | None
    media: Media


def placed(x: mx.array, media: Media) -> mx.array:
    """Embeddings `[1, L, E]` with the rows of media in their places."""
    parts, at = [], 0
    for _, start, rows in media:
        parts += [x[:, at:start], rows[None].astype(x.dtype)]
        at = start + rows.shape[0]
    return mx.concatenate([*parts, x[:, at:]], axis=1) if parts else x


def blanked(tokens: mx.array, media: Media, token: int) -> mx.array:
    """Tokens `[1, L]` with this one in the places of media."""
    parts, at = [], 0
    for _, start, rows in media:
        parts += [tokens[:, at:start], mx.full((1, rows.shape[0]), token, tokens.dtype)]
        at = start + rows.shape[0]
    return mx.concatenate([*parts, tokens[:, at:]], axis=1) if parts else tokens


def attention_masks(
    windows: Sequence[int | None],
    caches: Sequence[LayerCache] | None,
    L: int,
    runs: Sequence[tuple[int, int]] = (),
    *,
    sliding_only: bool = False,
) -> dict[int | None, Mask]:
    """Window -> mask for `attend`, for the next L tokens.

    Args:
        windows: the window of each layer that owns KV, None for all tokens.
        caches: their caches in the same order; None for one pass over a whole sequence.
        L: new tokens.
        runs: of those, the first of each run of tokens that see each other both ways, within what
            a window holds before them, and the one behind its last (`CausalLM.two_way_runs`).
        sliding_only: whether they do in layers with a window only.
    """
    kinds: dict[int | None, Mask] = dict.fromkeys(windows)
    if L == 1:
        return kinds
    first = dict(zip(reversed(windows), reversed(caches), strict=True)) if caches else {}
    for window in kinds:
        if runs and (window is not None or not sliding_only):
            kinds[window] = two_way_mask(L, _n_before(caches, window), window, runs)
        elif caches is not None:
            kinds[window] = first[window].mask(L)
        elif window is None or L <= window:
            kinds[window] = "causal"
        else:
            kinds[window] = windowed_mask(L, 0, window)
        if kinds[window] == "causal" and L <= VECTOR_QUERIES and not device.on_cpu():
            kinds[window] = _causal(L, _n_before(caches, window))
    return kinds


def _causal(L: int, n_before: int) -> mx.array:
    """The causal mask `[L, n_before + L]` of few tokens, made once.

    Metal's kernel for few queries takes it or the word; where attention is not one kernel, the word
    has each layer make it, by three kernels.
    """
    return mx.arange(n_before + L)[None] <= mx.arange(n_before, n_before + L)[:, None]


def _n_before(caches: Sequence[LayerCache] | None, window: int | None) -> int:
    """Keys before a chunk's in what a cache of this window returns."""
    if not caches:
        return 0
    offset = caches[0].offset
    assert isinstance(offset, int), "media are given to one sequence at a time"
    return offset if window is None else min(offset, window - 1)


class Predictor(Protocol):
    """What a model has to guess tokens with, from the hidden states that tokens are chosen from.

    Attributes:
        spec: of the keys and values that it keeps, one layer's, a row for each pair of a token and
            a hidden state.
    """

    @property
    def spec(self) -> CacheSpec: ...

    def hidden(self, tokens: mx.array, hidden: mx.array, cache: LayerCache | None) -> mx.array:
        """What stands for the hidden states of tokens, `[B, L, E]`.

        Args:
            tokens: `[B, L]`, behind those that the cache has.
            hidden: `[B, L, E]`, that they were chosen from: of the model, or of this.
            cache: of `spec`; None for a whole sequence.
        """
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, V]` of what follows, from `hidden`."""
        ...


class Reader(Protocol):
    """What a model has to guess tokens with, from its own keys and values."""

    def keys_values(self, caches: Sequence[Any]) -> Sequence[Any]:
        """What guesses read of a sequence's caches."""
        ...

    def guess(
        self, token: mx.array, hidden: mx.array, kv: Sequence[Any], position: int
    ) -> tuple[mx.array, mx.array]:
        """What stands for a token's hidden state, `[1, 1, E]`, and logits `[1, 1, V]` behind it.

        Args:
            token: `[1, 1]`.
            hidden: `[1, 1, E]`, that it was chosen from: of the model, or of this.
            kv: from `keys_values`.
            position: of the first token of the draft's making, behind what the caches hold.
        """
        ...


class CausalLM(nn.Module):
    """A model as the engine sees it.

    A family's `Model` sets `config` and has `embed`, `forward`, `logits` and `cache_specs`. Only
    `embed` and `embed_per_layer` read token ids, so that embeddings of other media can stand among
    those of tokens.

    Attributes:
        compute_dtype: of the computation and of native KV; the loader sets it.
        waiting: encoders whose weights are not in memory yet; the loader sets it.
        adapter_key: names the adapters that change it, see `models.adapters`; "" without one.
        adapted_from: the model without them, whose other arrays it shares; None if there is none.
    """

    config: Any
    compute_dtype: mx.Dtype = mx.float32
    waiting: Waiting | None = None
    adapter_key: str = ""
    adapted_from: CausalLM | None = None

    @property
    def plain(self) -> CausalLM:
        """The model that it is made of, itself without adapters: `merge_changes` joins models of
        one."""
        return self if self.adapted_from is None else self.adapted_from

    @property
    def merges_adapters(self) -> bool:
        """Whether rows of a step may have different adapters (`nn.lora_rows`)."""
        return True

    @property
    def batches(self) -> bool:
        """Whether `last_logits` takes several sequences of different lengths (`batch.batch`)."""
        return True

    @property
    def n_dimensions(self) -> int:
        """Values of the vector that it makes of a text; 0 for a model that writes."""
        return 0

    @property
    def one_part(self) -> bool:
        """Whether a batch's keys must be one array, the short sequences padded."""
        return False

    def weights_root(self) -> nn.Module:
        """The module whose parameters have the checkpoint's names."""
        return self

    @property
    def mixes_dtypes(self) -> bool:
        """Whether products with quantized weights may be computed in a wider dtype."""
        return True

    @property
    def overflows_float16(self) -> bool:
        """Whether it must not be computed in float16."""
        return False

    def keeps_dtype(self, name: str) -> bool:
        """Whether this tensor stays in the checkpoint's dtype."""
        return False

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer; None where a layer reads another layer's KV."""
        raise NotImplementedError

    def predictor(self) -> Predictor | None:
        """What guesses its next tokens; None where its weights hold nothing of the kind."""
        return None

    def reader(self) -> Reader | None:
        """As `predictor`, for what reads the model's own keys and values."""
        return None

    @property
    def stable_tokens(self) -> int | None:
        """Length up to which the KV of a token does not depend on what follows it; None for any.

        Rotary embeddings that stretch with the sequence rotate every key anew past their context.
        """
        limits = [module.stable_tokens for module in self.modules() if isinstance(module, RoPE)]
        return min((n for n in limits if n is not None), default=None)

    @property
    def media_kinds(self) -> frozenset[str]:
        """What it takes beside text: of `mlxkv.media.types.KINDS`, those whose encoders it has."""
        return frozenset()

    @property
    def two_way_kinds(self) -> frozenset[str]:
        """Kinds of media whose rows see each other both ways: no chunk ends inside one."""
        return frozenset()

    def waiting_bytes(self, kind: str | None = None) -> int:
        """Bytes that `load_encoder` will take for one kind of media, or for all."""
        return self.waiting.nbytes(kind) if self.waiting is not None else 0

    def load_encoder(self, kind: str) -> None:
        """Bring what `media_rows` of this kind needs into memory, unless it is there.

        Raises:
            CheckpointError: the model's files are not the ones that it was loaded from.
        """
        if self.waiting is not None:
            self.waiting.load(self, kind)

    def two_way_runs(self, media: Media) -> list[tuple[int, int]]:
        """Where media of `two_way_kinds` begin and end among the tokens of a call."""
        kinds = self.two_way_kinds if media else ()
        return [(at, at + rows.shape[0]) for kind, at, rows in media if kind in kinds]

    def media_rows(self, kind: str, data: Mapping[str, mx.array]) -> mx.array:
        """Lazy rows `[n, E]` of one picture or piece of sound, from the encoder's arrays.

        Args:
            kind: one of `media_kinds`; its encoder is in memory (`load_encoder`).
            data: of one `mlxkv.media.types.Medium`.
        """
        raise NotImplementedError

    def embed(self, tokens: mx.array, media: Media = ()) -> mx.array:
        """The first layer's input for tokens `[B, L]`: `[B, L, E]`, scaled where the family does.

        Args:
            tokens: where media stand, any token: the rows replace its embedding.
            media: rows to put in their places.

        Raises:
            UnsupportedModel: the definition is mlx-lm's, which takes tokens only.
        """
        raise NotImplementedError

    def embed_per_layer(self, tokens: mx.array, media: Media = ()) -> mx.array | None:
        """Each layer's own embeddings of tokens `[B, L]`: `[B, L, layers, P]`, or None."""
        return None

    def hidden(
        self,
        x: mx.array,
        caches: Caches = None,
        per_layer: mx.array | None = None,
        media: Media = (),
    ) -> mx.array:
        """Final hidden states `[B, L, E]` of embeddings; appends their KV to the caches.

        Args:
            x: from `embed`, `[B, L, E]`, at the positions that follow what the caches hold.
            caches: one per layer that owns KV (`make_caches`); None for one whole sequence.
            per_layer: from `embed_per_layer`.
            media: what `embed` was given, for the rows that see each other both ways.
        """
        return self.forward(Embedded(x, per_layer, media), caches)

    def embedded(self, tokens: mx.array, media: Media = ()) -> Embedded:
        """Tokens `[B, L]` as the layers take them."""
        return Embedded(self.embed(tokens, media), self.embed_per_layer(tokens, media), media)

    def forward(self, inputs: Embedded, caches: Caches, last_only: bool = False) -> mx.array:
        """What a family writes of `hidden`.

        Args:
            last_only: only the last position is needed; the others may be computed, or left out.
        """
        raise NotImplementedError

    @property
    def cuts_layers(self) -> bool:
        """Whether `below` and `above` are `forward`: a layer needs no more than its input."""
        return False

    def below(self, x: mx.array, caches: Caches, border: int) -> mx.array:
        """The input `[B, L, E]` of layer `border`, of embeddings `[B, L, E]`.

        No media that see each other both ways may be among them.
        """
        raise NotImplementedError

    def above(self, x: mx.array, caches: Caches, border: int) -> mx.array:
        """Final hidden states `[B, L, E]` of what `below` gives; caches of all layers."""
        raise NotImplementedError

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, V]` of final hidden states `[B, L, E]`."""
        raise NotImplementedError

    def __call__(self, tokens: mx.array, caches: Caches = None, media: Media = ()) -> mx.array:
        """Logits `[B, L, V]` of tokens `[B, L]`; caches and media as for `hidden`."""
        return self.logits(self.forward(self.embedded(tokens, media), caches))

    def last_logits(self, tokens: mx.array, caches: Caches = None, media: Media = ()) -> mx.array:
        """Logits `[B, V]` after the last token: the head's product for one position only."""
        hidden = self.forward(self.embedded(tokens, media), caches, last_only=True)
        return self.logits(hidden[:, -1:])[:, 0]

    def hidden_states(
        self,
        tokens: mx.array,
        caches: Caches = None,
        media: Media = (),
        *,
        last_only: bool = False,
    ) -> mx.array:
        """Final hidden states `[B, L, E]` of tokens `[B, L]`, as `__call__` makes logits of."""
        return self.forward(self.embedded(tokens, media), caches, last_only)

    def position_logits(
        self, tokens: mx.array, caches: Caches = None, media: Media = ()
    ) -> Iterator[mx.array]:
        """Logits of every position of tokens `[1, L]`, `[n, V]` of a few positions at a time."""
        hidden = self.forward(self.embedded(tokens, media), caches)
        for i in range(0, hidden.shape[1], POSITIONS):
            yield self.logits(hidden[:, i : i + POSITIONS])[0]


def model_windows(specs: Iterable[CacheSpec | None]) -> list[int | None]:
    """The window of each layer that owns KV."""
    return [spec.window for spec in specs if spec is not None]
