"""mlxkv and mlx-lm on a hybrid: a scaled-down Qwen3.5 in float32, random weights.

    python -m benchmarks.hybrid --output benchmarks/results/hybrid.json

- `prefill` and `decode`: tokens a second of 1,024 tokens, and of 64 behind them.
- `session`: 20 turns, each prompt whole, as agents send it. What a model thought is left out of the
  history, as Qwen's templates do, so no prompt begins with the last one's answer: mlx-lm's prompt
  cache, whose states cannot be trimmed, begins anew; it goes on where it can. Times are to the
  first token, their ratio is mlxkv's over mlx-lm's, the median of the turns that both have.
- `disk`: bytes of mlxkv's pages when it has closed, over the keys and values of the last prompt
  and the states that one sequence of its length keeps.

Each measurement is a process of its own and the engines take turns, in the session once each. The
exit code is 1 where a target is missed: prefill and decode 1.0 times mlx-lm's or more, tokens
computed in a turn the new ones and 32 more at most, time to first token 0.05 times mlx-lm's or
less, disk 1.3 or less. On the CPU mlx-lm computes a delta net token by token: of the session it
gets the turns `TIMED` alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ENGINES = ("mlxkv", "mlx-lm")
SIZES = {
    "model_type": "qwen3_5",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
N_PREFILL, N_DECODE, N_TURNS = 1024, 64, 20
SYSTEM, ASKED, SAID, THOUGHT = 600, 80, 60, 24
"""Tokens of the system prompt, of a question, of an answer, and of what is thought before it."""
HEADER = (5, 6, 7)
"""What asks for an answer."""
TIMED = (1, 2, 9, 19)
"""Turns that mlx-lm gets: two in a row, and two further on."""
MORE = 32
"""Tokens that a turn may compute beside its new ones."""


def prompts(end: int) -> list[list[int]]:
    """The prompts of the session; `end` ends a turn."""
    chance = random.Random(0)

    def turn(n: int) -> list[int]:
        return [*(chance.randrange(10, 200) for _ in range(n)), end]

    history, found = turn(SYSTEM), []
    for _ in range(N_TURNS):
        history += turn(ASKED)
        found.append([*history, *HEADER])
        history += [*HEADER, *turn(SAID)]
    return found


class Mlxkv:
    """mlxkv through its Python API."""

    def __init__(self, model: Path):
        import mlxkv

        self._llm = mlxkv.load(model, dtype="float32", draft="off")
        self.end = min(self._llm.tokenizer.eos_token_ids)
        self.computed = 0

    def tokens(self, prompt: Sequence[int], n: int) -> Iterator[None]:
        """Answer a prompt, a token at a time."""
        stats = None
        for chunk in self._llm.stream(list(prompt), max_tokens=n, temperature=0, min_tokens=n):
            stats = chunk.stats or stats
            yield
        assert stats is not None
        self.computed = stats.computed_tokens

    def close(self) -> None:
        self._llm.close()


class MlxLm:
    """mlx-lm's generation with one prompt cache, continued, trimmed or begun anew."""

    def __init__(self, model: Path):
        from mlx_lm.utils import load_model

        from mlxkv.base import device
        from mlxkv.text.tokenizer import Tokenizer

        device.load_blas()  # both compute with the same
        self._model = load_model(model)[0]
        self.end = min(Tokenizer.from_dir(model).eos_token_ids)
        self._held: list[int] = []
        self._cache: list[Any] = []
        self.computed = 0

    def tokens(self, prompt: Sequence[int], n: int) -> Iterator[None]:
        """As `Mlxkv.tokens`."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        kept = self._go_back(prompt)
        self.computed = len(prompt) - kept
        self._held = list(prompt)
        rest = mx.array(list(prompt[kept:]))
        for token, _ in generate_step(rest, self._model, max_tokens=n, prompt_cache=self._cache):
            self._held.append(int(token))
            yield

    def _go_back(self, prompt: Sequence[int]) -> int:
        from mlx_lm.models.cache import (
            can_trim_prompt_cache,
            make_prompt_cache,
            trim_prompt_cache,
        )

        pairs = zip(self._held, prompt, strict=False)
        n = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self._held))
        if n and n == len(self._held) < len(prompt):
            return n
        if n and can_trim_prompt_cache(self._cache):
            n = min(n, len(prompt) - 1)
            trim_prompt_cache(self._cache, len(self._held) - n)
            return n
        self._cache = make_prompt_cache(self._model)
        return 0

    def close(self) -> None:
        pass


def speed(engine: Mlxkv | MlxLm) -> dict[str, float]:
    """Tokens a second of prefill and decode."""
    chance = random.Random(1)
    list(engine.tokens([chance.randrange(10, 200) for _ in range(300)], 8))  # warm up
    prompt = [chance.randrange(10, 200) for _ in range(N_PREFILL)]
    started = time.perf_counter()
    at = [time.perf_counter() for _ in engine.tokens(prompt, N_DECODE + 1)]
    n = len(at) - 1
    return {"prefill": N_PREFILL / (at[0] - started), "decode": n / (at[-1] - at[0])}


def session(engine: Mlxkv | MlxLm) -> dict[str, list[float]]:
    """Seconds to the first token of each turn, and tokens that it computed."""
    first_s, computed = [], []
    for i, prompt in enumerate(prompts(engine.end)):
        if isinstance(engine, MlxLm) and i not in TIMED:
            continue
        started, times = time.perf_counter(), list[float]()
        for _ in engine.tokens(prompt, THOUGHT):
            times.append(time.perf_counter())
        first_s.append(times[0] - started)
        computed.append(engine.computed)
    engine.close()
    return {"first_s": first_s, "computed": computed}


MEASURES: dict[str, Callable[[Any], dict[str, Any]]] = {"speed": speed, "session": session}


def own_bytes(model: Path, n_tokens: int) -> int:
    """Keys and values of so many tokens, and the states that a sequence of them keeps."""
    from mlxkv import load_model
    from mlxkv.kv.types import KVFormat
    from mlxkv.prefix.layout import n_states

    kv, specs = KVFormat("native", 4), load_model(model, dtype="float32").cache_specs()
    own = [spec for spec in specs if spec is not None]
    states = sum(spec.nbytes(1, kv) for spec in own if spec.opaque)
    return n_tokens * sum(spec.token_bytes(kv) for spec in own) + states * n_states(n_tokens)


def write_model(folder: Path) -> Path:
    """The checkpoint that both read."""
    from tests.support.hybrid import hybrid_chat_model

    return hybrid_chat_model(folder, **SIZES)


def run(engine: str, measure: str, model: Path, kv: Path) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hybrid", "--worker", engine, measure, str(model)]
    env = {**os.environ, "MLXKV_KV": str(kv), "MLXKV_KV_DISK": "4GiB"}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(model: Path, scratch: Path, n_runs: int) -> dict[str, list[dict[str, Any]]]:
    """All runs by engine, in turns: one session, mlxkv's with its bytes on disk, then speeds."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for engine in ENGINES:
        kv = scratch / engine
        one = run(engine, "session", model, kv)
        if kv.is_dir():
            files = (path for path in kv.rglob("*") if path.is_file())
            one["disk_bytes"] = sum(path.stat().st_size for path in files)
        found[engine].append(one)
    for i in range(n_runs):
        for engine in ENGINES if i % 2 == 0 else ENGINES[::-1]:
            found[engine].append(run(engine, "speed", model, scratch / f"{engine}-{i}"))
    return found


