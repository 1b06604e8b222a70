"""Loading without the collector of garbage."""

import gc

import pytest

from mlxkv.base.startup import collecting_later


@pytest.fixture(autouse=True)
def _thawed():
    yield
    gc.unfreeze()


def test_nothing_is_collected_inside_and_what_is_alive_is_frozen():
    with collecting_later():
        assert not gc.isenabled()
        kept = [[] for _ in range(1_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(kept)


def test_it_stays_off_where_it_was_off_and_comes_back_after_an_error():
    gc.disable()
    try:
        with collecting_later():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="no model"), collecting_later():
        raise ValueError("no model")
    assert gc.isenabled()
