"""What `mlxkv bench` writes and prints: names that are public, figures, a table of 80 columns."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlxkv.bench import display, machine, report
from mlxkv.bench.cases import Case
from mlxkv.bench.engines import Timing
from mlxkv.bench.rounds import Rounds
from mlxkv.checkpoint.mlxkv_json import RECORD
from mlxkv.errors import OutputError
from mlxkv.store.catalog import DEFAULT
from tests.support.command_line import chat_model, environment


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The environment of a command, and a folder to work in."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_only_public_names_of_models_are_reported(here, tmp_path, monkeypatch):
    model = chat_model(tmp_path / "models" / "secret-project")
    monkeypatch.setattr("getpass.getuser", lambda: "Alice")
    assert report.public_name(DEFAULT.aliases[0], tmp_path) == DEFAULT.name
    assert report.public_name("mlx-community/x-4bit", tmp_path) == "mlx-community/x-4bit"
    assert report.public_name("org/x:Q4_K_M", tmp_path) == "org/x:Q4_K_M"
    assert report.public_name("alice/x", tmp_path) is None
    assert report.public_name("secret-project", model) is None
    assert report.public_name(str(model), model) is None
    for source, name in (("gguf", "mine-1a2b"), ("converted", "mine")):
        (tmp_path / RECORD).write_text(json.dumps({"name": name, "source": source, "origin": "/x"}))
        assert report.public_name(str(tmp_path), tmp_path) is None


def test_the_default_file_is_numbered_where_its_name_is_taken(here):
    facts = {"name": "org/Model-4bit", "model_type": "llama", "parameters": 1, "quantization": ""}
    first = report.default_path({"chip": "Apple M2 Max"}, facts)
    assert first == Path("mlxkv-bench-apple-m2-max-org-model-4bit.json")
    first.touch()
    assert report.default_path({"chip": "Apple M2 Max"}, facts).stem.endswith("-4bit-2")


def test_a_file_that_is_there_is_left_as_it_is_until_the_report_is(tmp_path):
    file = tmp_path / "r.json"
    file.write_text("before")
    report.check_writable(file)
    assert file.read_text() == "before"
    report.check_writable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    with pytest.raises(OutputError, match="is a folder"):
        report.check_writable(tmp_path)


def test_a_commit_is_that_of_this_checkout_and_not_of_one_around_it(tmp_path):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert machine.commit(tmp_path) == head
    (tmp_path / "inner").mkdir()
    assert machine.commit(tmp_path / "inner") != head


def full_report(speed: float, n_bytes: int) -> dict[str, Any]:
    short, long = Case(0, 1, 8, 128, n_bytes), Case(131072, 16, 131072, 128, n_bytes)
    found = Rounds(dtypes={"mlxkv": "bfloat16", "mlx-lm": "bfloat16"})
    timings = [Timing(1000, 1000 / speed * f, 1000, 1000 / speed * f, n_bytes) for f in (1, 2, 4)]
    for engine in ("mlxkv", "mlx-lm"):
        found.timings[long, engine] = timings
        found.timings[short, engine] = timings
    about = {
        "machine": {"chip": "Apple M2", "memory_bytes": n_bytes, "system": "x", "backend": "metal"},
        "versions": {"mlxkv": "1"},
    }
    facts = {"name": None, "model_type": "llama", "parameters": 10, "quantization": "affine4"}
    return report.build(
        machine=about,
        model=facts,
        settings={"repeat": 3, "kv_type": "native"},
        cases=[short, long],
        engines=("mlxkv", "mlx-lm"),
        rounds=found,
        skipped=[],
        complete=True,
    )


def test_a_figure_is_the_median_of_its_runs_beside_the_smallest_and_the_largest():
    result = full_report(100.0, 2**30)["results"][0]
    assert result["decode_tps"] == {
        "median": 50.0, "min": 25.0, "max": 100.0, "runs": (100.0, 50.0, 25.0),
    }  # fmt: skip
    assert result["first_token_s"]["median"] == 20.0


def test_after_ctrl_c_the_runs_are_those_that_were_measured():
    found = full_report(100.0, 2**30)
    assert "Medians of 3 runs;" in display.legend(found)
    for measure in ("decode_tps", "prefill_tps"):
        found["results"][0][measure]["runs"] = (100.0, 50.0)
    assert "Medians of 2 to 3 runs;" in display.legend(found)


@pytest.mark.parametrize(("speed", "n_bytes"), [(0.01, 1), (12345.6, 100 * 2**30)])
def test_the_table_fits_80_columns_with_large_and_small_figures(speed, n_bytes):
    lines = display.table(full_report(speed, n_bytes)).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_with_no_color_a_terminal_gets_no_escapes(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in display.table(full_report(10.0, 2**30))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in display.table(full_report(10.0, 2**30))
