"""Weights are read while the thread that loads them goes on, few of them at a time."""

import mlx.core as mx
import pytest

from mlxkv.base.stepwise import finished
from mlxkv.models import reading
from mlxkv.models.loader import loading
from mlxkv.models.reading import Reading
from tests.support.loading import ONE_LAYER
from tests.support.tiny import write_checkpoint


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """Sizes of arrays that are being read; those that are waited for leave it."""
    sizes = list[int]()
    monkeypatch.setattr(reading, "MOST_BYTES", 8)
    monkeypatch.setattr(mx, "async_eval", lambda arrays: sizes.extend(x.nbytes for x in arrays))
    monkeypatch.setattr(mx, "eval", lambda arrays: [sizes.remove(x.nbytes) for x in arrays])
    return sizes


@pytest.mark.parametrize(("copied", "left"), [(True, 0), (False, 20)])
def test_of_arrays_that_are_copies_none_is_begun_beyond_the_bound(held, copied, left):
    begun = Reading()
    assert not begun.add([mx.zeros(3, mx.uint8), mx.zeros(1, mx.uint8)], copied=copied)
    assert sum(held) == 4
    assert begun.add([mx.zeros(20, mx.uint8)], copied=copied), "the first one was waited for"
    assert sum(held) == left
    begun.finish()
    assert held == []


def test_other_work_is_done_once_before_the_weights_are_waited_for(tmp_path, monkeypatch):
    seen = list[str]()
    monkeypatch.setattr(Reading, "finish", lambda self: seen.append("finish"))
    path = write_checkpoint(tmp_path, ONE_LAYER)
    finished(loading(path, meanwhile=lambda: seen.append("meanwhile")))
    assert seen == ["meanwhile", "finish"]
