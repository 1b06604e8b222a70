"""mlxkv and mlx-lm, each through its own public loop; one of them in a process.

Both get the same token ids and the same checkpoint, decode greedily, and continue past the end
token. Both are timed from the call to the first token, and from the first to the last. A batch has
its first token when all of its sequences have theirs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxkv.base import device
from mlxkv.errors import MlxkvError
from mlxkv.generation.decoder import Decoder, Row
from mlxkv.llm.llm import LLM
from mlxkv.sampling.params import SamplingParams
from mlxkv.sampling.sampler import Sampler
from mlxkv.store.adapters import AdapterRef
from mlxkv.store.settings import Given, effective

MLXKV, MLX_LM = "mlxkv", "mlx-lm"

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Timing:
    """What one run of a case took.

    Args:
        n_prompt: tokens of all prompts.
        first_s: until every sequence had its first token.
        n_decoded: tokens of all sequences after that.
        decode_s: the time for those.
        peak_bytes: MLX's peak memory, weights included.
    """

    n_prompt: int
    first_s: float
    n_decoded: int
    decode_s: float
    peak_bytes: int


class TimedEngine(Protocol):
    """A loaded model."""

    @property
    def dtype(self) -> str:
        """What it computes in."""
        ...

    def steps(self, prompts: Prompts, n_answer: int) -> Iterator[int]:
        """Generate `n_answer` tokens for each prompt, with no KV restored.

        Yields:
            The number of new tokens of each step.
        """
        ...


def measure(engine: TimedEngine, prompts: Prompts, n_timed: int) -> Timing:
    """Run prompts of one length to `n_timed` tokens past the first."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    n, n_first = 0, 0
    start = first = last = time.perf_counter()
    for n_new in engine.steps(prompts, n_timed + 1):
        last = time.perf_counter()  # cleaning up after the last token is not decode
        n += n_new
        if not n_first and n >= len(prompts):
            first, n_first = last, n
    if n != (wanted := len(prompts) * (n_timed + 1)):
        raise MlxkvError(f"{n} tokens came instead of {wanted}")
    n_prompt = sum(map(len, prompts))
    return Timing(n_prompt, first - start, n - n_first, last - first, mx.get_peak_memory())


def load(
    engine: str,
    path: Path,
    kv_type: str,
    memory: int,
    adapters: Sequence[tuple[str, float]] = (),
) -> TimedEngine:
    """Load a model into one of the engines, into mlxkv with adapters: their paths and weights."""
    if engine == MLXKV:
        refs = [AdapterRef(Path(at), weight) for at, weight in adapters]
        return Mlxkv(path, kv_type, memory, refs)
    return MlxLm(path)


class Mlxkv:
    """`LLM.stream` for one sequence, `Session` and `Decoder` for more."""

    def __init__(self, path: Path, kv_type: str, memory: int, adapters: Sequence[AdapterRef] = ()):
        settings = effective(path, Given(kv_type=kv_type, memory=memory))
        self._llm = LLM.load(path, settings, adapters=adapters)
        self._llm.tokenizer.eos_token_ids = frozenset()

    @property
    def dtype(self) -> str:
        return _name(self._llm.model.compute_dtype)

    def steps(self, prompts: Prompts, n_answer: int) -> Iterator[int]:
        if self._llm.pages is not None:
            self._llm.pages.clear()  # else the last run's prompt would be restored
        if len(prompts) == 1:
            return self._one(prompts[0], n_answer)
        return self._several(prompts, n_answer)

    def _one(self, prompt: Sequence[int], n_answer: int) -> Iterator[int]:
        for chunk in self._llm.stream(
            list(prompt), max_tokens=n_answer, temperature=0.0, draft="off"
        ):
            if chunk.error is not None:
                raise chunk.error
            if chunk.stats is not None and chunk.stats.restored_tokens:
                raise MlxkvError(f"{chunk.stats.restored_tokens} tokens of the prompt were known")
            yield 1

    def _several(self, prompts: Prompts, n_answer: int) -> Iterator[int]:
        llm = self._llm
        llm.budget.begin()
        decoder, n_left = Decoder(llm.model), len(prompts) * n_answer
        for prompt in prompts:
            session = llm.session()
            sampler = Sampler(SamplingParams(temperature=0), llm.config.vocab_size)
            decoder.add(Row(session, session.prefill(prompt), sampler, n_answer))
        while n_left:
            drawn = list(decoder.step())
            failed = next((row.error for row in drawn if row.error is not None), None)
            if failed is not None:
                raise failed
            n_left -= len(drawn)
            yield len(drawn)


class MlxLm:
    """`stream_generate` for one sequence, `BatchGenerator` for more."""

    def __init__(self, path: Path):
        from mlx_lm import load as load_mlx_lm

        if not device.can_compile():
            mx.disable_compile()
        self._model, self._tokenizer = load_mlx_lm(str(path), lazy=True)[:2]
        if device.on_cpu():
            # What mlxkv computes in there; 16-bit products are several times slower.
            self._model.set_dtype(mx.float32)
        mx.eval(self._model.parameters())
        self._tokenizer.eos_token_ids = set()

    @property
    def dtype(self) -> str:
        leaves = (x for _, x in tree_flatten(self._model.parameters()))
        return _name(_most(x for x in leaves if isinstance(x, mx.array)))

    def steps(self, prompts: Prompts, n_answer: int) -> Iterator[int]:
        if len(prompts) == 1:
            return self._one(prompts[0], n_answer)
        return self._several(prompts, n_answer)

    def _one(self, prompt: Sequence[int], n_answer: int) -> Iterator[int]:
        from mlx_lm import stream_generate

        for _ in stream_generate(self._model, self._tokenizer, list(prompt), n_answer):
            yield 1

    def _several(self, prompts: Prompts, n_answer: int) -> Iterator[int]:
        from mlx_lm.generate import BatchGenerator

        n = len(prompts)
        generator = BatchGenerator(
            self._model, max_tokens=n_answer, completion_batch_size=n, prefill_batch_size=n
        )
        with closing(generator):
            generator.insert([list(prompt) for prompt in prompts])
            while came := generator.next_generated():
                yield len(came)


def _most(arrays: Iterable[mx.array]) -> mx.Dtype:
    """The floating dtype of most arrays: quantized weights are integers beside scales."""
    dtypes = [x.dtype for x in arrays if mx.issubdtype(x.dtype, mx.floating)]
    return max(dtypes, key=dtypes.count, default=mx.float32)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
