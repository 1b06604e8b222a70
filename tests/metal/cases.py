"""What is counted: steps of every model on either side, and sampling.

A figure has a name, a model and a case: `launches`, `llama-3.1-8b`, `decode bf16`. Import this
after `hollow.take_gpu_branches`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, SimpleNamespace
from typing import Any, Protocol

import mlx.core as mx

from mlxkv.cache import RotatingKVCache
from mlxkv.nn.lora_rows import RowChanges, merge_changes
from tests.metal import hollow, shim, theirs
from tests.metal.count import COPIES, Counts, count
from tests.metal.proportions import FOREIGN, MODELS, PICTURES, Config

HELD = 2048
"""Tokens that a sequence holds before the steps that are counted."""

DEEP = 6400
"""Tokens held where the KV's length must show in a shape: no width of a model is this."""

MIXED = (64,) * 7 + (2048,)
"""Tokens held by sequences of which one is far longer than the others."""

VOCABULARIES = (49152, 262144)

DRAFTED = (2, 4, 8)
"""Tokens of passes with drafts."""

COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")
"""Calls in Python 3.11 alone: no part of a count that holds for all."""

SAMPLING: Mapping[str, Mapping[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7": {"temperature": 0.7},
    "top-k 40, top-p 0.9, min-p 0.05": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
    },
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
}

Figure = tuple[str, str, str, Any]
"""(figure, model, case, value); the value is a number, or numbers by name."""


class Side(Protocol):
    """mlxkv, or mlx-lm."""

    def model(self, config: Config, dtype: mx.Dtype, quantized: bool) -> Any: ...
    def caches(self, model: Any, held: int) -> Any: ...
    def batch(self, model: Any, lengths: Sequence[int]) -> Any: ...
    def last_logits(self, model: Any, ids: mx.array, caches: Any) -> mx.array: ...
    def kept(self, caches: Any) -> list[mx.array]: ...


class Ours:
    """mlxkv's models on mlxkv's caches."""

    model = staticmethod(hollow.model)

    def __init__(self) -> None:
        self._model: Any = None
        self._prompts: dict[int, Any] = {}

    def caches(self, model: Any, held: int, kv_type: str = "native") -> Any:
        return hollow.twin(self._prompt(model, held), held, kv_type)

    def batch(self, model: Any, lengths: Sequence[int]) -> Any:
        sequences = [hollow.twin(self._prompt(model, max(lengths)), n) for n in lengths]
        return hollow.batch_of(sequences), sequences

    def last_logits(self, model: Any, ids: mx.array, caches: Any) -> mx.array:
        return model.last_logits(ids, caches[0] if isinstance(caches, tuple) else caches)

    def kept(self, caches: Any) -> list[mx.array]:
        """What a step leaves for the next, all of it."""
        return hollow.arrays_in(caches)

    def _prompt(self, model: Any, held: int) -> Any:
        """Caches that hold a prompt, made once for a model."""
        if model is not self._model:
            self._model, self._prompts = model, {}
        if held not in self._prompts:
            self._prompts[held] = hollow.prefilled(model, held)
        return self._prompts[held]


class Theirs:
    """mlx-lm's models on mlx-lm's caches."""

    model = staticmethod(theirs.model)
    last_logits = staticmethod(theirs.last_logits)

    def caches(self, model: Any, held: int) -> Any:
        return theirs.prefilled(model, held)

    def batch(self, model: Any, lengths: Sequence[int]) -> Any:
        return theirs.prefilled(model, max(lengths), len(lengths))

    def kept(self, caches: Any) -> list[mx.array]:
        """Nothing: a step counts as what its logits take, which leaves out mlx-lm's counters."""
        return []


def step(side: Side, model: Any, caches: Any, B: int, L: int) -> Counts:
    """Count a step of L tokens of each of B sequences."""
    with shim.gpu():
        logits = side.last_logits(model, hollow.tokens(B, L), caches)
        return count(shim.graph(logits, *side.kept(caches)))


def decode_step(side: Side, model: Any, caches: Any, B: int = 1) -> Counts:
    """Count a step of one token in its steady state: rings and shared buffers are laid out."""
    for _ in range(2):
        with shim.gpu():
            side.last_logits(model, hollow.tokens(B, 1), caches)
        hollow.settle(caches, model)
    return step(side, model, caches, B, 1)


