"""The machine and the versions, for a report that is shared: no users, hosts or folders."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mlxkv.base import device

PACKAGES = ("mlxkv", "mlx", "mlx-lm")


def about() -> dict[str, Any]:
    """The machine, the versions and the commit, as a report has them."""
    machine = {
        "chip": chip(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": system(),
        "architecture": platform.machine(),
        **_device(),
    }
    return {"machine": machine, "versions": versions(), "commit": commit()}


def chip() -> str:
    """Apple M2 Max, or what a CPU is called elsewhere."""
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def system() -> str:
    """macOS 15.5, or Linux 6.8.0 without a distribution's suffix, which may name its owner."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release().split('-')[0]}"


def versions() -> dict[str, str | None]:
    """Of Python, mlxkv, MLX and mlx-lm; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit(root: Path | None = None) -> str | None:
    """The commit of mlxkv's code, with `+` if the checkout differs; None if not known.

    Args:
        root: of the checkout; None for this package's.
    """
    root = root or Path(__file__).resolve().parents[2]
    # git would also find a repository above an installed package: the folder must have its own.
    if (root / ".git").exists():
        head = _output("git", "-C", str(root), "rev-parse", "HEAD")
        changed = _output("git", "-C", str(root), "status", "--porcelain", "-uno")
        return f"{head}{'+' if changed else ''}" if head else None
    try:
        text = metadata.distribution("mlxkv").read_text("direct_url.json")
        found = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _device() -> dict[str, Any]:
    import mlx.core as mx

    kind = device.kind()
    if kind == "cpu":
        blas = device.load_blas()
        name = "Accelerate" if sys.platform == "darwin" else "OpenBLAS" if blas else "reference"
        return {"backend": kind, "blas": name}
    info = mx.device_info()
    keys = ("device_name", "architecture", "max_recommended_working_set_size", "memory_size")
    known = {f"device_{k.removeprefix('device_')}": info[k] for k in keys if k in info}
    return {"backend": kind, **known}


def _output(*command: str) -> str:
    """What a command prints; "" where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
