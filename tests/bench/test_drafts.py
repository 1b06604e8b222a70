"""`mlxkv bench --draft`: the same answers with drafts and without, and what they are worth here."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlxkv.bench.drafts import TASKS, Run, jobs_for, rows
from mlxkv.cli import main
from mlxkv.errors import UsageError
from mlxkv.kv.types import CacheSpec
from tests.support.command_line import chat_model


def test_each_task_has_a_row_and_one_that_does_not_fit_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLXKV_KV_DISK", "0")
    folder, small = (chat_model(tmp_path / name, ascii=True) for name in ("large", "small"))
    options = ("--tokens", "12", "--repeat", "1", "--json", "--drafter", str(small))
    assert main(["bench", str(folder), "--draft", *options]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [row["task"] for row in found["rows"]] == [task.name for task in TASKS[1:]]
    assert all(row["n_same"] == row["n_runs"] == 1 for row in found["rows"])
    assert f"not measured: {TASKS[0].name}: a prompt has" in err and "overflow" not in err
    short = chat_model(tmp_path / "short", ascii=True, max_position_embeddings=64)
    assert main(["bench", str(short), "--draft", "--tokens", "2", "--repeat", "1"]) == 2
    assert "mlxkv: no task fits the context of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [("--drafter", "off"), ("--batch", "2"), ("--drafter", "nowhere")]
)
def test_what_says_nothing_with_drafts_is_refused(tmp_path, options, capsys):
    folder = chat_model(tmp_path / "large")
    assert main(["bench", str(folder), "--draft", *options]) in (2, 3)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_that_takes_no_drafts_is_refused():
    model = SimpleNamespace(cache_specs=lambda: [CacheSpec(0, 0, 0)])
    with pytest.raises(UsageError, match="takes no drafts: its states cannot be taken back"):
        jobs_for(cast(Any, SimpleNamespace(model=model, path="foreign")), 0.0, 8)


def test_a_ratio_is_the_median_over_pairs():
    def run(mode: str, index: int, tps: float) -> Run:
        return Run("task", 0.0, mode, index, tps, 0.1, 1e3 / tps, 1.0, same=index != 1)

    speeds = {"off": (10.0, 20.0, 40.0), "lookup": (15.0, 40.0, 40.0)}
    (row,) = rows([run(mode, i, x) for mode, of in speeds.items() for i, x in enumerate(of)])
    assert (row.off_tps, row.tps, row.ratio) == (20.0, 40.0, 1.5)
    assert (row.n_same, row.n_runs) == (2, 3)
