"""Compiles grammars on threads of their own, so that nothing else waits for them.

    compiling = compiler.begin(key, build)  # build() -> (source, weight), run on such a thread
    compiling.is_done
    matcher = compiling.matcher()           # waits; a matcher of one's own

Invariants:
- llguidance compiles on a thread with enough stack, never on a caller's. Measured with
  1.9.1, a level takes 10 KiB at most: the depths that `grammar_bounds` allows take a third of it.
- What is not light (`Weight.is_light`) is compiled by another process first, on half the stack and
  within the bounds of a `Trial`: one that overflows or explodes takes nothing with it.
- What compiled, or cannot, is known by its key, `_MAX_KEPT` of them.
- A grammar that no request waits for any more is not begun.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.errors import MlxkvError, UsageError
from mlxkv.sampling.grammar_bounds import Weight
from mlxkv.sampling.grammar_trial import NO_LIBRARY

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Build = Callable[[], tuple[str, Weight]]
"""Writes a grammar as llguidance takes it, and says what it weighs."""
_LIGHT_STACK, _HEAVY_STACK = 8 * 1024**2, 32 * 1024**2
_PROGRAM = Path(__file__).with_name("grammar_trial.py")
_MAX_KEPT, _MAX_KEPT_CHARS = 32, 4 * 1024 * 1024
_N_LIGHT, _N_HEAVY = 4, 2
"""Grammars that compile at a time; the light ones do not wait for the others."""
_WAKE_S = 0.1
_stack_size = threading.Lock()


class _TooLong(UsageError):
    """Did not compile in time, on a machine that was busy: it may another time."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a grammar may take to compile, in a process of its own.

    Args:
        cpu_s: seconds of a core.
        wall_s: seconds altogether, on a machine that is busy.
        memory_bytes: address space, where the system limits it (not on macOS).
    """

    cpu_s: int = 5
    wall_s: float = 15.0
    memory_bytes: int = 2 * 1024**3

    def run(self, source: str) -> None:
        """Compile a grammar.

        Raises:
            UsageError: it takes more than it may.
            MlxkvError: no process can be started.
        """
        numbers = [int(token) for token in re.findall(r"<\[(\d{1,7})\]>", source)]
        request = {
            "source": source,
            "n_vocab": max(numbers, default=0) + 1,
            "stack_bytes": _HEAVY_STACK // 2,
            "cpu_s": self.cpu_s,
            "memory_bytes": self.memory_bytes,
        }
        try:
            ended = subprocess.run(
                [sys.executable, "-P", str(_PROGRAM)],
                input=json.dumps(request).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=self.wall_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _TooLong(f"the grammar did not compile within {self.wall_s:.0f} s") from None
        except OSError as error:
            raise MlxkvError(f"no process can be started to try the grammar: {error}") from None
        if ended.returncode == NO_LIBRARY:
            raise MlxkvError("the process that tries grammars cannot import llguidance")
        if ended.returncode:
            raise self._refused()

    def _refused(self) -> UsageError:
        return UsageError(
            f"the grammar takes more than it may to compile: {self.cpu_s} s, "
            f"{self.memory_bytes / 1024**3:.0f} GiB of memory and "
            f"{_HEAVY_STACK // 2 // 1024**2} MiB of stack; make it smaller"
        )


class Compiling:
    """A grammar that compiles, or has.

    Attributes:
        source: the grammar as llguidance takes it; "" until it is written.
    """

    def __init__(self) -> None:
        self._done = threading.Event()
        self._matcher: LLMatcher | None = None
        self._error: MlxkvError | None = None
        self.source = ""

    @property
    def is_done(self) -> bool:
        """Whether it has compiled, or failed."""
        return self._done.is_set()

    def wait(self, timeout_s: float) -> None:
        """Wait until it has, but no longer than this."""
        self._done.wait(timeout_s)

    def matcher(self) -> LLMatcher:
        """A matcher at the beginning of the grammar, which shares no state with others.

        It may be in an error state, where llguidance refuses the grammar.

        Raises:
            UsageError: the grammar is out of bounds.
        """
        while not self._done.wait(_WAKE_S):  # Ctrl-C comes through between two waits
            pass
        if self._error is not None:
            raise copy.copy(self._error)  # each its own trace
        assert self._matcher is not None
        return self._matcher if self._matcher.is_error() else self._matcher.deep_copy()

    def settle(self, matcher: LLMatcher | None, error: MlxkvError | None) -> None:
        """It has compiled, or failed."""
        self._matcher, self._error = matcher, error
        self._done.set()


class Compiler:
    """Compiles the grammars of one model.

    Args:
        tokenizer: gives the vocabulary as llguidance has it, on a thread of the compiler.
        trial: bounds of what is not light.
    """

    def __init__(self, tokenizer: Callable[[], LLTokenizer], trial: Trial = Trial()):
        self._tokenizer, self._trial = tokenizer, trial
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._all: weakref.WeakValueDictionary[Hashable, Compiling] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[Hashable, Compiling] = OrderedDict()
        self._light = threading.BoundedSemaphore(_N_LIGHT)
        self._heavy = threading.BoundedSemaphore(_N_HEAVY)

    def begin(self, key: Hashable, build: Build) -> Compiling:
        """Begin to compile a grammar, unless it is known.

        Args:
            key: the same for what is the same grammar.
            build: writes it; what that raises the grammar fails with.

        Raises:
            MlxkvError: no thread can be started.
        """
        with self._lock:
            compiling = self._all.get(key)
            if compiling is not None:
                if key in self._kept:
                    self._kept.move_to_end(key)
                return compiling
            compiling = self._all[key] = Compiling()
            wanted = weakref.ref(compiling)
            try:
                _start(_LIGHT_STACK, lambda: self._run(key, wanted, build))
            except MlxkvError:
                del self._all[key]
                raise
        return compiling

    def _run(self, key: Hashable, wanted: weakref.ref[Compiling], build: Build) -> None:
        source, matcher, error = "", None, None
        try:
            with self._light:
                if wanted() is None:
                    return
                source, weight = build()
                weight.check()
                if weight.is_light:
                    matcher = self._compile(source)
            if matcher is None:
                with self._heavy:
                    if wanted() is None:
                        return
                    self._trial.run(source)
                    matcher = self._compile_deep(source)
        except RecursionError:
            error = UsageError("the grammar nests too deeply")
        except MlxkvError as refused:
            error = refused.with_traceback(None)
        except BaseException as failed:  # a panic of a library in Rust is none of Exception
            said = " ".join(str(failed).split())[:200]
            error = UsageError(f"the grammar cannot be compiled: {said}")
        if (compiling := wanted()) is not None:
            compiling.source = source
            if error is None or type(error) is UsageError:
                self._keep(key, compiling)
            compiling.settle(matcher, error)

    def _compile(self, source: str) -> LLMatcher:
        from llguidance import LLMatcher

        with self._reading:  # the first takes up to a second
            tokenizer = self._tokenizer()
        return LLMatcher(tokenizer, source, log_level=0)

    def _compile_deep(self, source: str) -> LLMatcher:
        """The same on a large stack."""
        found: list[LLMatcher] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                found.append(self._compile(source))
            except BaseException as error:
                failed.append(error)

        _start(_HEAVY_STACK, run).join()
        if failed:
            raise failed[0]
        return found[0]

    def _keep(self, key: Hashable, compiling: Compiling) -> None:
        with self._lock:
            self._kept[key] = compiling
            n_chars = sum(len(each.source) for each in self._kept.values())
            while len(self._kept) > _MAX_KEPT or (
                n_chars > _MAX_KEPT_CHARS and len(self._kept) > 1
            ):
                n_chars -= len(self._kept.popitem(last=False)[1].source)


def _start(stack_bytes: int, function: Callable[[], None]) -> threading.Thread:
    """Run a function on a thread with a stack of a given size.

    The thread is waited for when the interpreter exits: one that comes back from Rust must not
    meet an interpreter that is gone.
    """
    thread = threading.Thread(target=function, name="mlxkv grammar")
    with _stack_size:
        before = threading.stack_size(stack_bytes)
        try:
            thread.start()
        except RuntimeError as error:
            raise MlxkvError(f"no thread can be started to compile a grammar: {error}") from None
        finally:
            threading.stack_size(before)
    return thread
