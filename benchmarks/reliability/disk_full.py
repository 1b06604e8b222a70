"""A disk that is really full: `python -m benchmarks.reliability.disk_full` (Linux, as root).

Mounts small file systems (tmpfs) of several sizes, on which `kv save`, `kv export`, `kv import`,
`convert` and `alias` write. Each command must end with code 6 and one line, or with 0; after a
failure no file may be left but whole pages, which are a cache and which `kv gc` must find whole.
Exits with 1 otherwise.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.command_line import chat_model, environment

KIB = (16, 64, 400, 450, 500, 540, 700)
"""Sizes of the file systems. The model takes 491 KiB, its saved KV 522: at 450 to 540 there
seems to be enough until the last of it is written."""
WHOLE = ("written.json", "fingerprints.json")
"""Small files of a KV folder, which are right whatever failed: they say what was written today, and
the hash of the model."""
FULL, DONE = 6, 0
TEXT = "one two three four five six " * 24


@contextmanager
def file_system(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of its own in a folder."""
    folder.mkdir()
    size = ["-o", f"size={kib}k", "none", str(folder)]
    subprocess.run(["mount", "-t", "tmpfs", *size], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def content(folder: Path) -> dict[str, bytes]:
    """All files but locks and `WHOLE`."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "lock" not in file.name and file.name not in WHOLE
    }


def commands(home: Path, disk: Path) -> dict[str, tuple[dict[str, str], list[str]]]:
    """Name -> (environment, arguments) of what is tried."""
    kv = {"MLXKV_KV": str(disk / "kv")}
    return {
        "kv save": (kv, ["kv", "save", "other", "-m", "m", TEXT]),
        "kv export": ({}, ["kv", "export", "name", str(disk / "name.kv")]),
        "kv import": (kv, ["kv", "import", str(home / "name.kv")]),
        "convert": ({}, ["convert", "m", "--output", str(disk / "out")]),
        "alias": ({"MLXKV_MODELS": str(disk / "models")}, ["alias", "other", "smollm2:135m"]),
    }


def run(env: dict[str, str], args: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mlxkv", *args],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stderr.strip()


def main() -> int:
    bad = 0
    print("| KiB | command | code | left on the disk | says |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        chat_model(home / "models/m")
        base = environment(home, MLXKV_KV=str(home / "kv"), MLXKV_KV_DISK="64MiB")
        run(base, ["kv", "save", "name", "-m", "m", TEXT])
        run(base, ["kv", "export", "name", str(home / "name.kv")])
        before = content(home)
        for kib in KIB:
            for name, (env, args) in commands(home, home / "disk").items():
                with file_system(home / "disk", kib) as disk:
                    code, said = run(base | env, args)
                    left = [file for file in content(disk) if code]
                    pages = [file for file in left if file.startswith("kv/pages/")]
                    if pages and run(base | env, ["kv", "gc"])[0] == 0:
                        left = [file for file in left if file not in {*content(disk)} & {*pages}]
                good = code in (FULL, DONE) and not left and (not code or "\n" not in said)
                bad += not good
                shown = said.splitlines()[-1][:110] if said else ""
                print(f"| {kib} | {name} | {code} | {', '.join(left) or 'nothing'} | {shown} |",
                      flush=True)  # fmt: skip
        bad += content(home) != before
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
