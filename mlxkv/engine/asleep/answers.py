"""Answers of one model that are put away, and wake up where they were.

A running answer has a file as soon as a page of its KV is complete, which grows with each further
page: a process that is killed loses at most the tokens behind that. A request that is sent again
gets the whole answer: what was written, and the rest.

Invariants:
- An answer wakes only for its owner, its request and its model's files.
- What cannot be kept or read is computed anew; it never fails a request.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from mlxkv.base.device import default_chunk
from mlxkv.base.faults import log_fault
from mlxkv.base.seal import seal_of_environment
from mlxkv.engine.asleep.files import Sleeper, SleepFiles
from mlxkv.engine.messages import Ask, PutAway, Sleeping
from mlxkv.engine.prompt import begin, start
from mlxkv.engine.queue.waiting import WaitingTasks
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.tasks import Task, quietly
from mlxkv.errors import MlxkvError, contained
from mlxkv.generation.asleep import Asleep, Written, request_from_json, request_to_json, seeded
from mlxkv.generation.generation import Generation
from mlxkv.kv.types import STEP
from mlxkv.store.adapters import ModelAdapters, adapter_refs, stamp_of

_log = logging.getLogger(__name__)


def described(sleeper: Sleeper) -> Sleeping:
    """An answer's file for front ends."""
    raw, ask = sleeper.ask, None
    if "request" in raw:
        try:
            request = request_from_json(raw["request"])
            path = Path(raw["model"])
            ask = Ask(
                str(path),
                request,
                raw["owner"],
                path=path,
                client=str(raw["client"]),
                label=sleeper.label,
                note=lambda: raw["note"],
                durable=bool(raw["durable"]),
            )
        except Exception as error:
            _log.warning("a request that was put away cannot be read: %s", error)
    note = raw.get("note", {})
    return Sleeping(raw["owner"], raw["model"], sleeper.label, sleeper.n_tokens, note, ask)


class Beds:
    """The sleeping answers of an engine, of all its models.

    Args:
        folder: of their files; None to put none away.

    Attributes:
        files: in the folder; None without one.
    """

    def __init__(self, folder: Path | None, adapters: ModelAdapters | None = None):
        self.files = None if folder is None else SleepFiles(folder)
        self._adapters = adapters or {}
        self._claimed: WeakSet[Task] = WeakSet()

    def claim(self, ask: Ask, task: Task) -> None:
        """Give a durable request its file, before its model is loaded."""
        if ask.durable and (path := ask.path) is not None:
            self._claimed.add(task)
            sleep = Sleep(self.files, path, stamp_of(self._adapters.get(str(path), ())))
            quietly("keeping a request failed", lambda: sleep.claim(task))

    def asleep(self, label: str = "") -> list[Sleeping]:
        """The answers that sleep, for front ends; with a label, the one that has it."""
        if self.files is None:
            return []
        if not label:
            return [described(each) for each in self.files.sleeping()]
        found = self.files.find(label)
        return [] if found is None else [described(found)]

    def dismiss(self, ask: Ask, task: Task) -> None:
        """End a request that no model has got; a durable one goes on later."""
        self.claim(ask, task)
        task.tell(self.told())

    def told(self) -> MlxkvError:
        """What requests are told when the engine stops."""
        return PutAway() if self.files is not None else MlxkvError("the engine has stopped")

    def close(self) -> None:
        """Leave the files to the next process, but those of requests that were cancelled."""
        if self.files is not None:
            for task in self._claimed:
                if task.bed and task.is_cancelled():
                    self.files.remove(task.bed)
            self.files.close()


def begin_answer(task: Task, runtime: Runtime, sleep: Sleep, waiting: WaitingTasks) -> Generation:
    """Make the answer of a request; one that was put away, where it was: its client gets that.

    Raises:
        MlxkvError: as `prompt.start`.
    """
    ready = waiting.ready(task)
    request, prepared = task.request, ready.prepared
    session = runtime.session(task.owner, request.adapter)
    quietly("looking for where an answer was failed", lambda: sleep.claim(task))
    generation = None
    if (asleep := task.asleep) is not None:
        try:
            prepared = replace(prepared, tokens=list(asleep.prompt))
            generation = start(runtime, seeded(request, asleep.seed), prepared, session)
            for chunk in generation.replay(asleep):
                task.tell(chunk)
        except BaseException as error:
            log_fault("an answer that was put away begins anew", contained(error))
            sleep.ended(task)
            sleep.claim(task)
            # What is ready may have read a part of that answer.
            prepared = ready.prepared
            generation = start(runtime, request, prepared, session)
    generation = generation or begin(runtime, request, ready, session)
    generation.prompt = prepared.tokens
    return generation


