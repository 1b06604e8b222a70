"""Answers that are put away go on where they were, to the token that an uninterrupted run gives."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.engine.asleep.answers import Sleep
from mlxkv.engine.asleep.files import SleepFiles
from mlxkv.engine.messages import PutAway
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.generation.asleep import Asleep, Written, request_from_json, request_to_json
from mlxkv.generation.outputs import Chunk, join_parts
from mlxkv.generation.request import Request
from mlxkv.sampling.grammar import Grammar
from mlxkv.text.tokenizer import Tokenizer
from tests.families.oracle.cases import CASES, LONG, Case
from tests.families.test_parity import Golden
from tests.support.command_line import chat_model
from tests.support.tiny import tokens as random_tokens

FAMILIES = list(
    {
        case.name.rpartition("-")[0]: case
        for case in CASES
        if case.n_prompt == LONG and not case.prefill_in_one
    }.values()
)
SEEDED = {"temperature": 1.0, "seed": 11, "presence_penalty": 0.5, "repeat_penalty": 1.2}
Item = Chunk | BaseException | None


@pytest.fixture(autouse=True)
def kv(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLXKV_KV", str(tmp_path / "kv"))
    monkeypatch.setenv("MLXKV_KV_DISK", "4GiB")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("sleep") / "m", ascii=True)


@pytest.fixture
def open_files(tmp_path) -> Iterator[Callable[..., SleepFiles]]:
    made: list[SleepFiles] = []

    def open_files(**options: Any) -> SleepFiles:
        """Those of a new process: of the last one, all is released."""
        for files in made:
            files.close()
        made.append(SleepFiles(tmp_path / "asleep", **options))
        return made[-1]

    yield open_files
    for files in made:
        files.close()


def of_llama(path: Path) -> Runtime:
    return mlxkv.load(path, dtype="float32")


def scheduled(runtime: Runtime, files: SleepFiles | None) -> Scheduler:
    scheduler = Scheduler(runtime, 16)
    scheduler.sleep = Sleep(files, runtime.path)
    return scheduler


def run(
    runtime: Runtime,
    requests: Sequence[Request],
    files: SleepFiles | None = None,
    stop_at: int | None = None,
    *,
    owner: str = "",
    killed: bool = False,
) -> list[list[Item]]:
    """Answer requests, up to so many tokens; then put them away, unless the process is killed."""
    scheduler = scheduled(runtime, files)
    told: list[list[Item]] = [[] for _ in requests]
    for request, items in zip(requests, told, strict=True):
        scheduler.add(Task(request, items.append, lambda: False, owner))
    while not scheduler.is_idle:
        scheduler.step()
        if stop_at is not None and len(told[0]) >= stop_at:
            if killed:
                return told
            assert scheduler.sleep.put_away(scheduler) == len(requests)
    scheduler.stop()
    runtime.close()
    return told


def tokens(items: Sequence[Item]) -> list[int]:
    return [x.token for x in items if isinstance(x, Chunk) and x.token is not None]


def logprobs(items: Sequence[Item]) -> list[float | None]:
    parts = (x.logprobs for x in items if isinstance(x, Chunk))
    return [part.logprob for part in parts if part is not None]


def reply(items: Sequence[Item]) -> Any:
    return join_parts(x for x in items if isinstance(x, Chunk))


def assert_wakes(
    make: Callable[[], Runtime], requests: Sequence[Request], open_files: Any, stop_at: int
) -> None:
    whole = run(make(), requests)
    begun = run(make(), requests, open_files(), stop_at)
    assert all(isinstance(items[-1], PutAway) for items in begun)
    woken = run(make(), requests, open_files())
    for expected, first, found in zip(whole, begun, woken, strict=True):
        n = len(tokens(first))
        assert 0 < n < len(tokens(expected)), "it was not put away in its middle"
        assert tokens(found)[:n] == tokens(first)
        assert tokens(found) == tokens(expected)
        assert reply(found) == reply(expected)
        last, wanted = found[-2], expected[-2]
        assert isinstance(last, Chunk) and isinstance(wanted, Chunk)
        assert last.stats is not None and wanted.stats is not None
        assert last.finish_reason == wanted.finish_reason
        for name in ("prompt_tokens", "generated_tokens", "shifted_tokens"):
            assert getattr(last.stats, name) == getattr(wanted.stats, name)
    assert open_files().is_empty, "the file of an answer that has ended is there"


@functools.cache
def family_model(path: Path) -> Any:
    return mlxkv.load_model(path, dtype=mx.float32)


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


def of_family(case: Case, folder: Path, llama: Path, kv_type: str = "native") -> Runtime:
    path = folder / case.name
    if not path.exists():
        Golden.read(case.name).write(path, "new")
    return Runtime(family_model(path), Tokenizer.from_dir(llama), path, kv_type)


def asked(n: int = 14, **options: Any) -> Request:
    prompt = random_tokens(300, vocab_size=90)
    return Request.of(prompt, max_tokens=n, ignore_eos=True, **options)


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_every_family_goes_on_greedy_and_seeded(case, family_folder, llama, open_files):
    requests = [asked(), asked(**SEEDED)]
    assert_wakes(lambda: of_family(case, family_folder, llama), requests, open_files, 6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_quantized_kv_goes_on(family, family_folder, llama, open_files):
    (case,) = (case for case in FAMILIES if case.name.startswith(f"{family}-"))
    assert_wakes(
        lambda: of_family(case, family_folder, llama, "q8"), [asked(**SEEDED)], open_files, 6
    )


def test_an_answer_with_drafts_goes_on(llama, open_files):
    prompt = random_tokens(12, vocab_size=90) * 9
    requests = [
        Request.of(prompt, max_tokens=90, ignore_eos=True, draft="lookup", **options)
        for options in ({"temperature": 0.0}, SEEDED)
    ]
    last = run(of_llama(llama), requests)[0][-2]
    assert isinstance(last, Chunk) and last.stats is not None
    assert last.stats.drafts is not None and last.stats.drafts.accepted, "there are no drafts"
    assert_wakes(lambda: of_llama(llama), requests, open_files, 40)


def test_a_grammar_and_calls_go_on(llama, open_files):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": 30, "maxLength": 40}},
        "required": ["a"],
    }
    messages = [{"role": "user", "content": "hello"}]
    request = Request.of(messages, format=Grammar.of(schema), max_tokens=200, **SEEDED)
    assert_wakes(lambda: of_llama(llama), [request], open_files, 14)


def test_a_shifted_context_goes_on(llama, open_files):
    options: Any = {"context": 256, "overflow": "shift", "ignore_eos": True}
    request = Request.of("abc" * 60, max_tokens=180, **options)
    assert_wakes(lambda: of_llama(llama), [request], open_files, 130)


def test_logprobs_and_stop_texts_go_on(llama, open_files):
    plain = Request.of("hello", max_tokens=60, logprobs=2)
    text = reply(run(of_llama(llama), [plain])[0])[0]
    request = dataclasses.replace(plain, stop=(text[40:43],))
    assert_wakes(lambda: of_llama(llama), [request], open_files, 9)
    run(of_llama(llama), [plain], open_files(), 9)
    for x in run(of_llama(llama), [plain], open_files())[0]:
        assert x is None or isinstance(x, Chunk)
        assert x is None or (x.logprobs is not None and len(x.logprobs.top) == 2)


def test_a_seed_that_was_drawn_is_kept(llama, open_files):
    request = Request.of("hello", max_tokens=40, temperature=2.0, ignore_eos=True)
    first = tokens(run(of_llama(llama), [request], open_files(), 20)[0])
    files = open_files()
    (sleeper,) = files.sleeping()
    assert sleeper.asleep is not None
    seeded = dataclasses.replace(
        request, sampling=dataclasses.replace(request.sampling, seed=sleeper.asleep.seed)
    )
    found = tokens(run(of_llama(llama), [request], files)[0])
    assert found[: len(first)] == first and found == tokens(run(of_llama(llama), [seeded])[0])


def test_a_request_that_waits_for_its_first_token_goes_on(llama, open_files):
    request = Request.of("hello", max_tokens=5, **SEEDED)
    scheduler = scheduled(of_llama(llama), open_files())
    told: list[Item] = []
    scheduler.add(Task(request, told.append, lambda: False, label="one", note=lambda: {"n": 1}))
    assert scheduler.sleep.put_away(scheduler) == 1 and isinstance(told[-1], PutAway)
    files = open_files()
    found = files.find("one")
    assert found is not None and found.ask["note"] == {"n": 1} and found.n_tokens == 0
    assert tokens(run(of_llama(llama), [request], files)[0]) == tokens(
        run(of_llama(llama), [request])[0]
    )


def test_a_killed_process_loses_what_is_behind_its_last_page(llama, open_files):
    request = Request.of("x" * 200, max_tokens=90, ignore_eos=True, logprobs=0, **SEEDED)
    run(of_llama(llama), [request], open_files(), 80, killed=True)
    files = open_files()
    assert [each.n_tokens for each in files.sleeping()] == [56]  # 256 tokens of both
    woken, whole = run(of_llama(llama), [request], files)[0], run(of_llama(llama), [request])[0]
    assert tokens(woken) == tokens(whole)
    # To the last bit, or a draw could fall the other way.
    assert logprobs(woken) == logprobs(whole)


def test_an_answer_wakes_for_its_owner_its_request_and_its_model_alone(llama, open_files):
    request = Request.of("hello", max_tokens=12, temperature=0.0)
    run(of_llama(llama), [request], open_files(), 6, owner="a")
    files = open_files()
    others = [dataclasses.replace(request, max_tokens=13), Request.of("hello.", max_tokens=12)]
    run(of_llama(llama), others, files, owner="a")
    run(of_llama(llama), [request], files, owner="b")
    config = llama / "config.json"
    before = config.stat()
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    run(of_llama(llama), [request], files, owner="a")
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [each.n_tokens for each in files.sleeping()] == [6]
    run(of_llama(llama), [request], files, owner="a")
    assert files.is_empty


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_damaged_file_fails_no_request(cut, llama, open_files):
    request = Request.of("hello", max_tokens=20, temperature=0.0)
    run(of_llama(llama), [request], open_files(), 9)
    files = open_files()
    (path,) = files._folder.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:cut])
    found = run(of_llama(llama), [request], files)[0]
    assert tokens(found) == tokens(run(of_llama(llama), [request])[0])


def test_an_answer_that_the_model_cannot_have_written_begins_anew(llama, open_files):
    request = Request.of("hello", max_tokens=30, format=Grammar("regex", "[a-z]{8,20}"))
    run(of_llama(llama), [request], open_files(), 6)
    files = open_files()
    (path,) = files._folder.glob("*.jsonl")
    *lines, last = path.read_text().splitlines()
    line = json.loads(last)
    line["written"]["tokens"][2] = 3 + ord("!") - 33  # the byte "!", which is no letter
    path.write_text("\n".join([*lines, json.dumps(line), ""]))
    found = run(of_llama(llama), [request], files)[0]
    assert reply(found) == reply(run(of_llama(llama), [request])[0])


def test_a_full_disk_fails_no_request(llama, open_files, monkeypatch):
    files = open_files()

    def full(*_: Any) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(files, "_write", full)
    request = Request.of("x" * 250, max_tokens=12)
    assert len(tokens(run(of_llama(llama), [request], files)[0])) == 12


class TestFiles:
    @pytest.mark.parametrize("key", ["", "00" * 32])
    def test_with_a_key_they_hold_no_text_and_another_key_finds_none(
        self, key, tmp_path, monkeypatch
    ):
        if key:
            pytest.importorskip("cryptography")
        monkeypatch.setenv("MLXKV_KV_KEY", key)
        files = SleepFiles(tmp_path)
        name = files.begin("a" * 40, "one", {**self.ASK, "note": "secret text"})
        assert name is not None and files.start(name, Asleep([1, 2], 3, Written([4])))
        files.put_away(name)
        assert (b"secret text" in (files._folder / name).read_bytes()) is not bool(key)
        found = files.find("one")
        assert found is not None and found.asleep == Asleep([1, 2], 3, Written([4], [], []))
        files.close()
        monkeypatch.setenv("MLXKV_KV_KEY", "11" * 32 if key else "")
        assert len(SleepFiles(tmp_path).sleeping()) == (0 if key else 1)

    ASK: ClassVar[dict[str, str]] = {"owner": "", "model": "m"}

    def test_another_living_process_keeps_its_own(self, tmp_path):
        first = SleepFiles(tmp_path)
        name = first.begin("a" * 40, "", self.ASK)
        assert name is not None
        first.put_away(name)
        assert SleepFiles(tmp_path).is_empty
        first.close()
        assert [each.name for each in SleepFiles(tmp_path).sleeping()] == [name]

    def test_the_oldest_go_first_and_a_running_one_stays(self, tmp_path):
        files = SleepFiles(tmp_path, max_files=3)
        running = files.begin("f" * 40, "", self.ASK)
        for i in range(4):
            name = files.begin(f"{i}" * 40, "", self.ASK)
            assert name is not None
            files.put_away(name)
            os.utime(files._folder / name, (i, i + 1e9))
        monday = SleepFiles(tmp_path / "other", max_bytes=400)
        assert monday.begin("a" * 40, "", {**self.ASK, "note": "x" * 200}) is None
        files._keep_s = 1e12
        assert [each.name[0] for each in files.sleeping()] == ["2", "3"]
        assert running is not None and (files._folder / running).exists()

    def test_they_are_counted_by_model_and_owner(self, tmp_path):
        files = SleepFiles(tmp_path)
        for i, owner in enumerate("aab"):
            name = files.begin(f"{i}" * 40, "", {"owner": owner, "model": f"/m{i % 2}"})
            assert name is not None
            if i:
                files.put_away(name)
        assert files.counts() == {"/m1": 1, "/m0": 1} and files.counts("a") == {"/m1": 1}
        assert files.take("1" * 40) is not None and files.counts("a") == {}

    def test_they_expire(self, tmp_path):
        now = 0.0
        files = SleepFiles(tmp_path, keep_s=10, clock=lambda: now)
        name = files.begin("a" * 40, "", self.ASK)
        assert name is not None
        files.put_away(name)
        now = (files._folder / name).stat().st_mtime + 9
        assert files.take("b" * 40) is None and not files.is_empty
        now += 2
        assert files.take("a" * 40) is None and files.is_empty


def test_a_request_is_the_same_behind_json():
    request = Request.of(
        [{"role": "user", "content": "é"}],
        format="json",
        stop=["a", "b"],
        logit_bias={3: 1.5, 10: -2.0},
        tools=[{"function": {"name": "f"}}],
        callable=("f",),
        temperature=0.5,
        seed=2**63,
        template_options={"x": [1]},
    )
    found = request_from_json(json.loads(json.dumps(request_to_json(request))))
    assert found == request
