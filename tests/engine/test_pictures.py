"""Prompts with pictures on the real encoders' models, whatever is restored, shared, lost or ended.

The oracle of every answer is the same prompt alone, in a model that keeps nothing. Compared are the
tokens and their log-probabilities, which tell pictures apart where the likeliest tokens do not.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlxkv
from benchmarks.scripted import scripted
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.asleep.answers import Sleep
from mlxkv.engine.asleep.files import SleepFiles
from mlxkv.engine.messages import PutAway
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.generation.outputs import Chunk, Stats
from mlxkv.generation.request import Request
from mlxkv.llm.llm import LLM
from tests.support.tiny_gemma3n import write_gemma3n
from tests.support.tiny_media import write_gemma3, write_gemma4

Parts = tuple[str | bytes, ...]
Answer = list[tuple[int, float]]
WRITERS: dict[str, Callable[[Path], Path]] = {
    "gemma3": write_gemma3,
    "gemma3n": write_gemma3n,
    "gemma4": write_gemma4,
}
WORDS = ("the", "weir", "was", "built", "of", "granite", "from", "upper", "quarry", "in", "may")
CLOSE = {"native": 1e-3, "q8": 1e-2}
"""Largest difference of a log-probability: of sums in another order, and of packed KV."""


def png(seed: int, width: int = 60, height: int = 60) -> bytes:
    """A picture of noise."""
    levels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


A, B, C = (png(seed) for seed in range(3))
PICTURES = (A, B, C, png(3, 90, 30))
LONG = " ".join(Random(1).choices(WORDS, k=70))


def shown(parts: Parts) -> list[dict[str, Any]]:
    """A message of the user."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part, "name": f"{PICTURES.index(part)}.png"}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


class Asked:
    """A request, and what came of it."""

    def __init__(self, served: Scheduler, parts: Any, cancel_at: int | None = None, **more: Any):
        self.parts, self.told, self.n_steps = parts, list[Any](), 0
        messages = parts if isinstance(parts, list) else shown(parts)
        options = {"max_tokens": 5, "logprobs": 1, "ignore_eos": True, **more}
        is_cancelled = lambda: cancel_at is not None and self.n_steps >= cancel_at  # noqa: E731
        served.add(Task(Request.of(messages, **options), self.told.append, is_cancelled))

    @property
    def chunks(self) -> list[Chunk]:
        assert [each for each in self.told if isinstance(each, Exception)] == []
        return [each for each in self.told if isinstance(each, Chunk)]

    @property
    def answer(self) -> Answer:
        found = [(chunk.token, chunk.logprobs) for chunk in self.chunks]
        return [(token, each.logprob or 0.0) for token, each in found if token is not None and each]

    @property
    def stats(self) -> Stats:
        assert self.chunks[-1].stats is not None
        return self.chunks[-1].stats


def finished(served: Scheduler, asked: Sequence[Asked]) -> None:
    while not served.is_idle:
        served.step()
        for each in asked:
            each.n_steps += 1


class Model:
    """A tiny model in a process that restarts, and one beside it that keeps nothing."""

    def __init__(self, path: Path, kv_type: str):
        self.path, self.kv_type, self.close_enough = path, kv_type, CLOSE[kv_type]
        self._plain = self.loaded()
        self._plain.pages = None
        self._plain._pages.update({"": None})
        self._known: dict[str, Answer] = {}
        self.llm = self.loaded()

    def loaded(self) -> LLM:
        """The model in a new process."""
        return mlxkv.load(self.path, dtype="float32", kv_type=self.kv_type)

    def restarted(self) -> Scheduler:
        self.llm.close()
        self.llm = self.loaded()
        return Scheduler(self.llm, 4)

    def alone(self, parts: Any, **more: Any) -> Answer:
        """The oracle's answer."""
        key = repr((parts, more))
        if key not in self._known:
            self._plain.budget.rows.clear()
            served = Scheduler(self._plain, 1)
            asked = Asked(served, parts, **more)
            finished(served, [asked])
            self._known[key] = asked.answer
        return self._known[key]

    def is_exact(self, asked: Asked, **more: Any) -> bool:
        """Whether an answer, perhaps one that was cancelled, is the oracle's."""
        expected = self.alone(asked.parts, **more)
        same = [
            a[0] == b[0] and abs(a[1] - b[1]) < self.close_enough
            for a, b in zip(asked.answer, expected, strict=False)
        ]
        # Packed KV that was rounded otherwise may choose otherwise: what follows is another text.
        return all(same[:1] if self.kv_type != "native" else same)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return {family: write(folder / family) for family, write in WRITERS.items()}


