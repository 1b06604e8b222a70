"""One engine, one process, one round of questions about pictures: prints JSON on its last line.

mlx-vlm runs in an environment of its own, so nothing of mlxkv is imported but for mlxkv itself.
Every time is taken from the call, with files and messages as a program gives them, to the first
token: decoding and resizing the picture, the template and the tokenizer count.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ANSWER = 8
"""Tokens of each answer."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Turn:
    """A message: a text, and a picture before it."""

    text: str
    picture: Path | None = None
    role: str = "user"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt took.

    Args:
        first_s: wall time to the first token.
        cpu_s: CPU time of all threads until then.
        prompt_tokens: of the prompt.
        kept_tokens: those that were not computed.
        text: of the answer.
    """

    first_s: float
    cpu_s: float
    prompt_tokens: int
    kept_tokens: int
    text: str


class Engine(ABC):
    """One engine with its model."""

    modes: tuple[str, ...] = ("chat",)
    """What `ask` can be told to keep."""

    @abstractmethod
    def ask(self, turns: Sequence[Turn], keeping: str = "chat") -> Answer:
        """Answer greedily; `keeping` says which of mlx-vlm's caches there are."""

    @abstractmethod
    def encoder(self, picture: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Functions that read a picture into arrays, and that compute its rows of those."""


class Mlxkv(Engine):
    """mlxkv as `mlxkv.load` gives it, pages in RAM and on SSD."""

    def __init__(self, model: Path):
        import mlxkv

        self._llm = mlxkv.load(model)

    def ask(self, turns: Sequence[Turn], keeping: str = "chat") -> Answer:
        messages = [_message(turn, lambda path: {"image": str(path)}) for turn in turns]
        pieces = self._llm.stream(messages, max_tokens=ANSWER, ignore_eos=True)
        last, first, chunks = _timed(pieces)
        assert last.stats is not None
        text = "".join(chunk.text for chunk in chunks)
        return Answer(*first, last.stats.prompt_tokens, last.stats.restored_tokens, text)

    def encoder(self, picture: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
        import mlx.core as mx

        reader, model = self._llm.media.reader, self._llm.model
        assert reader is not None
        medium = reader.image(picture)
        assert medium.data is not None
        arrays = {name: mx.array(value) for name, value in medium.data.items()}
        mx.eval(arrays)
        return lambda: reader.image(picture), lambda: mx.eval(model.media_rows("image", arrays))


class MlxVlm(Engine):
    """mlx-vlm through `stream_generate`.

    Its caches are those of its own chat: `chat` keeps the last prompt's KV and the rows of
    pictures, `rows` the rows alone, as its server does by default, `nothing` is what a program gets
    that passes no cache.
    """

    def __init__(self, model: Path):
        from mlx_vlm import load
        from mlx_vlm.generate import PromptCacheState
        from mlx_vlm.vision_cache import VisionFeatureCache

        self._model, self._processor = load(str(model))
        self._rows, self._kv = VisionFeatureCache(), PromptCacheState()
        self._first: Path | None = None
        # It has no rows of Gemma 3's pictures to keep: they are computed with the prompt.
        keeps_rows = hasattr(self._model, "encode_image")
        self.modes = ("nothing", "rows", "chat") if keeps_rows else ("nothing", "chat")

    def ask(self, turns: Sequence[Turn], keeping: str = "chat") -> Answer:
        from mlx_vlm.generate import PromptCacheState, stream_generate

        if turns[0].picture != self._first:
            # It compares ids alone, which all pictures share: the KV of another would be used.
            self._first, self._kv = turns[0].picture, PromptCacheState()
        start, cpu = time.perf_counter(), _cpu_s()
        caches: dict[str, Any] = {} if keeping == "nothing" else {"vision_cache": self._rows}
        if keeping == "chat":
            caches["prompt_cache_state"] = self._kv
        messages = [_message(turn, lambda _: {}) for turn in turns]
        prompt = self._processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        pictures = [str(turn.picture) for turn in turns if turn.picture is not None]
        self._model.config.eos_token_id = []
        pieces = stream_generate(
            self._model, self._processor, prompt, image=pictures, max_tokens=ANSWER, **caches
        )
        last, first, chunks = _timed(pieces, start, cpu)
        text = "".join(chunk.text for chunk in chunks)
        return Answer(*first, last.prompt_tokens, last.cached_tokens, text)

    def encoder(self, picture: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
        import mlx.core as mx
        from mlx_vlm.utils import prepare_inputs

        model, processor = self._model, self._processor
        mark = "<start_of_image>" if model.config.model_type == "gemma3" else "<|image|>"

        def read() -> Any:
            return prepare_inputs(processor, images=[str(picture)], prompts=mark)["pixel_values"]

        pixels = mx.array(read())
        mx.eval(pixels)
        if hasattr(model, "encode_image"):
            return read, lambda: mx.eval(model.encode_image(pixels))

        def encode() -> None:
            # As its `get_input_embeddings` does.
            hidden, *_ = model.vision_tower(pixels.transpose(0, 2, 3, 1), output_hidden_states=True)
            mx.eval(model.multi_modal_projector(hidden))

        return read, encode


ENGINES: dict[str, Callable[[Path], Engine]] = {"mlxkv": Mlxkv, "mlx-vlm": MlxVlm}


def _message(turn: Turn, source: Callable[[Path], dict[str, str]]) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "text", "text": turn.text}]
    if turn.picture is not None:
        parts.insert(0, {"type": "image", **source(turn.picture)})
    return {"role": turn.role, "content": parts}


def _timed(
    pieces: Iterator[Any], start: float | None = None, cpu: float | None = None
) -> tuple[Any, tuple[float, float], list[Any]]:
    """The last piece, (wall, CPU) time to the first, and all."""
    start = time.perf_counter() if start is None else start
    cpu = _cpu_s() if cpu is None else cpu
    chunks = [next(pieces)]
    first = time.perf_counter() - start, _cpu_s() - cpu
    chunks += pieces
    return chunks[-1], first, chunks


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


QUESTIONS = ("What is this?", "Which colours are there?", "And what is that one?", "Is it large?")


def questions(engine: Engine, pictures: Sequence[Path]) -> dict[str, list[Answer]]:
    """The prompts of a round, by what they are about.

    Args:
        engine: asked.
        pictures: seven; the first is for the warm-up, the last is not asked about.
    """
    warm, one, second, third, alone, other, _ = pictures
    q = QUESTIONS
    engine.ask([Turn(q[0], warm)])
    engine.ask([Turn(q[1], warm)])
    asked = {"one picture": [engine.ask([Turn(q[0], one)])]}
    for keeping in engine.modes:
        asked[f"another question, {keeping}"] = [engine.ask([Turn(q[1], one)], keeping)]
    # A text of few tokens: what random weights answer is not encoded as it was generated.
    chat = [Turn(q[1], one), Turn("Red.", role="assistant")]
    behind = asked["a second picture"] = []
    if isinstance(engine, Mlxkv):
        # What its second picture is compared with, before and behind: the load changes.
        alone_first = engine.ask([Turn(q[2], alone)])
        behind.append(engine.ask([*chat, Turn(q[2], third)]))
        behind.append(engine.ask([*chat, Turn(q[2], second)]))
        asked["a picture alone"] = [alone_first, engine.ask([Turn(q[2], other)])]
    else:
        behind.append(engine.ask([*chat, Turn(q[2], second)]))
    asked["the first again"] = [engine.ask([Turn(q[3], one)])]
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=tuple(ENGINES), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    args = parser.parse_args()
    if args.engine == "mlxkv":
        import mlxkv.llm.llm  # noqa: F401
    else:
        import mlx_vlm.generate  # noqa: F401
    imported = _rss()
    import mlx.core as mx

    engine = ENGINES[args.engine](args.model)
    pictures = sorted(args.pictures.glob("*.jpg"))
    asked = questions(engine, pictures)
    peaks = {
        "MLX peak MiB": mx.get_peak_memory() / MIB,
        "process peak MiB": _peak(),
        "process peak beside imports MiB": _peak() - imported,
    }
    read, encode = engine.encoder(pictures[-1])
    figures = {**_mean("read a picture", read, 5), **_mean("tower", encode, 1)}
    for name, answers in asked.items():
        figures[f"{name} s"] = mean(answer.first_s for answer in answers)
        figures[f"{name} cpu s"] = mean(answer.cpu_s for answer in answers)
    tokens = {name: [a[0].prompt_tokens, a[0].kept_tokens] for name, a in asked.items()}
    texts = {name: answers[0].text for name, answers in asked.items()}
    print(json.dumps({"figures": figures | peaks, "tokens": tokens, "texts": texts}), flush=True)
    # A step may be in flight, and OpenBLAS' exit handler can wait for it forever.
    os._exit(0)


def _mean(name: str, call: Callable[[], Any], n: int) -> dict[str, float]:
    start, cpu = time.perf_counter(), _cpu_s()
    for _ in range(n):
        call()
    return {
        f"{name} s": (time.perf_counter() - start) / n,
        f"{name} cpu s": (_cpu_s() - cpu) / n,
    }


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def _rss() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


if __name__ == "__main__":
    main()
