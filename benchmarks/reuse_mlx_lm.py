"""mlx-lm behind the reuse benchmark's call: its prompt caches, in process, and its server."""

from __future__ import annotations

import atexit
import contextlib
import copy
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.reuse_engines import WARM_UP, Answer, Engine, blas_of
from benchmarks.reuse_scenarios import n_common

START_LIMIT_S = 600
ANSWER_LIMIT_S = 3600


class _InProcess(Engine):
    """mlx-lm through `stream_generate`; subclasses say where its cache comes from and goes to."""

    def __init__(self, model: Path, state: Path):
        super().__init__(model, state)
        # Before MLX: both engines compute with the same BLAS.
        from mlxkv.base import device

        device.load_blas()
        from mlx_lm import load

        self._model, self._tokenizer = load(str(model))[:2]
        sizes = [getattr(c, "max_size", None) for c in self._new_cache()]
        self.window = min((n for n in sizes if n), default=None)

    def answer(self, prompt: str, conversation: str, max_tokens: int) -> Answer:
        import mlx.core as mx
        from mlx_lm import stream_generate

        start, first_s, text, tokens = time.perf_counter(), 0.0, "", []
        ids = self._tokenizer.encode(prompt)
        cache, n_kept = self._fetch(ids, conversation)
        for response in stream_generate(
            self._model,
            self._tokenizer,
            ids[n_kept:],
            max_tokens=max_tokens,
            prompt_cache=cache,
            prompt_progress_callback=self._on_progress(ids, cache),
        ):
            if not first_s:
                first_s = time.perf_counter() - start
            text += response.text
            tokens.append(int(response.token))
        self._keep([*ids, *tokens], cache, conversation)
        # A step is in flight: what comes next waits for it.
        mx.eval([c.state for c in cache])
        total_s = time.perf_counter() - start
        return Answer(text, (*ids, *tokens), len(ids), len(ids) - n_kept, first_s, total_s)

    def _new_cache(self) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self._model)

    def _go_back(self, ids: list[int], held: list[int], cache: list[Any]) -> tuple[list[Any], int]:
        """A cache of `held` taken back to what it shares with a prompt, or an empty one."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        n = min(n_common(ids, held), len(ids) - 1)
        if n == len(held):
            return cache, n
        if n and can_trim_prompt_cache(cache):
            trim_prompt_cache(cache, len(held) - n)
            return cache, n
        return self._new_cache(), 0

    def _on_progress(self, ids: list[int], cache: list[Any]) -> Callable[[int, int], None]:
        return lambda done, total: None

    @abstractmethod
    def _fetch(self, ids: list[int], conversation: str) -> tuple[list[Any], int]:
        """A cache to go on with, and how many leading tokens of the prompt it holds."""

    @abstractmethod
    def _keep(self, sequence: list[int], cache: list[Any], conversation: str) -> None:
        """Keep a cache of prompt and answer for later."""


class PromptCache(_InProcess):
    """One prompt cache a conversation, kept by the caller: continued, trimmed, or begun anew."""

    def __init__(self, model: Path, state: Path):
        super().__init__(model, state)
        self._caches: dict[str, tuple[list[int], list[Any]]] = {}

    def _fetch(self, ids: list[int], conversation: str) -> tuple[list[Any], int]:
        if conversation not in self._caches:
            return self._new_cache(), 0
        return self._go_back(ids, *self._caches.pop(conversation))

    def _keep(self, sequence: list[int], cache: list[Any], conversation: str) -> None:
        self._caches[conversation] = sequence, cache


class Lru(_InProcess):
    """The `LRUPromptCache` of mlx-lm's server, filled where the server fills it."""

    def __init__(self, model: Path, state: Path):
        super().__init__(model, state)
        from mlx_lm.models.cache import LRUPromptCache

        self._kept = LRUPromptCache()

    def _fetch(self, ids: list[int], conversation: str) -> tuple[list[Any], int]:
        cache, rest = self._kept.fetch_nearest_cache("", ids)
        return self._new_cache() if cache is None else cache, len(ids) - len(rest)

    def _on_progress(self, ids: list[int], cache: list[Any]) -> Callable[[int, int], None]:
        def keep_prompt(done: int, total: int) -> None:
            # The server keeps a prompt without its last token, before the answer.
            if done == total - 1:
                self._kept.insert_cache("", ids[:-1], copy.deepcopy(cache))

        return keep_prompt

    def _keep(self, sequence: list[int], cache: list[Any], conversation: str) -> None:
        self._kept.insert_cache("", sequence, cache)