def draft_pass(side: Ours, model: Any, caches: Any, L: int) -> Counts:
    """Count a pass of one token and a draft, L in all, behind passes whose draft was wrong."""

    def computed() -> mx.array:
        for cache in caches:
            if isinstance(cache, RotatingKVCache):
                cache.make_room(L)
        return model(hollow.tokens(1, L), caches)

    for _ in range(2):
        with shim.gpu():
            computed()
        hollow.settle(caches, model)
        assert all(cache.rewind(cache.offset - L + 1) for cache in caches)
    with shim.gpu():
        logits = computed()
        return count(shim.graph(logits, *side.kept(caches)))


def of_model(side: Side, name: str) -> Iterator[Figure]:
    """All figures of a model with a definition of our own."""
    config = MODELS[name]
    for dtype, short in ((mx.bfloat16, "bf16"), (mx.float16, "f16")):
        yield from _of_dense(side, name, side.model(config, dtype, quantized=False), short)
    model = side.model(config, mx.bfloat16, quantized=True)
    yield "launches", name, "decode q4", decode_step(side, model, side.caches(model, HELD)).launches
    chunk = step(side, model, side.caches(model, HELD), 1, 512)
    yield "launches", name, "chunk 512 q4", chunk.launches
    yield from _of_chunk(side, name, config, model)
    yield from _of_batches(side, name, model)
    if isinstance(side, Ours):
        yield from _of_packed_kv(side, name, model)
        for L in DRAFTED:
            launches = draft_pass(side, model, side.caches(model, HELD), L).launches
            yield "launches", name, f"draft, {L} tokens q4", launches


def of_picture(name: str) -> Iterator[Figure]:
    """Figures of an encoder: the rows of one picture."""
    config, shapes = PICTURES[name]
    for dtype, short in ((mx.bfloat16, "bf16"), (mx.float16, "f16")):
        model = hollow.model(config, dtype, quantized=False)
        data = {
            key: hollow.hollow(shape, mx.int32 if key == "positions" else mx.float32)
            for key, shape in shapes.items()
        }
        with shim.gpu():
            counts = count(shim.graph(model.media_rows("image", data)))
        yield "launches", name, f"picture {short}", counts.launches
        yield "hidden_bytes", name, f"picture {short}", counts.hidden_bytes.total()
        yield "float32", name, f"picture {short}", counts.float32()


def of_mixed_lengths(side: Side, name: str) -> Iterator[Figure]:
    """Bytes of KV that a step of sequences of mixed lengths reads and copies."""
    model = side.model(MODELS[name], mx.bfloat16, quantized=True)
    caches = side.batch(model, MIXED)
    counts = decode_step(side, model, caches, len(MIXED))
    case = "7 x 64 and 2,048 q4"
    if isinstance(side, Ours):
        yield "kv_bytes_held", name, case, _kv_held(caches[1])
    yield "kv_bytes_read", name, case, _kv_read(counts)
    yield "kv_bytes_copied", name, case, _kv_copied(counts)


def of_joining(side: Ours, name: str) -> Iterator[Figure]:
    """Figures of a step of sequences that have joined one by one, before their buffers grow."""
    model = side.model(MODELS[name], mx.bfloat16, quantized=True)
    sequences = [side.caches(model, HELD - 7 * i - 1) for i in range(16)]
    caches = hollow.batch_of(sequences, one_by_one=True), sequences
    counts = decode_step(side, model, caches, 16)
    case = "batch 16, joined one by one q4"
    yield "launches", name, case, counts.launches
    yield "hidden_bytes", name, case, counts.hidden_bytes.total()


def of_adapters(side: Ours, name: str) -> Iterator[Figure]:
    """Figures of two layers with an adapter of all projections, of rank 8: alone, and of eight
    sequences with one each; beside those without."""
    config = {**MODELS[name], "num_hidden_layers": 2}
    base = side.model(config, mx.bfloat16, quantized=True)
    adapted = [hollow.adapted(base, config, 8) for _ in range(8)]
    changes = RowChanges(9)
    merged = merge_changes([base, *adapted], changes)
    changes.set(range(1, 9))
    hollow.settle(changes.arrays, merged)
    for model, rows, case in ((base, base, "2 layers"), (adapted[0], merged, "2 layers, adapters")):
        one = decode_step(side, model, side.caches(model, HELD))
        yield "launches", name, f"{case}, decode q4", one.launches
        chunk = step(side, model, side.caches(model, HELD), 1, 512)
        yield "launches", name, f"{case}, chunk 512 q4", chunk.launches
        eight = decode_step(side, rows, side.batch(base, [HELD - 7 * i for i in range(8)]), 8)
        yield "launches", name, f"{case}, batch 8 q4", eight.launches
        yield "hidden_bytes", name, f"{case}, batch 8 q4", eight.hidden_bytes.total()


