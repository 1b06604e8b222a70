"""What the reuse benchmark sends: conversations turn by turn, each prompt whole, as agents do.

A turn is made of pieces: text, or the number of an earlier turn, whose answer stands there word
for word as the engine gave it. So each engine goes on from its own answers, which is the best case
for a cache that can only be continued at its very end; `rewritten` is the same conversation with
answers as a client writes them back (a tool call set anew, reasoning left out), which no engine
has generated. Both decode greedily over the same weights, so prompts differ between engines only
where their rounding tips a choice over; the report says for how many turns they were the same.

What is least possible of a turn: the prompt without the longest prefix that it shares with anything
sent or generated before it, but at least one token, whose logits are the answer's first.

No MLX in here, and nothing that depends on an engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Count = Callable[[str], int]
"""Tokens of a text, without what opens a document."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long everything is, in tokens (about: whole lines are added until they are reached).

    Args:
        turns: of the agent's conversation.
        start: its first prompt.
        grow_low, grow_high: what a turn adds besides the answer.
        history: the conversation that is edited.
        document: the document that is asked about.
        questions: about it, behind the first.
        alternate: turns of each of the two conversations.
        restart: the conversation that a new process goes on with.
        answer: tokens generated in each turn.
    """

    turns: int = 20
    start: int = 600
    grow_low: int = 100
    grow_high: int = 150
    history: int = 3000
    document: int = 3000
    questions: int = 4
    alternate: int = 8
    restart: int = 4096
    answer: int = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt.

    Args:
        label: what is asked here.
        conversation: which conversation it belongs to.
        pieces: text, or the number of an earlier turn whose answer stands there.
    """

    label: str
    conversation: str
    pieces: tuple[str | int, ...]

    def prompt(self, answers: Sequence[str]) -> str:
        """The whole text, with the answers of the turns before."""
        return "".join(p if isinstance(p, str) else answers[p] for p in self.pieces)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A list of turns.

    Args:
        name: what it is called.
        turns: in the order in which they are sent.
        restart: number of the turn before which the process is started anew.
        fork: the text that several turns begin with, for an engine that is told so.
    """

    name: str
    turns: tuple[Turn, ...]
    restart: int | None = None
    fork: str | None = None

    @classmethod
    def from_dict(cls, raw: dict) -> Scenario:
        """What `dataclasses.asdict` made, also by way of JSON."""
        turns = tuple(Turn(t["label"], t["conversation"], tuple(t["pieces"])) for t in raw["turns"])
        return cls(raw["name"], turns, raw["restart"], raw["fork"])


@dataclass(frozen=True, slots=True)
class Shared:
    """What a prompt has in common with one sequence that was there before.

    Args:
        n_tokens: leading tokens that are the same.
        held_tokens: length of that sequence: how far its window layers have moved on.
    """

    n_tokens: int = 0
    held_tokens: int = 0


def longest_shared(prompt: Sequence[int], known: Iterable[Sequence[int]]) -> Shared:
    """The longest prefix that a prompt shares with a known sequence, the shortest such one."""
    best = Shared()
    for held in known:
        n = n_common(prompt, held)
        if n and (n, -len(held)) > (best.n_tokens, -best.held_tokens):
            best = Shared(n, len(held))
    return best


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Leading tokens that two sequences have in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def least_tokens(prompt: Sequence[int], known: Iterable[Sequence[int]]) -> int:
    """Tokens that have to be computed of a prompt, whatever was kept of all before."""
    return max(1, len(prompt) - longest_shared(prompt, known).n_tokens)


@dataclass(frozen=True, slots=True)
class Markup:
    """How a conversation is written down: with the markers of the model's own chat template.

    Only markers that are single tokens keep an answer's last token from merging with what follows.
    """

    opening: str
    closing: str
    assistant: str

    @classmethod
    def of(cls, has_token: Callable[[str], bool]) -> Markup:
        """That of a model; plain text where its vocabulary has no markers."""
        if has_token("<|im_end|>"):
            return cls("<|im_start|>{}\n", "<|im_end|>\n", "assistant")
        if has_token("<end_of_turn>"):
            return cls("<start_of_turn>{}\n", "<end_of_turn>\n", "model")
        return cls("{}: ", "\n\n", "assistant")

    def message(self, role: str, text: str) -> str:
        return self.opening.format(role) + text + self.closing

    @property
    def ask(self) -> str:
        """What the answer comes behind."""
        return self.opening.format(self.assistant)


NOUNS = """parser buffer queue token window page cache lock socket index record thread batch header
client folder signal packet counter branch kernel schema cursor bucket stream worker"""
VERBS = "reads drops splits holds moves copies checks joins counts closes opens skips"
WORDS = "late small empty stale third local remote hidden second broken distant large"


class Text:
    """Lines that never repeat for long, the same for the same seed.

    Args:
        count: tokens of a text.
        seed: of the choice of words.
    """

    def __init__(self, count: Count, seed: int):
        self._count, self._random = count, random.Random(seed)
        self._nouns, self._verbs, self._words = (words.split() for words in (NOUNS, VERBS, WORDS))

    def lines(self, n_tokens: int) -> str:
        """Whole lines of at least `n_tokens` together."""
        lines, n = [], 0
        while n < n_tokens:
            lines.append(self._line())
            n += self._count(lines[-1])
        return "".join(lines)

    def between(self, low: int, high: int) -> str:
        return self.lines(self._random.randint(low, high))

    def _line(self) -> str:
        draw = self._random
        a, b, c = (draw.choice(self._nouns) for _ in range(3))
        verb, word, number = draw.choice(self._verbs), draw.choice(self._words), draw.random()
        match draw.randrange(3):
            case 0:
                return f"src/{a}/{b}.py:{number * 1000:.0f}: the {word} {c} {verb} it\n"
            case 1:
                return f"{number * 1e4:05.0f} {a}-{b} {verb} {c} in {draw.randrange(512)} ms\n"
            case _:
                return f"The {word} {a} {verb} the {b}, then the {c}.\n"


class Writer:
    """Writes the scenarios for one model.

    Args:
        count: tokens of a text.
        markup: how its conversations are written.
        sizes: how long everything is.
    """

    def __init__(self, count: Count, markup: Markup, sizes: Sizes):
        self._count, self._markup, self._sizes = count, markup, sizes

    def all(self) -> dict[str, Scenario]:
        """Every scenario by its name, in the order in which they are run."""
        scenarios = (
            self.agent(),
            self.rewritten(),
            self.edit(),
            self.document(),
            self.two(),
            self.restart(),
        )
        return {scenario.name: scenario for scenario in scenarios}

    def agent(self) -> Scenario:
        """A growing history; the engine's own answers in it."""
        return Scenario("agent", tuple(self._growing("agent", 1, self._sizes.turns)))

    def rewritten(self) -> Scenario:
        """The same, with answers that the client has written back in its own way."""
        calls = Text(self._count, 2)
        turns = self._growing("rewritten", 1, self._sizes.turns, calls)
        return Scenario("rewritten", tuple(turns))

    def edit(self) -> Scenario:
        """A line in the middle of the history is changed, and changed back."""
        text, markup = Text(self._count, 3), self._markup
        messages = self._history(text, self._sizes.history)
        ask = self._user(text)
        middle = len(messages) // 4 * 2  # a message of the user
        edited = list(messages)
        edited[middle] = markup.message("user", text.between(*self._growth))
        original, changed = "".join(messages) + ask, "".join(edited) + ask
        following = markup.closing + self._user(text)
        return Scenario(
            "edit",
            (
                Turn("history", "edit", (original,)),
                Turn("edited in the middle", "edit", (changed,)),
                Turn("goes on from the edit", "edit", (changed, 1, following)),
                Turn("back to the original", "edit", (original, 0, following)),
            ),
        )

    def document(self) -> Scenario:
        """One document, question after question, none of which knows of the others."""
        text, markup = Text(self._count, 4), self._markup
        fork = markup.message(
            "system", "Answer from this text.\n" + text.lines(self._sizes.document)
        )
        turns = (
            Turn(f"question {i + 1}", "document", (fork + self._user(text, 20, 30),))
            for i in range(self._sizes.questions + 1)
        )
        return Scenario("document", tuple(turns), fork=fork)

    def two(self) -> Scenario:
        """Two conversations in turn, under the same instructions."""
        sizes = self._sizes
        one = self._growing("A", 5, sizes.alternate)
        other = self._growing("B", 6, sizes.alternate)
        turns = []
        for pair in zip(one, other, strict=True):
            for side, turn in enumerate(pair):
                # Answers are counted over both: turn i of a side is number 2i + side.
                pieces = tuple(p if isinstance(p, str) else 2 * p + side for p in turn.pieces)
                turns.append(Turn(f"{turn.conversation}: {turn.label}", turn.conversation, pieces))
        return Scenario("two", tuple(turns))

    def restart(self) -> Scenario:
        """A long conversation, two turns in one process and one in the next."""
        text, markup, sizes = Text(self._count, 7), self._markup, self._sizes
        later = 3 * sizes.grow_high + 2 * sizes.answer
        messages = self._history(text, max(1, sizes.restart - later))
        pieces: list[str | int] = ["".join(messages) + self._user(text)]
        turns = [Turn("history", "restart", tuple(pieces))]
        for i, label in enumerate(("next turn", "after the restart")):
            pieces += [i, markup.closing + self._user(text)]
            turns.append(Turn(label, "restart", tuple(pieces)))
        return Scenario("restart", tuple(turns), restart=2)

    @property
    def _growth(self) -> tuple[int, int]:
        return self._sizes.grow_low, self._sizes.grow_high

    def _user(self, text: Text, low: int | None = None, high: int | None = None) -> str:
        """A user's message or a tool's output, and the opening of the answer."""
        sizes = self._sizes
        said = text.between(low or sizes.grow_low, high or sizes.grow_high)
        return self._markup.message("user", said) + self._markup.ask

    def _growing(self, name: str, seed: int, n_turns: int, calls: Text | None = None) -> list[Turn]:
        """Turns of which each holds the one before, its answer and something new.

        The answer is the engine's own, or a line of `calls`.
        """
        # The same instructions for every conversation, as one program's agents have them.
        common = Text(self._count, 0).lines(max(1, self._sizes.start - self._sizes.grow_high))
        text = Text(self._count, seed)
        system = self._markup.message("system", "You call tools. These are known:\n" + common)
        pieces: list[str | int] = [system + self._user(text)]
        turns = [Turn("turn 1", name, tuple(pieces))]
        for i in range(1, n_turns):
            answer = i - 1 if calls is None else calls.lines(self._sizes.answer).rstrip()
            pieces += [answer, self._markup.closing + self._user(text)]
            turns.append(Turn(f"turn {i + 1}", name, tuple(pieces)))
        return turns

    def _history(self, text: Text, n_tokens: int) -> list[str]:
        """Messages of user and assistant in turn, of at least `n_tokens` together."""
        markup, messages, n = self._markup, [], 0
        while n < n_tokens:
            messages.append(markup.message("user", text.between(*self._growth)))
            messages.append(markup.message(markup.assistant, text.lines(self._sizes.answer)))
            n += sum(map(self._count, messages[-2:]))
        return messages
