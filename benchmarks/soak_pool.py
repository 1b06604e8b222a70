"""What the clients of a soak ask: a pool of requests, and the order in which they are drawn.

Prompts and answers of mixed lengths; a third of the prompts have one of two documents in front;
half of the answers are sampled, each with its own seed. The pool is drawn in shuffled passes: all
of it is asked before anything is asked again. Who will hang up asks with a line of his own in
front: no page has that prompt, so there is a prefill to hang up on, and pages come and go.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.load_client import STAYS, Ask, HangUp
from benchmarks.reuse_scenarios import Text

SHORTEST = 16
GREEDY = {"temperature": 0.0}
QUESTIONS = (
    "Which of these lines is the strangest, and why?",
    "Write a poem about the third line.",
    "List every file that is named above.",
    "Go on with this log for a while.",
    "What should be done first?",
)

Count = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """How much there is.

    Args:
        requests: of the pool.
        longest: tokens of the longest prompt, about.
        answer: tokens of the longest answer.
    """

    requests: int = 12
    longest: int = 2048
    answer: int = 96


def pool(count: Count, sizes: PoolSizes, chat: bool, seed: int = 1) -> list[Ask]:
    """The requests, the first of which is the longest.

    Args:
        count: tokens of a text.
        sizes: see `PoolSizes`.
        chat: the model has a chat template: a third of the requests are messages.
        seed: of all that is drawn.
    """
    draw, text = random.Random(seed), Text(count, seed)
    documents = [text.lines(sizes.longest * part // 8) for part in (2, 4)]
    found = []
    for i in range(sizes.requests):
        question = f"{QUESTIONS[i % len(QUESTIONS)]} ({i})\n"
        if i % 3 == 1:
            head = documents[draw.randrange(2)]
        else:
            head = text.lines(sizes.longest if i == 0 else _between(draw, SHORTEST, sizes.longest))
        prompt: str | list[dict[str, str]] = head + question
        if chat and i % 6 in (1, 3):
            prompt = [{"role": "system", "content": head}, {"role": "user", "content": question}]
        n_answer = _between(draw, min(8, sizes.answer), sizes.answer)
        found.append(Ask(f"{i}", prompt, n_answer, _sampling(draw, i)))
    return found


def _between(draw: random.Random, low: int, high: int) -> int:
    """Short ones as often as long ones: even on a scale of logarithms."""
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def _sampling(draw: random.Random, i: int) -> dict[str, float]:
    if i % 2 == 0:
        return GREEDY
    seed = draw.randrange(2**31)
    return {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "seed": seed}


class Deck:
    """Draws from a pool in shuffled passes, with a hang-up now and then.

    Args:
        asks: the pool.
        hang_ups: share of the requests whose client goes before the end.
        seed: of what is drawn.

    Attributes:
        drawn: all requests that were, by name.
    """

    def __init__(self, asks: list[Ask], hang_ups: float, seed: int = 2):
        self._asks, self._hang_ups = asks, hang_ups
        self._random = random.Random(seed)
        self._left: list[Ask] = []
        self._n_notes = 0
        self.drawn: dict[str, Ask] = {}

    def draw(self) -> tuple[Ask, HangUp]:
        """The next request, and whether its client waits for the end."""
        if not self._left:
            self._left = self._random.sample(self._asks, len(self._asks))
        asked, hang_up = self._left.pop(), self._hang_up()
        if hang_up != STAYS:
            self._n_notes += 1
            asked = noted(asked, self._n_notes)
        self.drawn[asked.name] = asked
        return asked, hang_up

    def _hang_up(self) -> HangUp:
        draw = self._random
        if draw.random() >= self._hang_ups:
            return STAYS
        if draw.random() < 0.5:
            return HangUp(after_s=draw.uniform(0.02, 4.0))
        return HangUp(after_pieces=draw.randint(1, 12))


def noted(asked: Ask, number: int) -> Ask:
    """The same with a line of its own in front."""
    note, prompt = f"Note {number}.\n", asked.prompt
    if isinstance(prompt, str):
        changed: str | list[dict[str, str]] = note + prompt
    else:
        first, *rest = prompt
        changed = [{**first, "content": note + first["content"]}, *rest]
    return replace(asked, name=f"{asked.name} with note {number}", prompt=changed)
