"""`mlxkv verify --full`: what holds passes, and what does not is found."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.bench.acceptance import picture_checks, sound_checks, suite, text_checks, tool_checks
from mlxkv.bench.acceptance import subject as subjects
from mlxkv.bench.acceptance.limit_checks import within
from mlxkv.bench.acceptance.report import Failed, Report, Row, Skip, Wrong, said, text, to_dict
from mlxkv.bench.acceptance.subject import Subject
from mlxkv.cli import main
from mlxkv.errors import OutputError, UsageError
from mlxkv.generation.outputs import Result
from mlxkv.llm.llm import LLM
from mlxkv.memory.media import Rows
from mlxkv.parsers.events import ToolCall
from tests.support.chat_templates.cases import TEMPLATES
from tests.support.command_line import chat_model
from tests.support.tiny_media import write_gemma4

GENERATE = LLM.generate
Change = Callable[[dict[str, Any], Result], Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    sizes = {"ascii": True, "max_position_embeddings": 4096}
    chat_model(path / "plain", family="gemma3", **sizes)
    thinking = TEMPLATES["reasoning"].read_text()
    chat_model(path / "thinks", template=thinking, special=("<think>", "</think>"), **sizes)
    chat_model(path / "base", template=False, **sizes)
    return path


@pytest.fixture(scope="module")
def plain(folder) -> LLM:
    return mlxkv.load(folder / "plain")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> LLM:
    return mlxkv.load(write_gemma4(tmp_path_factory.mktemp("media") / "m"))


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(subjects, "MAX_TOKENS", 12)
    monkeypatch.setattr(tool_checks, "CALL_TOKENS", 12)
    monkeypatch.setattr(text_checks, "THOUGHT_TOKENS", 12)


def row_of(subject: Subject, check: str) -> Row:
    area, name = check.split(": ")
    (run,) = [run for a, n, run in suite.CHECKS if (a, n) == (area, name)]
    return suite.run(subject, area, name, run)


def rows_of(llm: LLM, *areas: str, agent_tokens: int = 100) -> dict[str, Row]:
    subject = Subject(llm, agent_tokens)
    names = [f"{area}: {name}" for area, name, _ in suite.CHECKS if area in areas or not areas]
    return {name: row_of(subject, name) for name in names}


def verdicts(rows: dict[str, Row]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, row in rows.items():
        found.setdefault(row.verdict, set()).add(name)
    return found


def changed(monkeypatch: pytest.MonkeyPatch, change: Change, **always: Any) -> None:
    """Every answer is another one, made with the options `always`."""

    def wrong(self: LLM, prompt: Any, **options: Any) -> Any:
        return change(options, GENERATE(self, prompt, **{**options, **always}))

    monkeypatch.setattr(LLM, "generate", wrong)


def said_is(answer: str, **fields: Any) -> Change:
    return lambda options, made: replace(made, text=answer, finish_reason="stop", **fields)


def with_stats(**values: int) -> Change:
    return lambda options, made: replace(made, stats=replace(made.stats, **values))


def computed_again(options: dict[str, Any], made: Result) -> Result:
    n = made.stats.prompt_tokens
    stats = replace(made.stats, restored_tokens=9, computed_tokens=n - 9)
    return replace(made, stats=stats)


def longer(options: dict[str, Any], made: Result) -> Result:
    return replace(made, text=made.text + "".join(options.get("stop", ())))


def never_twice(options: dict[str, Any], made: Result) -> Result:
    return replace(made, tokens=[secrets.randbits(60)])


def test_all_that_is_promised_holds_on_random_weights(plain):
    rows = rows_of(plain)
    assert len(rows) == len(suite.CHECKS)
    found = verdicts(rows)
    assert "FAILED" not in found, [rows[name] for name in found["FAILED"]]
    assert found["ok"] >= {
        "chat: prefix reuse", "structured: prefix reuse", "tools: prefix reuse",
        "limits: full context", "limits: long prompt", "limits: context shift",
        "limits: stop text", "limits: seeds", "limits: memory",
    }  # fmt: skip
    # What the weights cannot know is told apart from what does not work.
    assert found["wrong"] >= {"chat: question", "chat: history", "tools: one of five"}
    reasons = {name: row.note for name, row in rows.items() if row.verdict == "skipped"}
    assert reasons["pictures: count"] == "the model takes no pictures"
    assert reasons["sound: transcript"] == "the model takes no sound"
    assert "does not reason" in reasons["reasoning: on"]
    assert "no switch" in reasons["reasoning: off"]


def test_a_base_model_is_checked_as_far_as_it_goes(folder):
    llm = mlxkv.load(folder / "base")
    rows = rows_of(llm, "chat", "structured", "tools")
    assert rows["chat: prefix reuse"].verdict == rows["structured: prefix reuse"].verdict == "ok"
    assert rows["structured: regex"].verdict in ("ok", "wrong")
    for name in ("chat: history", "tools: result"):
        assert rows[name].note == "no chat template: it is a base model"
    with pytest.raises(UsageError, match="a context of 1024 tokens or more; got 600"):
        suite.accept(Subject(mlxkv.load(folder / "base", context=600)), "m")


@pytest.mark.parametrize(
    ("check", "change", "why"),
    [
        ("chat: prefix reuse", with_stats(restored_tokens=0), "tokens counted"),
        ("chat: prefix reuse", computed_again, "were computed again"),
        ("structured: prefix reuse", computed_again, "were computed again"),
        ("tools: prefix reuse", computed_again, "were computed again"),
        ("limits: full context", with_stats(generated_tokens=3), "it ended at"),
        ("limits: context shift", with_stats(shifted_tokens=0), "no token was dropped"),
        ("limits: stop text", longer, "at its end, and not"),
        ("limits: seeds", lambda o, m: replace(m, tokens=[1]), "another seed gave the same"),
        ("limits: seeds", never_twice, "the same seed gave another"),
        ("limits: memory", with_stats(computed_tokens=1), "were there before"),
        ("structured: regex", said_is("1969"), "does not match"),
        ("structured: JSON schema", said_is("{}"), "not match the schema"),
        ("structured: JSON schema", lambda o, m: replace(m, text="Well, "), "not match the schema"),
        ("chat: question", said_is("Paris<|im_end|>"), "is in the answer's text"),
        ("chat: question", lambda o, m: replace(m, finish_reason="memory"), "it ended with"),
        ("tools: forced call", said_is("Rome", tool_calls=()), "0 calls, and one was forced"),
    ],
)
def test_what_does_not_hold_is_found(check, change, why, plain, monkeypatch):
    changed(monkeypatch, change)
    row = row_of(Subject(plain, 100), check)
    assert (row.verdict, why in row.note) == ("FAILED", True), row


def test_memory_past_the_plan_or_the_limit_is_found(plain):
    subject, stats = Subject(plain), plain.generate("One", max_tokens=1).stats
    planned: Any = SimpleNamespace(total_bytes=1 << 20, weights_bytes=0, context=8)
    assert "planned" in within(subject, stats, planned)
    subject.other_bytes = 0  # of models of other tests, which may be larger than the peak below
    for peak, why in ((1 << 28, "planned"), (1 << 60, "past the limit")):
        with pytest.raises(Failed, match=why):
            within(subject, replace(stats, peak_bytes=peak), planned)


def test_reasoning_is_told_apart_from_the_answer(folder, monkeypatch):
    llm = mlxkv.load(folder / "thinks")
    subject = Subject(llm, 100)
    assert row_of(subject, "reasoning: prefix reuse").verdict == "ok"
    assert row_of(subject, "reasoning: off").verdict == "wrong"  # no 42, and no reasoning either

    changed(monkeypatch, said_is("It is 42.", reasoning="17 and 25"))
    assert row_of(subject, "reasoning: on").verdict == "ok"
    assert "reasoned all the same" in row_of(subject, "reasoning: off").note
    changed(monkeypatch, said_is("It is 42."))
    assert row_of(subject, "reasoning: on").note.startswith("no reasoning")
    assert row_of(subject, "reasoning: off").verdict == "ok"
    changed(monkeypatch, said_is("<think>hm</think> 42"))
    assert row_of(subject, "reasoning: on").verdict == "FAILED"

    def as_reasoning(options: dict[str, Any], made: Result) -> Result:
        return replace(made, text="", reasoning=llm.tokenizer.decode(made.tokens))

    changed(monkeypatch, as_reasoning)
    row = row_of(subject, "reasoning: off")
    assert row.verdict == "FAILED" and "read as reasoning" in row.note
    monkeypatch.setattr(LLM, "render", lambda *args, **options: "the same")
    row = row_of(subject, "reasoning: off")
    assert row.verdict == "FAILED" and "the same with reasoning on and off" in row.note


def test_tools_are_checked_behind_a_long_system_prompt(plain, monkeypatch):
    subject = Subject(plain, agent_tokens=300)
    asked: list[Any] = []

    def answers(*calls: ToolCall, text: str = "") -> None:
        def change(options: dict[str, Any], made: Result) -> Result:
            asked.append((options, made.stats.prompt_tokens))
            return replace(made, tool_calls=calls, text=text)

        changed(monkeypatch, change, max_tokens=1)

    def weather(city: str) -> ToolCall:
        return ToolCall("", "weather", {"city": city})

    answers(ToolCall("", "read_file", {"path": "notes.txt"}))
    assert row_of(subject, "tools: one of five").verdict == "ok"
    assert len(asked[0][0]["tools"]) == 5 and asked[0][1] > 300
    answers(weather("Rome"), weather("Oslo"))
    assert row_of(subject, "tools: parallel calls").note == "2 calls"
    answers(weather("Rome"))
    assert "Oslo" in row_of(subject, "tools: parallel calls").note
    for call in (ToolCall("", "format_disk"), ToolCall("", "run", {}, error="no JSON")):
        answers(call)
        row = row_of(subject, "tools: one of five")
        assert row.verdict == "wrong" and call.name in row.note
    answers(text="On Thursday.")
    assert row_of(subject, "tools: result").verdict == "ok"
    render = LLM.render
    monkeypatch.setattr(LLM, "render", lambda *a, **o: render(*a, **o).replace("Thursday", ""))
    row = row_of(subject, "tools: result")
    assert row.verdict == "FAILED" and "Thursday" in row.note


def test_a_chat_that_forgets_its_history_is_found(plain, monkeypatch):
    from mlxkv.llm.conversation import Conversation

    monkeypatch.setattr(Conversation, "_history", lambda self: [])
    monkeypatch.setattr(Conversation, "_suffix", lambda *args: None)
    row = row_of(Subject(plain), "chat: history")
    assert row.verdict == "FAILED" and "has not the first turn in it" in row.note


def test_pictures_and_sound_hold_on_random_weights(seeing, monkeypatch):
    monkeypatch.setattr(sound_checks, "spoken", lambda text: sound_checks.tone(1.0))
    rows = rows_of(seeing, "pictures", "sound")
    found = verdicts(rows)
    assert "FAILED" not in found and "skipped" not in found, rows
    assert found["ok"] >= {
        "pictures: seen", "pictures: prefix reuse", "pictures: second one", "pictures: memory",
        "sound: heard", "sound: over 30 s", "sound: prefix reuse", "sound: memory",
    }  # fmt: skip
    for check, right in {
        "pictures: description": "A red dot.",
        "pictures: count": "Three.",
        "pictures: position": "Left",
        "pictures: reading": "It says 42817.",
        "pictures: two compared": "The second.",
        "sound: question": "Paris",
    }.items():
        changed(monkeypatch, said_is(right))
        assert row_of(Subject(seeing), check).verdict == "ok", check
        assert check in found["wrong"]


def test_media_that_are_not_looked_at_or_computed_again_are_found(seeing, monkeypatch):
    model, encode = type(seeing.model), Rows.encode
    media_rows = model.media_rows
    with monkeypatch.context() as patch:
        patch.setattr(model, "media_rows", lambda self, *args: 0 * media_rows(self, *args))
        for check in ("pictures: seen", "sound: heard"):
            row = row_of(Subject(seeing), check)
            assert row.verdict == "FAILED" and "not looked at" in row.note, row

    def twice(self: Rows, *args: Any) -> mx.array:
        encode(self, *args)
        return encode(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "encode", twice)
        for check in ("pictures: prefix reuse", "pictures: second one", "sound: prefix reuse"):
            row = row_of(Subject(seeing), check)
            assert row.verdict == "FAILED" and "the encoder ran" in row.note, row
    changed(monkeypatch, computed_again)
    assert "were computed again" in row_of(Subject(seeing), "pictures: second one").note
    changed(monkeypatch, with_stats(image_tokens=0))
    assert row_of(Subject(seeing), "pictures: count").note == "it is not in the prompt"


def test_a_transcript_may_miss_one_word_in_five(plain, monkeypatch):
    heard = SimpleNamespace(text="the train to Hamburg leaves at 7 from platform mine")
    subject = SimpleNamespace(
        kinds={"audio"}, needs_chat=lambda: None, llm=SimpleNamespace(transcribe=lambda _: heard)
    )
    monkeypatch.setattr(sound_checks, "spoken", lambda text: b"")
    assert row_of(subject, "sound: transcript").verdict == "ok"  # pyright: ignore
    heard.text = "seven at leaves Hamburg to train the platform nine from"
    assert row_of(subject, "sound: transcript").verdict == "wrong"  # pyright: ignore


def test_speech_needs_a_program(monkeypatch):
    if shutil.which("espeak-ng"):
        assert sound_checks.spoken("one")[:4] == b"RIFF"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Skip, match="espeak-ng, which makes the speech, is not installed"):
        sound_checks.spoken("one")


def test_pictures_show_what_is_asked_about():
    made = picture_checks.drawn(picture_checks.CIRCLE, words="42")
    assert made.size == (512, 384)
    assert made.getpixel((80, 192)) == (255, 0, 0) and made.getpixel((500, 10)) == (255, 255, 255)
    assert (0, 0, 0) in {made.getpixel((x, y)) for x in range(64, 200) for y in range(290, 370, 4)}


def test_a_report_is_a_table_of_80_columns_and_json():
    rows = (
        Row("chat", "question", "ok", "Paris \x1b[31m", 0.25),
        Row("tools", "parallel calls", "wrong", "expected 'Oslo'\n" + "x " * 200, 12.0),
        Row("sound", "transcript", "skipped", "no sound", 0.0),
        Row("sound", "question", "skipped", "no sound", 0.0),
    )
    report = Report("m", "float32", "native", 4096, ("image",), rows)
    shown = text(report, 80)
    lines = shown.splitlines()
    assert lines[:2] == ["m", "float32, KV native, context 4,096, takes text and image"]
    assert lines[3].split() == ["AREA", "CHECK", "VERDICT", "TIME", "NOTE"]
    assert lines[-3].split(maxsplit=4) == ["sound", "all", "2", "skipped", "no sound"]
    assert lines[-1] == "passed: 1 ok, 1 wrong, 2 skipped (12 s)"
    assert len(lines) == 12 and max(map(len, lines)) <= 80 and "\x1b" not in shown
    assert report.passed and not replace(report, strict=True).passed
    assert text(replace(report, complete=False), 80).splitlines()[-1].startswith("interrupted")
    bad = replace(report, rows=(*rows, replace(rows[0], verdict="FAILED")))
    made = to_dict(bad)
    assert made["counts"] == {"ok": 1, "wrong": 1, "FAILED": 1, "skipped": 2}
    assert made["passed"] is False and made["rows"][1]["note"].startswith("expected 'Oslo'")


def test_words_count_whole_and_some_must_not_come():
    said("The second one.", ["second", "2"], never=["first"])
    with pytest.raises(Wrong, match="expected '3'; got '13'"):
        said("13", ["3", "three"])
    with pytest.raises(Wrong, match="no 'right'"):
        said("Left or right", ["left"], never=["right"])


def test_the_command_writes_both(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, run = str(folder / "plain"), suite.CHECKS
    monkeypatch.setattr(suite, "CHECKS", [c for c in run if c[1] in ("seeds", "question")])
    verify = ["verify", model]
    assert main([*verify, "--full"]) == 0
    out, err = capsys.readouterr()
    assert "limits  seeds" in out and "passed: 1 ok, 1 wrong" in out
    assert err == "report: mlxkv-verify-plain.json\n"
    made = json.loads(Path("mlxkv-verify-plain.json").read_text())
    assert (made["counts"]["ok"], made["passed"], made["model"]) == (1, True, model)
    own = tmp_path / "own.json"
    assert main([*verify, "--full", "--strict", "--report", str(own), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == json.loads(own.read_text())

    def stopped(subject: Subject) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "CHECKS", [*suite.CHECKS, ("limits", "stopped", stopped)])
    assert main([*verify, "--full"]) == 130
    assert json.loads(Path("mlxkv-verify-plain-2.json").read_text())["complete"] is False
    capsys.readouterr()
    for error, options, message in (
        (OutputError, ["--full", "--report", str(tmp_path / "no" / "file")], "no/file"),
        (UsageError, ["--strict"], "--strict is for --full"),
        (UsageError, ["--full", "--tokens", "600"], "--full takes one --kv-type"),
    ):
        assert main([*verify, *options]) == error.exit_code
        assert message in capsys.readouterr().err
