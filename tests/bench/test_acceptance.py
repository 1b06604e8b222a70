"""`mlxkv verify --full`: what holds passes, and what does not is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlxkv
from mlxkv.bench.acceptance import media_checks, suite, text_checks
from mlxkv.bench.acceptance.report import Failed, Report, Row, Skip, Wrong, said, text, to_dict
from mlxkv.bench.acceptance.subject import Subject
from mlxkv.commands.verify import verify as command
from mlxkv.errors import OutputError, UsageError
from mlxkv.generation.outputs import Result
from mlxkv.llm.llm import LLM
from mlxkv.parsers.events import ToolCall
from tests.support.command_line import TEMPLATE, chat_model

TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t['function']['name'] }} {% endfor %}"
    "<tool_call></tool_call>{% endif %}" + TEMPLATE.replace("m['content']", "m['content'] or ''")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    chat_model(path / "plain", ascii=True, family="gemma3", max_position_embeddings=4096)
    chat_model(path / "tools", ascii=True, template=TOOLS, max_position_embeddings=4096)
    chat_model(path / "base", ascii=True, template=False, max_position_embeddings=4096)
    return path


@pytest.fixture(scope="module")
def loaded(folder) -> LLM:
    return mlxkv.load(folder / "plain")


@pytest.fixture
def llm(loaded, monkeypatch) -> LLM:
    monkeypatch.setattr(loaded, "pages", loaded.pages)
    return loaded


def rows_of(llm: LLM) -> dict[str, Row]:
    report = suite.accept(Subject(llm, agent_tokens=300))
    return {f"{row.area}: {row.check}": row for row in report.rows}


def test_all_that_is_promised_holds_on_random_weights(llm):
    rows = rows_of(llm)
    assert len(rows) == len(suite.CHECKS)
    failed = {name: row.note for name, row in rows.items() if row.verdict == "FAILED"}
    assert failed == {}
    for name in ("structured: prefix reuse", "limits: context is full", "limits: context shift",
                 "limits: stop text", "limits: seeds", "memory: beside the plan"):  # fmt: skip
        assert rows[name].verdict == "ok", rows[name]
    # What the weights cannot know is told apart from what does not work.
    assert rows["chat: a question"].verdict == "wrong"
    assert rows["structured: JSON schema"].verdict in ("ok", "wrong")
    reasons = {name: row.note for name, row in rows.items() if row.verdict == "skipped"}
    assert reasons["pictures: count"] == "the model takes no pictures"
    assert reasons["sound: transcript"] == "the model takes no sound"
    assert reasons["tools: parallel calls"] == "the chat template takes no tools"
    assert reasons["reasoning: on"] == reasons["reasoning: off"]


def test_a_base_model_is_checked_as_far_as_it_goes(folder, monkeypatch):
    some = ("a question", "JSON schema", "stop text", "parallel calls", "count", "transcript")
    monkeypatch.setattr(suite, "CHECKS", [c for c in suite.CHECKS if c[1] in some])
    rows = rows_of(mlxkv.load(folder / "base"))
    assert rows["chat: a question"].note == "no chat template: it is a base model"
    verdicts = [row.verdict for row in rows.values()]
    assert sorted(verdicts) == ["ok", *["skipped"] * 6]


def changed(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any], Result], Result],
    **always: Any,
) -> None:
    """Every answer is another one, made with the options `always`."""
    generate = LLM.generate

    def wrong(self: LLM, prompt: Any, **options: Any) -> Any:
        return change(options, generate(self, prompt, **{**options, **always}))

    monkeypatch.setattr(LLM, "generate", wrong)


def with_stats(**figures: int) -> Callable[[dict[str, Any], Result], Result]:
    return lambda options, made: replace(made, stats=replace(made.stats, **figures))


def longer(options: dict[str, Any], made: Result) -> Result:
    return replace(made, text=made.text + "".join(options.get("stop", ())))


@pytest.mark.parametrize(
    ("check", "change", "why"),
    [
        ("chat: prefix reuse", with_stats(restored_tokens=0), "tokens counted"),
        ("limits: context is full", with_stats(generated_tokens=3), "it ended at"),
        ("limits: context shift", with_stats(shifted_tokens=0), "no token was dropped"),
        ("limits: stop text", longer, "at its end, and not"),
        ("memory: beside the plan", with_stats(peak_bytes=1 << 60), "past the limit"),
        ("memory: beside the plan", with_stats(peak_bytes=1 << 28), "were planned"),
        ("structured: regular expression", lambda o, m: replace(m, text="1969"), "not match"),
        ("structured: JSON schema", lambda o, m: replace(m, text="{}"), "not match the schema"),
        ("chat: a question", lambda o, m: replace(m, text="Paris<|im_end|>"), "is in the answer"),
        ("chat: a question", lambda o, m: replace(m, finish_reason="memory"), "it ended with"),
    ],
)
def test_what_does_not_hold_is_found(check, change, why, llm, monkeypatch):
    changed(monkeypatch, change)
    area, name = check.split(": ")
    (run,) = [run for a, n, run in suite.CHECKS if (a, n) == (area, name)]
    row = suite.run(Subject(llm), area, name, run)
    assert (row.verdict, why in row.note) == ("FAILED", True), row


def test_kv_that_is_computed_again_is_found(llm):
    subject = Subject(llm)
    prompt = "One prompt. " * 60
    subject.ask(prompt, max_tokens=1)
    assert "tokens restored" in subject.reused(prompt)
    with pytest.raises(Failed, match="tokens were computed again"):
        subject.reused(f"Another. {prompt}")
    llm.pages = None
    with pytest.raises(Skip, match="KV is not kept"):
        subject.reused(prompt)


def test_tools_are_checked_behind_a_long_system_prompt(folder, monkeypatch):
    llm = mlxkv.load(folder / "tools")
    subject = Subject(llm, agent_tokens=300)
    asked: list[Any] = []

    def answers(*calls: ToolCall) -> None:
        def change(options: dict[str, Any], made: Result) -> Result:
            asked.append((options, made.stats.prompt_tokens))
            return replace(made, tool_calls=calls, text="")

        monkeypatch.undo()
        changed(monkeypatch, change, max_tokens=1)

    answers(ToolCall("", "read_file", {"path": "notes.txt"}))
    assert text_checks.calls(subject).endswith("tokens of prompt")
    assert len(asked[0][0]["tools"]) == 5 and asked[0][1] > 300
    answers(ToolCall("", "weather", {"city": "Rome"}), ToolCall("", "weather", {"city": "Oslo"}))
    assert text_checks.parallel(subject) == "2 calls"
    answers(ToolCall("", "weather", {"city": "Rome"}))
    with pytest.raises(Wrong, match="Oslo"):
        text_checks.parallel(subject)
    for call in (ToolCall("", "format_disk"), ToolCall("", "run", {}, error="no JSON")):
        answers(call)
        row = suite.run(subject, "tools", "one of several", text_checks.calls)
        assert row.verdict == "FAILED" and call.name in row.note
    monkeypatch.undo()
    row = suite.run(subject, "tools", "results", text_checks.results)
    assert row.verdict == "wrong" and "Thursday" in row.note


def test_speech_needs_a_program(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Skip, match="espeak-ng, which makes the speech, is not installed"):
        media_checks.spoken("one")


def test_pictures_show_what_is_asked_about():
    made = media_checks.drawn(media_checks.CIRCLE, words="42")
    assert made.size == (512, 384)
    assert made.getpixel((80, 192)) == (255, 0, 0) and made.getpixel((500, 10)) == (255, 255, 255)
    assert (0, 0, 0) in {made.getpixel((x, y)) for x in range(64, 200) for y in range(150, 240, 8)}


def test_a_report_is_a_table_and_json():
    rows = (
        Row("chat", "a question", "ok", "Paris", 0.25),
        Row("tools", "parallel", "wrong", "expected 'Oslo'\n" + "x" * 200, 12.0),
        Row("sound", "transcript", "skipped", "no sound", 0.0),
    )
    report = Report("m", "float32", ("image",), rows)
    shown = text(report)
    assert shown.startswith("m, float32, takes text and image\n\nAREA   CHECK")
    assert shown.endswith("\n\n1 ok, 1 wrong, 1 skipped")
    assert max(map(len, shown.splitlines())) < 150
    assert report.passed() and not report.passed(strict=True)
    bad = replace(report, rows=(*rows, replace(rows[0], verdict="FAILED")))
    assert not bad.passed()
    made = to_dict(bad)
    assert made["counts"] == {"ok": 1, "wrong": 1, "FAILED": 1, "skipped": 1}
    assert made["passed"] is False and made["rows"][0]["note"] == "Paris"
    with pytest.raises(Wrong, match="expected 'a' or 'b'; got 'c'"):
        said(" c ", ["a", "b"])


def test_the_command_writes_both(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "CHECKS", [c for c in suite.CHECKS if c[1] == "seeds"])
    file = tmp_path / "report.json"
    assert command(str(folder / "plain"), full=True, json_to=str(file)) == 0
    out = capsys.readouterr().out
    assert "limits  seeds" in out and out.endswith("1 ok\n")
    assert json.loads(file.read_text())["counts"]["ok"] == 1
    with pytest.raises(OutputError, match="cannot be written"):
        command(str(folder / "plain"), full=True, json_to=str(tmp_path / "no" / "file"))
    with pytest.raises(UsageError, match="--strict is for --full"):
        command(str(folder / "plain"), strict=True)
    with pytest.raises(UsageError, match="--full takes one --kv-type"):
        command(str(folder / "plain"), full=True, tokens=600)
