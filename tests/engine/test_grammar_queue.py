"""Requests whose grammars compile: the others go on, and they can leave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxkv
from mlxkv.engine.scheduler import Scheduler
from mlxkv.errors import UsageError
from mlxkv.sampling import grammar_bounds
from mlxkv.sampling.grammar import Grammar
from tests.engine.test_scheduler import Asked, run
from tests.support.command_line import chat_model

DIGITS = Grammar("regex", "[0-9]{3}")


class Slow:
    """Grammars that do not compile before they may."""

    def __init__(self, scheduler: Scheduler, monkeypatch):
        maskers = scheduler.runtime.maskers
        self.go_on, build = threading.Event(), maskers._build

        def slow(grammar: Grammar):
            assert self.go_on.wait(20)
            return build(grammar)

        monkeypatch.setattr(maskers, "_build", slow)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("grammars") / "m", family="llama")


@pytest.fixture
def served(path) -> Iterator[Scheduler]:
    scheduler = Scheduler(mlxkv.load(path, dtype="float32"), max_running=4)
    yield scheduler
    scheduler.stop()
    scheduler.runtime.close()


def test_others_go_on_while_a_grammar_compiles(served, monkeypatch):
    slow = Slow(served, monkeypatch)
    bound, free = Asked(served, "a", format=DIGITS), Asked(served, "b")
    while not free.over:
        served.step()
    assert len(free.tokens) == 5
    assert not bound.told
    assert not served.is_idle
    slow.go_on.set()
    run(served)
    assert "".join(chunk.text for chunk in bound.chunks).isdigit()


def test_a_request_can_be_cancelled_while_its_grammar_compiles(served, monkeypatch):
    slow = Slow(served, monkeypatch)
    bound = Asked(served, "a", format=DIGITS)
    served.step()
    bound.cancelled = True
    served.step()
    assert bound.told == [None]
    assert served.is_idle
    slow.go_on.set()


def test_a_grammar_past_a_bound_ends_its_request_alone(served, monkeypatch):
    monkeypatch.setattr(grammar_bounds, "MAX_REPEATS", 10)
    bound, free = Asked(served, "a", format=Grammar("regex", "(a{4}){3}")), Asked(served, "b")
    run(served)
    (error,) = bound.errors
    assert isinstance(error, UsageError)
    assert "repeats a part 12 times; at most 10" in str(error)
    assert len(free.tokens) == 5
