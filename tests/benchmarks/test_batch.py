"""The benchmark of batches, on a model of no size."""

from __future__ import annotations

import pytest

from benchmarks import batch, batch_worker
from benchmarks.checkpoints import write_tiny_llama
from benchmarks.report import ENGINES, Run, summary
from benchmarks.worker import load

CHOSEN = ["--model=m", "--output=o", "--sizes=1,3", "--context=8"]


def test_batches_are_of_equal_length_and_with_a_long_one():
    args = batch.parse([*CHOSEN, "--long=20"])
    assert batch.batches(args.sizes, args.context, args.long) == [
        [8],
        [8, 8, 8],
        [8, 8, 20],
    ]


def test_there_are_no_mixed_batches_of_one_or_without_a_long_one():
    assert batch.batches([1], 8, 20) == [[8]]
    assert batch.batches([1, 2], 8, 0) == [[8], [8, 8]]


def test_a_measure_says_what_the_batch_is():
    assert batch_worker.measure_name([64]) == "batch 1 x 64 tok/s"
    assert batch_worker.measure_name([64, 64, 64, 2048]) == "batch 3 x 64 + 2048 tok/s"


def test_each_job_is_a_process_of_each_engine(tmp_path):
    for job in batch.jobs(batch.parse(CHOSEN), tmp_path):
        assert [job.commands[engine][-1] for engine in ENGINES] == [
            f"--engine={engine}" for engine in ENGINES
        ]


@pytest.mark.filterwarnings("ignore")
def test_both_engines_are_measured_on_the_same_batches(tmp_path):
    pytest.importorskip("mlx_lm")
    path = write_tiny_llama(tmp_path, n_layers=2)
    models = {engine: load(engine, path, "float32") for engine in ENGINES}
    for lengths in ([8, 8], [8, 8, 30]):
        runs = [
            Run("batch", engine, 0, "", batch_worker.figures(engine, *loaded, lengths, 0.0))
            for engine, loaded in models.items()
        ]
        (row,) = summary(runs)
        assert row.measure == batch_worker.measure_name(lengths)
        assert row.mlxkv > 0 and row.mlx_lm > 0 and row.target == 1
