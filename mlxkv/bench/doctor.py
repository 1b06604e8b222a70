"""The checks of `mlxkv doctor`: device, folders, packages, and how to fix problems."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mlxkv.base import device
from mlxkv.base.units import human_bytes
from mlxkv.errors import UsageError, one_line

PACKAGES = ("mlx", "mlx-lm", "tokenizers", "huggingface-hub", "gguf", "safetensors")
LOW_DISK_BYTES = 2 << 30
OLDEST_MACOS = 14


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        state: `ok`, `advice` (works, but could be better) or `broken`.
        advice: what to do; "" if nothing.
    """

    name: str
    value: str
    state: str = "ok"
    advice: str = ""


def examine() -> list[Finding]:
    """Run all checks; raises nothing."""
    from mlxkv import __version__

    python = Finding("python", f"{platform.python_version()} ({sys.executable})")
    folders = [_models_folder(), _kv_folder(), _kv_key(), _hub_cache()]
    return [Finding("mlxkv", __version__), python, _system(), *_mlx(), *folders, *_packages()]


def _system() -> Finding:
    machine = platform.machine()
    if sys.platform != "darwin":
        return Finding("system", f"{platform.system()} {platform.release()} ({machine})")
    version = platform.mac_ver()[0]
    value = f"macOS {version} ({machine})"
    if int(version.split(".")[0] or 0) < OLDEST_MACOS:
        return Finding("system", value, "broken", f"update to macOS {OLDEST_MACOS} or newer")
    if machine != "arm64":
        advice = "use an arm64 Python on an M-series Mac, such as python.org's, without Rosetta"
        return Finding("system", value, "broken", advice)
    return Finding("system", value)


def _mlx() -> list[Finding]:
    try:
        import mlx.core as mx
    except ImportError as error:
        what = "mlx[cpu]" if sys.platform == "linux" else "mlx"
        return [Finding("device", f"no MLX ({error})", "broken", f"pip install '{what}'")]
    if wanted := _too_old("mlx"):  # may lack the functions used below
        return [Finding("device", f"MLX {metadata.version('mlx')}", "broken", _install(wanted))]
    info = mx.device_info()
    kind = device.kind()
    name = str(info.get("device_name", info.get("architecture", "")))
    value = {"metal": "Metal", "cuda": "CUDA", "cpu": "CPU"}[kind]
    findings = [_computes(f"{value}, {name}", mx)]
    if kind == "cpu" and sys.platform == "darwin":
        advice = "MLX finds no Metal device here, as in many virtual machines"
        findings.append(Finding("metal", "not used", "advice", advice))
    findings += [_memory(info, kind), _blas(), _compiler(kind), *_kernels(kind)]
    return findings


def _computes(value: str, mx: Any) -> Finding:
    """Compute a small product, because a driver may be found and not work."""
    try:
        ones = mx.ones((8, 8))
        good = (ones @ ones).sum().item() == 512
    except RuntimeError as error:
        return Finding("device", value, "broken", one_line(error)[:200])
    if not good:
        return Finding("device", value, "broken", "MLX computes wrong products here: reinstall it")
    return Finding("device", value)


def _memory(info: Any, kind: str) -> Finding:
    ram = device.ram_bytes()
    text = f"{human_bytes(ram)} RAM, {human_bytes(device.memory_limit())} for models"
    if (tight := device.tightest()) is not None:
        text += f" by {tight}, less what this process and others in it take"
    if kind == "metal" and (longest := info.get("max_buffer_length")):
        text += f", {human_bytes(int(longest))} in one buffer"
    if (most := device.recommended_bytes()) is not None:
        text += f", up to {human_bytes(most)} wired (what the models may take, if that is less)"
    return Finding("memory", text)


def _blas() -> Finding:
    if sys.platform != "linux":
        return Finding("blas", "Accelerate")
    library = device.load_blas()
    if library is not None:
        threads = os.environ.get("OPENBLAS_NUM_THREADS", "?")
        return Finding("blas", f"{library}, {threads} threads")
    if os.environ.get("MLXKV_BLAS") == "0":
        return Finding("blas", "MLX's own (MLXKV_BLAS=0)")
    return Finding(
        "blas",
        "MLX's own, the slow reference",
        "advice",
        "apt install libopenblas0-pthread (for products that the kernels below do not take)",
    )