def summary(found: dict[str, list[dict[str, Any]]], model: Path) -> dict[str, Any]:
    """Ratios, each the median over pairs of runs, and whether targets are met."""
    (ours, theirs), *pairs = zip(found["mlxkv"], found["mlx-lm"], strict=True)
    asked = prompts(0)
    new = [len(asked[0]), *(len(b) - len(a) for a, b in itertools.pairwise(asked))]
    over = max(c - n for c, n in zip(ours["computed"], new, strict=True))
    times = zip(TIMED, theirs["first_s"], strict=True)
    first = median(ours["first_s"][i] / their_s for i, their_s in times)
    ratios = {name: median(a[name] / b[name] for a, b in pairs) for name in ("prefill", "decode")}
    disk = ours["disk_bytes"] / own_bytes(model, len(asked[-1]))
    result = {**ratios, "first_token": first, "computed_over_new": over, "disk": disk}
    met = {
        **{name: ratios[name] >= 1.0 for name in ratios},
        "first_token": result["first_token"] <= 0.05,
        "computed_over_new": over <= MORE,
        "disk": disk <= 1.3,
    }
    return {"result": result, "met": met}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="NAME.json")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs of speed")
    parser.add_argument("--worker", nargs=3, metavar=("ENGINE", "MEASURE", "MODEL"))
    options = parser.parse_args()
    if options.worker:
        name, measure, model = options.worker
        engine = (Mlxkv if name == "mlxkv" else MlxLm)(Path(model))
        print(json.dumps(MEASURES[measure](engine)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch, "model"))
        found = measured(model, Path(scratch), options.runs)
        told = summary(found, model)
    print(json.dumps(told, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps({**told, "runs": found}, indent=1) + "\n")
    return 0 if all(told["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