class Saved(_InProcess):
    """A prompt cache in a file, for a user who calls `save_prompt_cache` and `load_prompt_cache`.

    mlx-lm's best case where it has nothing by itself: somebody knows beforehand what later prompts
    begin with. The file is loaded for every prompt, and the loading counts.
    """

    def __init__(self, model: Path, state: Path):
        super().__init__(model, state)
        self._file = state / "cache.safetensors"
        self._live: tuple[list[int], list[Any]] | None = None

    def prepare(self, fork: str) -> None:
        """As `mlx_lm.cache_prompt` does."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        ids, cache = self._tokenizer.encode(fork), self._new_cache()
        for _ in generate_step(mx.array(ids), self._model, max_tokens=0, prompt_cache=cache):
            pass
        self._save(ids, cache)

    def _fetch(self, ids: list[int], conversation: str) -> tuple[list[Any], int]:
        from mlx_lm.models.cache import load_prompt_cache

        if self._file.exists() and conversation != WARM_UP:
            cache, about = load_prompt_cache(str(self._file), return_metadata=True)
            return self._go_back(ids, json.loads(about["tokens"]), cache)
        if self._live is None:
            return self._new_cache(), 0
        return self._go_back(ids, *self._live)

    def _keep(self, sequence: list[int], cache: list[Any], conversation: str) -> None:
        if conversation != WARM_UP:
            self._live = sequence, cache

    def close(self) -> None:
        if self._live is not None and not self._file.exists():
            self._save(*self._live)

    def _save(self, sequence: list[int], cache: list[Any]) -> None:
        from mlx_lm.models.cache import save_prompt_cache

        save_prompt_cache(str(self._file), cache, {"tokens": json.dumps(sequence)})


class Server(Engine):
    """mlx-lm's server in a process of its own, asked over loopback at /v1/completions."""

    def __init__(self, model: Path, state: Path):
        super().__init__(model, state)
        from mlxkv.text.tokenizer import Tokenizer

        self._tokenizer = Tokenizer.from_dir(model)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        command = [sys.executable, "-m", "mlx_lm", "server", f"--model={model}"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, f"--port={self._port}", "--log-level=WARNING"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        atexit.register(self.close)  # also where this process fails
        self._wait()

    def _wait(self) -> None:
        """Until it listens and has loaded the model, which its first answer shows."""
        until = time.monotonic() + START_LIMIT_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                self._log.seek(0)
                said = self._log.read().decode(errors="replace")[-2000:]
                raise SystemExit(f"the server ended: {self._process.returncode}\n{said}")
            with contextlib.suppress(OSError):
                self.answer("a", WARM_UP, 1)
                return
            time.sleep(0.05)
        raise SystemExit(f"the server did not start within {START_LIMIT_S} s")

    def answer(self, prompt: str, conversation: str, max_tokens: int) -> Answer:
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start, first_s, text, usage = time.perf_counter(), 0.0, "", {}
        for event in self._events(body):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += choice["text"]
                if not first_s and (text or choice["finish_reason"]):
                    first_s = time.perf_counter() - start
        total_s = time.perf_counter() - start
        n_prompt = usage["prompt_tokens"]
        n_kept = usage["prompt_tokens_details"]["cached_tokens"]
        # It streams no ids: what it generated is told by the text.
        sequence = tuple(self._tokenizer.encode(prompt + text))
        return Answer(text, sequence, n_prompt, n_prompt - n_kept, first_s, total_s)

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_LIMIT_S)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"the server answers {response.status}: {response.read()[:500]}")
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if line.startswith(b"data: ") and data != b"[DONE]":
                    yield json.loads(data)

    def blas(self) -> str:
        return blas_of(self._process.pid)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            # OpenBLAS' exit handler can wait for a step in flight for ever.
            self._process.kill()
            self._process.wait()
