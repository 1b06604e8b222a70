"""Grammars compile on other threads, what is not light in a process that may be lost first."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest

from mlxkv.errors import MlxkvError, UsageError
from mlxkv.sampling import grammar_bounds, grammar_compiler
from mlxkv.sampling.grammar import Grammar, Maskers
from mlxkv.sampling.grammar_bounds import Weight
from mlxkv.sampling.grammar_compiler import Compiler, Trial
from mlxkv.text.tokenizer import Tokenizer
from tests.support.paths import TOKENIZERS

DIGITS = Grammar("regex", "[0-9]{3}")
LIGHT = Weight()
HEAVY = Weight(size=10**6)


class Library:
    """Stands in for llguidance's vocabulary: says when it is asked for, and may wait or fail."""

    def __init__(self, error: BaseException | None = None):
        self.asked, self.go_on, self.error = 0, threading.Event(), error
        self.go_on.set()

    def __call__(self):
        self.asked += 1
        assert self.go_on.wait(10)
        if self.error is not None:
            raise self.error
        return TOKENIZER._backend


@pytest.fixture(scope="module", autouse=True)
def tokenizer() -> None:
    global TOKENIZER
    TOKENIZER = Maskers(Tokenizer.from_dir(TOKENIZERS / "byte_level"))


TOKENIZER: Maskers


def ended() -> None:
    """The threads have let go of what they compiled."""
    for thread in threading.enumerate():
        if thread.name == "mlxkv grammar":
            thread.join()
    gc.collect()


def lark(weight: Weight = LIGHT, text: str = 'start: "a"'):
    from llguidance import LLMatcher

    return lambda: (LLMatcher.grammar_from_lark(text), weight)


def program(monkeypatch, tmp_path: Path, text: str) -> None:
    """The process in which a grammar is tried does this instead."""
    path = tmp_path / "program.py"
    path.write_text(text)
    monkeypatch.setattr(grammar_compiler, "_PROGRAM", path)


def test_a_caller_does_not_wait_until_it_asks_for_the_matcher():
    library = Library()
    library.go_on.clear()
    compiling = Compiler(library).begin("a", lark())
    compiling.wait(0.01)
    assert not compiling.is_done
    library.go_on.set()
    assert not compiling.matcher().is_error()
    assert compiling.is_done


def test_matchers_of_one_grammar_share_no_state():
    compiling = Compiler(Library()).begin("a", lark(text='start: "ab"'))
    first, second = compiling.matcher(), compiling.matcher()
    a = TOKENIZER._tokenizer.encode("a", add_special_tokens=False)
    assert first.consume_tokens(a)
    assert second.consume_tokens(a)
    assert not second.consume_tokens(a)
    assert not first.is_error()


def test_a_known_grammar_is_not_compiled_again_and_owners_do_not_share():
    maskers = Maskers(TOKENIZER._tokenizer)
    first = maskers.begin(DIGITS, "anna")
    assert maskers.begin(DIGITS, "anna") is first
    assert maskers.begin(DIGITS, "ben") is not first
    first.matcher()
    del first
    ended()
    assert maskers.begin(DIGITS, "anna").is_done


def test_the_least_recent_grammars_are_forgotten(monkeypatch):
    monkeypatch.setattr(grammar_compiler, "_MAX_KEPT", 2)
    library = Library()
    compiler = Compiler(library)
    for key in "abacb":
        compiler.begin(key, lark()).matcher()
        ended()
    assert library.asked == 4  # b again: c came when a had been used after it


def test_a_grammar_that_nothing_waits_for_is_not_begun(monkeypatch):
    monkeypatch.setattr(grammar_compiler, "_N_LIGHT", 1)
    library = Library()
    library.go_on.clear()
    compiler, built = Compiler(library), []
    first = compiler.begin("a", lark())
    second = compiler.begin("b", lambda: built.append("b") or lark()())
    third = compiler.begin("c", lambda: built.append("c") or lark()())
    del second
    gc.collect()
    library.go_on.set()
    first.matcher()
    third.matcher()
    assert built == ["c"]


def test_what_is_heavy_is_tried_in_a_process_and_then_compiles(monkeypatch):
    monkeypatch.setattr(grammar_bounds, "_LIGHT_SIZE", 0)
    tried = []
    run = Trial.run
    monkeypatch.setattr(Trial, "run", lambda trial, source: tried.append(run(trial, source)))
    masker = Maskers(TOKENIZER._tokenizer).masker(DIGITS)
    assert masker.allowed(TOKENIZER._tokenizer.n_vocab).any()
    assert tried == [None]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "takes more than it may"),
        ("raise SystemExit(3)", "cannot import llguidance"),
        ("import threading; threading.Event().wait()", "did not compile within 1 s"),
    ],
)
def test_a_process_that_is_lost_takes_one_grammar_with_it(monkeypatch, tmp_path, text, said):
    program(monkeypatch, tmp_path, text)
    compiler = Compiler(Library(), Trial(wall_s=1.0))
    with pytest.raises(MlxkvError, match=said):
        compiler.begin("heavy", lark(HEAVY)).matcher()
    assert not compiler.begin("light", lark()).matcher().is_error()


def test_what_may_succeed_another_time_is_not_remembered(monkeypatch, tmp_path):
    program(monkeypatch, tmp_path, "raise SystemExit(3)")
    compiler = Compiler(Library())
    with pytest.raises(MlxkvError):
        compiler.begin("a", lark(HEAVY)).matcher()
    ended()
    program(monkeypatch, tmp_path, "")
    assert not compiler.begin("a", lark(HEAVY)).matcher().is_error()


def test_whatever_a_library_raises_refuses_the_grammar():
    class Panic(BaseException):
        pass

    compiling = Compiler(Library(Panic("index out of\nbounds"))).begin("a", lark())
    for _ in range(2):
        with pytest.raises(UsageError, match="cannot be compiled: index out of bounds"):
            compiling.matcher()


def test_a_grammar_past_a_bound_is_refused_before_the_library_sees_it():
    library = Library()
    with pytest.raises(UsageError, match="5,000 levels"):
        Compiler(library).begin("a", lark(Weight(depth=5000))).matcher()
    assert library.asked == 0