@pytest.fixture
def open_model(paths, tmp_path, monkeypatch) -> Iterator[Callable[..., Model]]:
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "1GiB")
    made: list[Model] = []

    def opened(family: str, kv_type: str = "native") -> Model:
        made.append(Model(paths[family], kv_type))
        return made[-1]

    yield opened
    for each in made:
        each.llm.close()


@pytest.fixture(params=WRITERS)
def model(request, open_model) -> Model:
    return open_model(request.param)


def forked(random: Random, history: Sequence[Parts]) -> Parts:
    """A prompt that begins like an earlier one, and perhaps goes on like it behind a change."""
    text = " ".join(random.choices(WORDS, k=random.choice((2, 25, 60))))
    part = random.choice((text, *PICTURES))
    old = random.choice(history)
    at = random.randint(0, len(old))
    return (*old[:at], part, *(old[at + 1 :] if random.random() < 0.5 else ()))[:6]


def restarted(model: Model, served: Scheduler) -> Scheduler:
    served.stop()
    return model.restarted()


def without_rows(model: Model, served: Scheduler) -> Scheduler:
    model.llm.budget.rows.clear()
    return served


def short_of_memory(model: Model, served: Scheduler) -> Scheduler:
    """Rows and pages in RAM go."""
    model.llm.budget.give_pages(1 << 40)
    return served


def undisturbed(model: Model, served: Scheduler) -> Scheduler:
    return served


EVENTS = (undisturbed, restarted, without_rows, short_of_memory)
SHIFTED = {"context": 200, "overflow": "shift"}
"""Of most prompts the beginning is dropped, wherever pictures are."""


@pytest.mark.parametrize(
    ("family", "kv_type", "n"),
    [
        ("gemma3", "native", 8),
        ("gemma3", "q8", 5),
        ("gemma3n", "native", 4),
        ("gemma4", "native", 8),
    ],
)
def test_answers_are_exact_wherever_prompts_fork_and_whatever_is_lost(
    open_model, family, kv_type, n
):
    model, random = open_model(family, kv_type), Random(4)
    served, history, n_restored = Scheduler(model.llm, 4), [(LONG, A, LONG, B, "which?")], 0
    for turn in range(n):
        event = EVENTS[turn % len(EVENTS)]
        served = event(model, served)
        prompts = [forked(random, history) for _ in range(random.choice((1, 2, 3)))]
        history += prompts
        more = SHIFTED if turn % 5 == 3 else {}
        # One of three is cancelled while its prompt is computed, or its answer.
        cancelled = {2: random.randint(1, 6)} if len(prompts) == 3 else {}
        asked = [Asked(served, each, cancelled.get(i), **more) for i, each in enumerate(prompts)]
        finished(served, asked)
        for i, each in enumerate(asked):
            assert model.is_exact(each, **more), (turn, event, each.parts)
            n_restored += 0 if i in cancelled else each.stats.restored_tokens
    assert n_restored > 100 * n
    served.stop()


def forms(content: bytes, folder: Path) -> list[Any]:
    """The same picture as anyone may give it: names and formats differ."""
    image, files = Image.open(io.BytesIO(content)), list[Any]()
    for name in ("a.bmp", "b.png", "c.tiff", "d.jpg"):
        image.save(folder / name, {"d.jpg": "PPM"}.get(name))
        files.append(folder / name)
    levels = np.asarray(image)
    clear = Image.fromarray(np.dstack([levels, np.full_like(levels[..., :1], 255)]))
    return [
        content,
        *files,
        str(files[0]),
        files[0].read_bytes(),
        image,
        levels,
        levels / 255,
        clear,
    ]


