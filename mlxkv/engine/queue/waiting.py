"""The waiting requests of one model, of which a long prompt is prepared on another thread first.

Requests that are ready begin meanwhile; one that is prepared has its place among its owner's again.
"""

from __future__ import annotations

from mlxkv.engine.prompt import Ready, make_ready
from mlxkv.engine.queue.grammar_queue import GrammarQueue
from mlxkv.engine.queue.preparation import MAX_PREPARED, Preparation, takes_long
from mlxkv.engine.queue.shares import FairQueue
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.tasks import Task, Waiting

COMPILING_S = 0.01
"""How long a step waits for a grammar where it has nothing else to do."""


class WaitingTasks(FairQueue):
    """See the module.

    Args:
        runtime: the model; its `preparer` prepares long prompts.
    """

    def __init__(self, runtime: Runtime):
        super().__init__()
        self._runtime, self._text_side = runtime, runtime.text_side()
        self._preparations: dict[Task, Preparation] = {}
        self._grammars = GrammarQueue(runtime)

    @property
    def has_work(self) -> bool:
        """Whether a request can begin, or be prepared, or was cancelled."""
        return any(task.is_cancelled() or not self._is_pending(task) for task in self)

    def ready(self, task: Task) -> Ready:
        """What the answer to a request that was taken out is made of; raises as `make_ready`."""
        preparation = self._preparations.pop(task, None)
        return self._ready(task) if preparation is None else preparation.result()

    def remove(self, task: Task) -> None:
        """Remove a request, and end its preparation; nothing if it is not here."""
        super().remove(task)
        if (preparation := self._preparations.pop(task, None)) is not None:
            preparation.stop()

    def is_ready(self, task: Task) -> bool:
        """Whether a request can begin; if not, its preparation begins as soon as it can."""
        is_compiled = self._grammars.is_compiled(task, self)
        if self._is_pending(task):
            return False
        if task in self._preparations or not self._is_long(task):
            return is_compiled
        preparer = self._runtime.preparer
        assert preparer is not None
        made = preparer.start(lambda: self._ready(task), task.is_cancelled)
        self._preparations[task] = made
        return False

    def wait_for_grammars(self) -> None:
        """Wait a little for a grammar that compiles, if there is one."""
        self._grammars.wait(self, COMPILING_S)

    def _is_pending(self, task: Task) -> bool:
        """Whether a request can neither begin nor be prepared now."""
        if (preparation := self._preparations.get(task)) is not None:
            return not preparation.done
        return len(self._preparations) >= MAX_PREPARED and self._is_long(task)

    def _is_long(self, task: Task) -> bool:
        state = task.state
        assert isinstance(state, Waiting)
        if state.is_long is None:
            has_thread = self._runtime.preparer is not None and task.generation is None
            state.is_long = has_thread and takes_long(task.request)
        return state.is_long

    def _ready(self, task: Task) -> Ready:
        return make_ready(self._text_side, task.request, task.owner)