def of_foreign_model(side: Side, name: str) -> Iterator[Figure]:
    """Figures of a model that runs on mlx-lm's definition."""
    config = FOREIGN[name]
    model = side.model(config, mx.bfloat16, quantized=True)
    yield "launches", name, "decode q4", decode_step(side, model, side.caches(model, HELD)).launches
    yield from _of_chunk(side, name, config, model)
    counts = decode_step(side, model, side.batch(model, [HELD - 7 * i for i in range(4)]), 4)
    yield "launches", name, "batch 4 q4", counts.launches
    yield "kv_bytes_copied", name, "batch 4 q4", _kv_copied(counts)


def _of_dense(side: Side, name: str, model: Any, dtype: str) -> Iterator[Figure]:
    decode = decode_step(side, model, side.caches(model, HELD))
    yield "launches", name, f"decode {dtype}", decode.launches
    if isinstance(side, Ours):
        yield "float32", name, f"decode {dtype}", decode.float32()
        chunk = step(side, model, side.caches(model, HELD), 1, 512)
        yield "float32", name, f"chunk 512 {dtype}", chunk.float32()


def _of_chunk(side: Side, name: str, config: Config, model: Any) -> Iterator[Figure]:
    chunk = step(side, model, side.caches(model, HELD), 1, 2048)
    yield "launches", name, "chunk 2048 q4", chunk.launches
    yield "hidden_bytes", name, "chunk 2048 q4", chunk.hidden_bytes.total()
    if isinstance(side, Ours):
        yield "logits_rows", name, "chunk 2048 q4", chunk.rows_of(config["vocab_size"])


def _of_batches(side: Side, name: str, model: Any) -> Iterator[Figure]:
    # Lengths that differ a little are those of sequences that are answered together.
    near = {f"batch {B}": [HELD - 7 * i for i in range(B)] for B in (4, 16)}
    for case, lengths in (near | {"batch 4 of equal lengths": [HELD] * 4}).items():
        try:
            caches = side.batch(model, lengths)
            counts = decode_step(side, model, caches, len(lengths))
        except ValueError:
            if isinstance(side, Ours):
                raise
            continue  # mlx-lm's Gemma 2 masks no 16 sequences
        yield "launches", name, f"{case} q4", counts.launches
        yield "hidden_bytes", name, f"{case} q4", counts.hidden_bytes.total()
        if isinstance(side, Ours):
            n_calls = _python_calls(side, model, caches, len(lengths))
            n_layers = MODELS[name]["num_hidden_layers"]
            yield "python_calls_a_layer", name, f"{case} q4", n_calls // n_layers


def _python_calls(side: Ours, model: Any, caches: Any, B: int) -> int:
    """Calls of mlxkv's and MLX's Python functions while a batch's step is built.

    They stand for the host's time, of which no test can be sure (`timing` measures it).
    """
    n_calls = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal n_calls
        if event == "call" and frame.f_code.co_name not in COMPREHENSIONS:
            n_calls += frame.f_globals["__name__"].startswith(("mlxkv.", "mlx.nn."))

    hollow.settle(caches, model)
    ids = hollow.tokens(B, 1)
    with shim.gpu():
        sys.setprofile(profile)
        side.last_logits(model, ids, caches)
        sys.setprofile(None)
    return n_calls


def _of_packed_kv(side: Ours, name: str, model: Any) -> Iterator[Figure]:
    for kv_type in ("native", "q8"):
        caches = side.caches(model, DEEP, kv_type)
        decode = decode_step(side, model, caches)
        chunk = step(side, model, side.caches(model, DEEP, kv_type), 1, 2048)
        for case, counts in (("decode", decode), ("chunk 2048", chunk)):
            case = f"{kv_type} KV, {case} behind {DEEP:,} q4"
            yield "launches", name, case, counts.launches
            if kv_type != "native":
                yield "kv_length_float32", name, case, len(_of_kv_length(counts, "float32"))
                yield "kv_length_casts", name, case, len(_of_kv_length(counts, "AsType"))