def _compiler(kind: str) -> Finding:
    if kind != "cpu":
        return Finding("compiler", "not needed")
    found = shutil.which("g++") or shutil.which("c++")
    if found:
        return Finding("compiler", found)
    return Finding(
        "compiler",
        "no C++ compiler",
        "advice",
        "apt install g++ (mx.compile on the CPU needs it; without it mlxkv runs uncompiled)",
    )


def _kernels(kind: str) -> list[Finding]:
    """The kernels of the CPU backend; no line on a GPU, which has no use for them."""
    if kind != "cpu":
        return []
    from mlxkv.nn.kernels import state

    value, why = state()
    if not why:
        return [Finding("kernels", value)]
    return [Finding("kernels", value, "advice", f"{why} (answers are slower without)")]


def _models_folder() -> Finding:
    from mlxkv.base.paths import models_dir
    from mlxkv.store.refs import stored

    folder = models_dir()
    existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        return Finding(
            "models", f"{folder} cannot be written", "broken", "set MLXKV_MODELS to another folder"
        )
    free = shutil.disk_usage(existing).free
    text = f"{folder}, {len(stored())} models, {human_bytes(free)} free"
    if free < LOW_DISK_BYTES:
        return Finding("models", text, "advice", "make room, or set MLXKV_MODELS to another disk")
    return Finding("models", text)


def _kv_folder() -> Finding:
    from mlxkv.base import time_machine
    from mlxkv.base.paths import kv_dir

    folder = kv_dir()
    pages = folder / "pages"
    if sys.platform != "darwin" or not pages.is_dir():
        return Finding("kv", str(folder))
    if time_machine.is_excluded(pages):
        return Finding("kv", f"{folder}, pages not in Time Machine")
    advice = f"tmutil addexclusion '{pages}'"
    return Finding("kv", f"{folder}, pages backed up by Time Machine", "advice", advice)


def _kv_key() -> Finding:
    from mlxkv.base.seal import KEYCHAIN, VARIABLE, seal_of_environment

    chosen = os.environ.get(VARIABLE, "").strip()
    try:
        is_on = seal_of_environment().is_on
    except UsageError as error:
        return Finding("kv encryption", f"{VARIABLE} is set", "broken", one_line(error))
    if not is_on:
        return Finding("kv encryption", f"off ({VARIABLE} is not set)")
    where = "the keychain" if chosen == KEYCHAIN else VARIABLE
    return Finding("kv encryption", f"on, AES-256-GCM, key in {where}")


def _hub_cache() -> Finding:
    try:
        from huggingface_hub import constants
    except ImportError:
        return Finding("hub cache", "no huggingface-hub", "broken", "pip install huggingface-hub")
    offline = ", offline" if constants.HF_HUB_OFFLINE else ""
    return Finding("hub cache", f"{constants.HF_HUB_CACHE} ({constants.ENDPOINT}{offline})")


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            wanted = _too_old(name)
            state, advice = ("broken", _install(wanted)) if wanted else ("ok", "")
            findings.append(Finding(name, metadata.version(name), state, advice))
        except metadata.PackageNotFoundError:
            if name == "mlx-lm":
                advice = "pip install mlx-lm, to run architectures that mlxkv does not define"
                findings.append(Finding(name, "not installed", "advice", advice))
            else:
                findings.append(Finding(name, "not installed", "broken", f"pip install {name}"))
    return findings


def _too_old(name: str) -> str:
    """mlxkv's requirement that the installed package is too old for; "" if it is new enough."""
    try:
        requirements = metadata.requires("mlxkv") or []
    except metadata.PackageNotFoundError:  # run from its sources
        return ""
    installed = _numbers(metadata.version(name))
    for requirement in requirements:
        bound = re.match(rf"{name}(?:\[\w+\])?[<>=!~,.\d ]*?>=([\d.]+)", requirement)
        if bound and installed < _numbers(bound[1]):
            return f"{name}>={bound[1]}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    numbers = re.match(r"[\d.]*\d", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _install(requirement: str) -> str:
    return f"pip install --upgrade '{requirement}'"


def text(findings: Sequence[Finding]) -> str:
    """The report as text: a line for each finding, followed by its advice."""
    marks = {"ok": " ", "advice": "!", "broken": "x"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]} {finding.name:<16} {finding.value}")
        if finding.advice:
            lines.append(f"  {'':<16} -> {finding.advice}")
    return "\n".join(lines)


def to_dict(findings: Sequence[Finding]) -> dict[str, dict[str, str]]:
    """The report as JSON has it."""
    return {finding.name: asdict(finding) for finding in findings}
