"""kill -9 loses at most what was being written. The writers are in `page_writer`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.support.paths import ROOT

CAP = 1_500_000


def seen(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.page_writer", *(str(x) for x in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_a_killed_writer_leaves_whole_pages_and_all_that_it_flushed(tmp_path):
    result = seen("kill", tmp_path / "kv", 100)
    assert result["wrong"] == []
    # The kills did hit: before, while and after something was written.
    assert result["said"] > 10 and result["leftovers"] > 0 and result["pages"] > 300


def test_writers_that_share_a_cap_and_are_killed_keep_it_and_each_others_pages(tmp_path):
    result = seen("crowd", tmp_path / "kv", 60, CAP)
    assert result["wrong"] == []
    assert result["said"] > 10 and result["looks"] > 20 and result["pages"] > 3
    assert CAP // 2 < result["most_bytes"] <= CAP
