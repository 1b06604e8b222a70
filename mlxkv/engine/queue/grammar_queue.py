"""Which waiting requests have grammars that still compile.

Invariant: compiling goes on on other threads (`grammar_compiler`); nothing here waits for it but
`wait`, which the scheduler calls when it has nothing else to do.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlxkv.engine.runtime import Runtime
from mlxkv.engine.tasks import Task, Waiting
from mlxkv.engine.tool_choice import grammar_of

_MAX_BEGUN = 16
"""Grammars that compile at a time; each takes a thread, with its stack."""


class GrammarQueue:
    """The grammars of one model's waiting requests.

    Args:
        runtime: of the model.
    """

    def __init__(self, runtime: Runtime):
        self._runtime = runtime

    def is_compiled(self, task: Task, waiting: Iterable[Task]) -> bool:
        """Whether a request's grammar has compiled, or failed; if not, it begins when it can.

        Args:
            waiting: all requests that wait.
        """
        if task.generation is not None:
            return True
        if task.compiling is None and not _has_grammar(self._runtime, task):
            return True
        if task.compiling is None:
            begun = {id(each.compiling) for each in waiting if _compiles(each)}
            if len(begun) < _MAX_BEGUN:
                return not self._begin(task)
        return not _compiles(task) and task.compiling is not None

    def wait(self, waiting: Iterable[Task], timeout_s: float) -> None:
        """Wait for one of the grammars that compile, but no longer than this."""
        compiling = next((each.compiling for each in waiting if _compiles(each)), None)
        if compiling is not None:
            compiling.wait(timeout_s)

    def _begin(self, task: Task) -> bool:
        """Begin a request's grammar; whether it compiles now."""
        try:
            grammar = grammar_of(self._runtime, task.request)
            if grammar is not None:
                task.compiling = self._runtime.maskers.begin(grammar, task.owner)
        except Exception:  # told when the request starts, which tries again
            return False
        return _compiles(task)


def _has_grammar(runtime: Runtime, task: Task) -> bool:
    state = task.state
    if isinstance(state, Waiting) and state.has_grammar is not None:
        return state.has_grammar
    try:
        found = grammar_of(runtime, task.request) is not None
    except Exception:  # told when the request starts
        found = False
    if isinstance(state, Waiting):
        state.has_grammar = found
    return found


def _compiles(task: Task) -> bool:
    return task.compiling is not None and not task.compiling.is_done