def test_a_picture_is_found_by_its_content_and_computed_once(model, tmp_path):
    given = forms(A, tmp_path)

    def ask(llm: LLM, source: Any, question: str, **more: Any) -> Stats:
        part = {"type": "image", "image": source, **more}
        content = [
            {"type": "text", "text": f"{LONG} {LONG}"},
            part,
            {"type": "text", "text": question},
        ]
        return llm.generate([{"role": "user", "content": content}], max_tokens=1).stats

    first, n_question = ask(model.llm, A, "what?"), 30
    for i, source in enumerate(given):
        stats = ask(model.llm, source, f"{i} is it?")
        assert stats.computed_tokens <= n_question, source
    assert model.llm.budget.rows.n_encoded == 1
    model.restarted()
    for i, source in enumerate(reversed(given)):
        stats = ask(model.llm, source, f"{i} was it?")
        assert stats.computed_tokens <= n_question, source
    assert model.llm.budget.rows.n_encoded == 0
    assert model.llm.model.waiting_bytes("image"), "its weights are not loaded where KV is restored"
    other = ask(model.llm, B, "what?")
    assert other.computed_tokens >= other.prompt_tokens - first.prompt_tokens + first.image_tokens
    assert other.miss is not None and "|[picture 1]" in other.miss.prompt
    assert model.llm.budget.rows.n_encoded == 1 and not model.llm.model.waiting_bytes("image")
    if model.path.name == "gemma4":
        n_own = ask(model.llm, PICTURES[3], "what?").image_tokens
        assert ask(model.llm, PICTURES[3], "and?").computed_tokens <= n_question
        larger = ask(model.llm, PICTURES[3], "what?", budget=140)
        assert larger.image_tokens > n_own and larger.computed_tokens >= larger.image_tokens


def test_a_second_picture_computes_itself_and_what_follows(model):
    talk, rows = list[Any](), model.llm.budget.rows

    def send(*parts: str | bytes) -> Stats:
        talk.extend(shown(parts))
        stats = model.llm.generate(talk, max_tokens=2).stats
        talk.append({"role": "assistant", "content": "Fine."})
        return stats

    first = send(LONG, A, "what?")
    second = send(B, "and this?")
    n_rows, most = second.image_tokens - first.image_tokens, 60
    assert second.computed_tokens <= n_rows + most and rows.n_encoded == 2
    again = send("the first again:", A)
    assert again.computed_tokens <= n_rows + most and rows.n_encoded == 2  # its rows are kept
    rows.set_limit(rows.nbytes - 1)  # the one that was used least lately goes
    assert send(A, "still?").computed_tokens <= n_rows + most and rows.n_encoded == 2
    assert send(B, "and that?").computed_tokens <= n_rows + most and rows.n_encoded == 3


@pytest.mark.parametrize(("family", "n_steps"), [("gemma3", 1), ("gemma3", 6), ("gemma4", 6)])
def test_an_answer_that_was_put_away_goes_on(open_model, tmp_path, family, n_steps):
    """While its prompt is computed, or its answer is written."""
    model = open_model(family)
    parts, more = (LONG, A, LONG, B, "which?"), {"max_tokens": 12}
    told = []
    for stop_at in (n_steps, None):
        served, files = model.restarted(), SleepFiles(tmp_path / "asleep")
        served.sleep = Sleep(files, model.path)
        asked = Asked(served, parts, **more)
        while not served.is_idle:
            served.step()
            asked.n_steps += 1
            if asked.n_steps == stop_at:
                assert served.sleep.put_away(served) == 1
        told.append(asked)
        files.close()
    asleep, woken = told
    assert isinstance(asleep.told[-1], PutAway)
    assert model.is_exact(woken, **more) and len(woken.answer) == 12
    begun = [each.token for each in asleep.told if isinstance(each, Chunk)]
    assert begun == [token for token, _ in woken.answer][: len(begun)]
    assert len(begun) < 12 and bool(begun) == (n_steps > 1)
    if begun:
        assert model.llm.budget.rows.n_encoded == 0


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_the_next_turn_is_computed_before_it_is_asked_for(open_model, family):
    """The template trims answers, so the KV of this one is of no use to the next turn."""
    model = open_model(family)
    served = Scheduler(model.llm, 4, IdleCompute("full"))
    reply = "It is a barn, and behind it the weir."
    ids = model.llm.tokenizer.encode(f"  {reply}<end_of_turn>", add_special_tokens=False)
    with scripted(deque([ids])):
        first = Asked(served, (LONG, A, "what?"), max_tokens=60, ignore_eos=False, logprobs=None)
        finished(served, [first])
    while not served.next_turns.is_empty:
        served.next_turns.step()
    assert served.counts.next_turn_tokens > 10
    answered = {"role": "assistant", "content": reply}
    talk = [*shown(first.parts), answered, *shown((B, "and this?"))]
    asked = Asked(served, talk)
    finished(served, [asked])
    assert asked.stats.ahead_tokens > 10 and model.llm.budget.rows.n_encoded == 2
    assert model.is_exact(asked)
