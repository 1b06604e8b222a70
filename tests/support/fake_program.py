"""Programs on PATH that write down how they were called."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxkv.launch.programs import PROGRAMS

_SCRIPT = """#!{python} -S
import json, os, signal, sys
if os.environ.get("FAKE_TRAP"):
    number = getattr(signal, os.environ["FAKE_TRAP"])
    signal.signal(number, lambda *_: os._exit(40 + number))
calls = [arg for arg in sys.argv[1:] if os.path.isabs(arg)] + list(os.environ.values())
folders = ("mlxkv-launch-", "/mlxkv/launch/")
files, beside = {{}}, None
for path in calls:
    if any(part in path for part in folders) and os.path.isfile(path):
        with open(path) as file:
            files[os.path.basename(path)] = file.read()
        beside = os.path.dirname(path)
found = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "files": files,
          "beside": beside, "folder": os.getcwd()}}
with open({record!r} + ".part", "w") as file:
    json.dump(found, file)
os.replace({record!r} + ".part", {record!r})
if os.environ.get("FAKE_WAIT"):
    signal.pause()
if os.environ.get("FAKE_KILL"):
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
"""


@dataclass(frozen=True)
class FakePrograms:
    """All that `mlxkv launch` can start, as scripts.

    With FAKE_WAIT in its environment a program waits for a signal, FAKE_TRAP names one that it
    answers with exit code 40 + N, with FAKE_KILL it kills itself, and FAKE_EXIT is its exit code.
    """

    folder: Path
    record: Path

    def seen(self) -> dict[str, Any]:
        """The last call: arguments, environment, files, where these lay (`beside`), and folder."""
        return json.loads(self.record.read_text())


def fake_programs(folder: Path) -> FakePrograms:
    """Write the scripts to a folder."""
    folder.mkdir(exist_ok=True)
    record = folder / "record.json"
    for program in PROGRAMS:
        script = folder / program.command
        script.write_text(_SCRIPT.format(python=sys.executable, record=str(record)))
        script.chmod(0o755)
    return FakePrograms(folder, record)