def chunks_of(task: Task, chunk: Callable[[], int | None]) -> Callable[[], int | None]:
    """Lengths of the chunks in which a request is prefilled.

    An answer that was put away has tokens of its own. They are computed one at a time, as they were
    at first, because KV that is computed otherwise differs in its last bits. A shifted answer was
    computed in chunks, and is again.
    """
    asleep, generation = task.asleep, task.generation
    if asleep is None or generation is None or generation.bound.n_dropped(len(generation.sequence)):
        return chunk

    def next_chunk() -> int | None:
        n_before = len(asleep.prompt) - generation.session.n_held
        return min(chunk() or default_chunk(), n_before) if n_before > 0 else 1

    return next_chunk


class HasTasks(Protocol):
    """A scheduler."""

    def tasks(self) -> Iterable[Task]: ...

    def stop(self, error: MlxkvError | None = None) -> None: ...


class Sleep:
    """See the module.

    Args:
        files: of the process; None to put nothing away.
        path: the model's directory.
        adapters: names those that it is loaded with, `store.adapters.stamp_of`.
    """

    def __init__(self, files: SleepFiles | None, path: Path, adapters: str = ""):
        self._files, self._path, self._adapters = files, path, adapters

    @cached_property
    def _digest(self) -> str:
        from mlxkv.store.info import digest  # a server's answers alone are kept

        return digest(self._path) + self._adapters

    def claim(self, task: Task) -> None:
        """Find where a request's answer was; a durable one gets a file if it has none."""
        if task.bed or self._files is None:
            return
        if not self._files.is_empty and (key := self._key(task)) is not None:
            found = self._files.take(key, task.label)
            if found is not None:
                task.bed, task.asleep = found.name, found.asleep
                task.kept = None if found.asleep is None else found.asleep.written
        if task.durable:
            self._make(task, self._files)

    def n_asleep(self, owner: str | None) -> int:
        """How many answers of this model sleep: an owner's, or all for None."""
        counts = {} if self._files is None else self._files.counts(owner)
        return counts.get(str(self._path), 0)

    def note(self, task: Task, generation: Generation) -> None:
        """Keep an answer so far, if a page of it is complete."""
        if self._files is not None and len(generation.sequence) % STEP == 0:
            self._keep(task, generation, self._files)

    def put_away(self, scheduler: HasTasks) -> int:
        """End all requests, and keep their answers so far; how many it were."""
        tasks = [task for task in scheduler.tasks() if not task.is_cancelled()]
        if self._files is None:
            return 0
        for task in tasks:
            if task.generation is not None:
                self._keep(task, task.generation, self._files)
            elif task.label:
                self._make(task, self._files)
            if task.bed:
                self._files.put_away(task.bed)
        scheduler.stop(PutAway())
        return len(tasks)

    def ended(self, task: Task, last: object = None) -> None:
        """Remove the file of an answer that has ended, unless it was put away."""
        if task.bed and self._files is not None and not isinstance(last, PutAway):
            self._files.remove(task.bed)
            task.bed, task.kept, task.asleep = "", None, None

    def _keep(self, task: Task, generation: Generation, files: SleepFiles) -> None:
        try:
            self._make(task, files)
            if not task.bed:
                return
            # The prompt's log-probabilities cannot be told again: such an answer begins anew.
            begun = generation.request.prompt_logprobs is None
            written = generation.written() if begun else Written()
            if task.kept is None:
                asleep = Asleep(generation.prompt, generation.sampler.seed, written)
                is_kept = files.start(task.bed, asleep)
            else:
                is_kept = files.extend(task.bed, written.since(task.kept))
            if is_kept:
                task.kept = written
            else:
                self.ended(task)
        except BaseException as error:
            log_fault("an answer is not kept over a restart", contained(error))
            self.ended(task)

    def _make(self, task: Task, files: SleepFiles) -> None:
        if task.bed or (key := self._key(task)) is None:
            return
        ask: dict[str, Any] = {"owner": task.owner, "model": str(self._path)}
        if task.label:
            request = request_to_json(task.request)
            note = {} if task.note is None else dict(task.note())
            ask |= {"request": request, "client": task.client, "note": note}
            ask["durable"] = task.durable
        task.bed = files.begin(key, task.label, ask) or ""

    def _key(self, task: Task) -> str | None:
        """What names a request's answer; None for a request that cannot be kept."""
        try:
            files = self._digest + stamp_of(adapter_refs(task.request.adapter))
            said = json.dumps([task.owner, files, request_to_json(task.request)])
        except (TypeError, ValueError, OSError, MlxkvError):
            return None
        found = hashlib.sha256(said.encode()).hexdigest()
        return seal_of_environment().fingerprint(found)[:40]