def _of_kv_length(counts: Counts, what: str) -> list[str]:
    """Operations that make an array as long as the KV: those of a name, or of a dtype."""
    return [
        op.name
        for op in counts.ops
        if not op.moves_nothing
        and what in (op.name, op.out.dtype)
        and any(DEEP <= n <= DEEP + 2048 and n % 2048 for n in op.out.shape)
    ]


def _kv_held(sequences: Sequence[Sequence[Any]]) -> int:
    """Bytes of the KV of the tokens that native caches of 16 bits hold."""
    return sum(
        cache.offset * spec.n_kv_heads * (spec.k_dim + spec.v_dim) * 2
        for caches in sequences
        for cache in caches
        if (spec := cache.spec) is not None
    )


def _kv_read(counts: Counts) -> int:
    """Bytes of keys and values that attention reads. Weights have no more than three axes."""
    products = ("Matmul", "QuantizedMatmul")
    return sum(
        x.nbytes
        for op in counts.ops
        for x in (
            op.inputs[1:3]
            if op.name == "ScaledDotProductAttention"
            else op.inputs[1:]
            if op.name in products and len(op.inputs[1].shape) >= 4
            else ()
        )
    )


def _kv_copied(counts: Counts) -> int:
    """Bytes of many tokens' KV that a step writes to another place."""
    written = [op.out for op in counts.ops if op.name in COPIES] + counts.copied
    return sum(x.nbytes for x in written if len(x.shape) >= 4 and x.shape[-2] >= min(MIXED))


def of_sampling(side: Side, V: int) -> Iterator[Figure]:
    """Launches between logits `[B, V]` and tokens, the check for broken logits included."""
    for case, settings in SAMPLING.items():
        if isinstance(side, Ours):
            yield "launches", f"sampling of {V:,}", case, _drawn(_decoded, settings, V, 1)
            yield "launches", f"sampling of {V:,}", f"{case}, 4 rows", _drawn(_rows, settings, V, 4)
            continue
        mx.random.seed(0)
        with shim.gpu():
            named = {k.replace("temperature", "temp"): v for k, v in settings.items()}
            counts = count(shim.graph(*theirs.sampled(hollow.hollow((1, V), mx.bfloat16), **named)))
        yield "launches", f"sampling of {V:,}", case, counts.launches


class _Evaluated(Exception):
    """What a decoder would evaluate next; raised in place of that."""

    def __init__(self, *arrays: mx.array):
        self.arrays = arrays


def _drawn(draw: Callable[[Any, mx.array], object], settings: Any, V: int, B: int) -> int:
    """Launches of what a decoder evaluates to choose from logits."""
    from mlxkv.sampling.params import SamplingParams

    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": 1}
    params = SamplingParams(**{**off, **settings})
    logits = hollow.hollow((B, V), mx.bfloat16)

    def evaluate(*arrays: mx.array) -> None:
        raise _Evaluated(*arrays)

    with shim.gpu():
        mx.async_eval = evaluate
        try:
            draw(params, logits)
        except _Evaluated as evaluated:
            return count(shim.graph(*evaluated.arrays)).launches
    raise AssertionError("nothing was evaluated")


def _plain_model() -> Any:
    """What a decoder asks of a model before it runs it."""
    model = SimpleNamespace(batches=True)
    model.plain = model
    return model


def _decoded(params: Any, logits: mx.array) -> None:
    """The first token of one sequence."""
    from mlxkv.generation.decoder import Decoder, Row
    from mlxkv.sampling.sampler import Sampler

    model = _plain_model()
    session: Any = SimpleNamespace(model=model, tokens=[1])
    Decoder(model).add(Row(session, logits, Sampler(params, logits.shape[1])))


def _rows(params: Any, logits: mx.array) -> None:
    """A token for each row of a batch with equal settings."""
    from mlxkv.generation.decoder import Decoder, Row
    from mlxkv.sampling.sampler import Sampler

    model = _plain_model()
    decoder = Decoder(model)
    evaluate, mx.async_eval = mx.async_eval, lambda *arrays: None
    for row in mx.split(logits, logits.shape[0]):
        session: Any = SimpleNamespace(model=model, tokens=[1])
        decoder.add(Row(session, row, Sampler(params, logits.shape[1])))
    mx.async_eval = evaluate
    decoder._choose(decoder._lanes, logits)
