"""Comparing counts with recorded ones, and the file that keeps them."""

from __future__ import annotations

import pytest

from tests.metal import goldens
from tests.metal.goldens import OURS, THEIRS, Goldens


@pytest.mark.parametrize(
    ("now", "golden", "worse", "better"),
    [
        (5, 5, [], []),
        (6, 5, ["5 -> 6"], []),
        (4, 5, [], ["5 -> 4"]),
        (0, 5, [], ["5 -> 0"]),
        (5, None, ["None -> 5"], []),
        (None, 5, [], ["5 -> None"]),
        ({}, {}, [], []),
        ({"Add": 2}, {"Add": 1}, ["Add: 1 -> 2"], []),
        ({"Add": 1, "Sum": 1}, {"Add": 2}, ["Sum: 0 -> 1"], ["Add: 2 -> 1"]),
        ({}, {"Add": 2}, [], ["Add: 2 -> 0"]),
    ],
)
def test_growth_is_worse_and_anything_less_is_better(now, golden, worse, better):
    assert goldens.worse(now, golden) == worse
    assert goldens.better(now, golden) == better


def test_a_file_holds_what_was_written(tmp_path):
    path = tmp_path / "goldens.json"
    ours = {("launches", "llama", "decode"): 3, ("float32", "llama", "decode"): {"AsType": 1}}
    theirs = {("launches", "llama", "decode"): 4}
    written = Goldens({"mlx": "1"}, {OURS: ours, THEIRS: theirs})
    goldens.write(written, path)
    assert goldens.read(path) == written


def test_the_recorded_file_is_written_as_it_is_read(tmp_path):
    path = tmp_path / "goldens.json"
    goldens.write(goldens.read(), path)
    assert path.read_text() == goldens.PATH.read_text()
