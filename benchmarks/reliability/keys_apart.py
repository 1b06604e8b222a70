"""Can one API key tell what another has cached? `python -m benchmarks.reliability.keys_apart`.

A key sends a prompt, and it is measured how long the same prompt then takes with a second key, and
what that key's counters say. In half of the tries, in random order, the first key has sent another
prompt of the same length instead. Both samples are compared by their rank sum (Mann-Whitney), whose
p comes from random permutations. As a control the second key sends a prompt twice: that must show.

Exits with 1 if there is a difference at p < 0.01, or if the control shows none. The model is made
here, with random weights.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.support.command_line import chat_model, environment
from tests.support.server_process import Server

KEYS = {"first": "first-key-of-two", "second": "second-key-of-two"}
N_PERMUTATIONS = 20_000
ALPHA = 0.01


def p_of(a: Sequence[float], b: Sequence[float], seed: int = 0) -> float:
    """The two-sided p of the rank sums of two samples."""
    values = np.asarray([*a, *b])
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    for value in np.unique(values):
        ranks[values == value] = ranks[values == value].mean()
    draw, middle = np.random.default_rng(seed), ranks.mean() * len(a)
    found = abs(ranks[: len(a)].sum() - middle)
    n = sum(
        abs(draw.permutation(ranks)[: len(a)].sum() - middle) >= found
        for _ in range(N_PERMUTATIONS)
    )
    return (n + 1) / (N_PERMUTATIONS + 1)


class Keys:
    """Sends prompts with either key.

    Args:
        url: the server's.
        n_chars: of a prompt.
    """

    def __init__(self, url: str, n_chars: int):
        self._url, self._n_chars, self._draw = url, n_chars, random.Random(1)
        self._clients = {
            name: httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=60)
            for name, key in KEYS.items()
        }

    def prompt(self) -> str:
        """A prompt that none had before."""
        return "".join(self._draw.choices(string.ascii_lowercase + " ", k=self._n_chars))

    def ask(self, key: str, prompt: str) -> tuple[float, int]:
        """Seconds until the answer of one token, and the tokens of the prompt that were cached."""
        messages = [{"role": "user", "content": prompt}]
        body = {"model": "m", "messages": messages, "max_tokens": 1, "temperature": 0}
        started = time.perf_counter()
        answer = self._clients[key].post(f"{self._url}/v1/chat/completions", json=body)
        took = time.perf_counter() - started
        answer.raise_for_status()
        return took, answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    def counters(self, key: str) -> str:
        """What a key sees of the server, without times and its own requests."""
        shown = self._clients[key].get(f"{self._url}/stats.json").json()
        memory = {name: n for name, n in shown["memory"].items() if name in ("kv_used", "pages")}
        return json.dumps([shown["queued"], shown["rejected"], memory], sort_keys=True)


def measured(keys: Keys, n: int, before: Callable[[str], object]) -> dict[bool, list[Any]]:
    """(seconds, cached tokens) of the second key, by whether `before` had the same prompt."""
    order = [True, False] * n
    random.Random(2).shuffle(order)
    found: dict[bool, list[Any]] = {True: [], False: []}
    for same in order:
        prompt = keys.prompt()
        before(prompt if same else keys.prompt())
        found[same].append(keys.ask("second", prompt))
    return found


def report(what: str, found: dict[bool, list[Any]]) -> float:
    """Print both samples; their p."""
    times = {same: [took for took, _ in each] for same, each in found.items()}
    cached = {same: sorted({n for _, n in each}) for same, each in found.items()}
    p = p_of(times[True], times[False])
    medians = " and ".join(f"{1000 * np.median(times[same]):.2f} ms" for same in (True, False))
    print(f"{what}: n {len(times[True])} each, median with and without {medians}, p = {p:.4f}; "
          f"cached tokens {cached[True]} and {cached[False]}")  # fmt: skip
    return p


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=200, help="of each kind")
    parser.add_argument(
        "--chars", type=int, default=5000, help="of a prompt: the tokenizer remembers 4,096 or more"
    )
    options = parser.parse_args()
    n = options.tries
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        chat_model(home / "models" / "m", max_position_embeddings=8192)
        env = environment(home)
        server = Server(env, *(word for key in KEYS.values() for word in ("--api-key", key)))
        try:
            keys = Keys(server.url, options.chars)
            for _ in range(10):
                for name in KEYS:
                    keys.ask(name, keys.prompt())
            before = keys.counters("second")
            for _ in range(5):
                keys.ask("first", keys.prompt())
            same_counters = before == keys.counters("second")
            print(f"counters of the second key after prompts of the first: {same_counters=}")
            apart = measured(keys, n, lambda prompt: keys.ask("first", prompt))
            control = measured(keys, max(10, n // 10), lambda prompt: keys.ask("second", prompt))
        finally:
            server.stop()
    p, p_control = report("sent by another key", apart), report("sent by the same key", control)
    has_leak = any(n for each in apart.values() for _, n in each) or not same_counters
    return 1 if p < ALPHA or p_control >= ALPHA or has_leak else 0


if __name__ == "__main__":
    sys.exit(main())
