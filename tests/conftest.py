"""Settings of the whole suite."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import hypothesis
import pytest

from mlxkv.base import device
from mlxkv.base.paths import kernels_dir
from mlxkv.cpu import building, library
from mlxkv.cpu.toolchain import BuildError

# No test finds on disk what another one computed; those that are about it choose a folder.
os.environ["MLXKV_KV_DISK"] = "0"

# Nor do chats of the suite become the developer's last chat.
os.environ["XDG_STATE_HOME"] = _STATE = tempfile.mkdtemp(prefix="mlxkv-tests-")
atexit.register(shutil.rmtree, _STATE, ignore_errors=True)

# What the developer's own shell sets for a model is not what a test expects.
for name in ("CONTEXT", "KV_TYPE", "MEMORY", "OVERFLOW", "KEEP"):
    os.environ.pop(f"MLXKV_{name}", None)

# An HTTP client reads a file of certificates when it is made, in 26 ms, but a folder only
# when it verifies one. No test speaks TLS.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = _STATE

# Tests that have a home of their own use the kernels that are built.
os.environ["MLXKV_KERNELS_DIR"] = str(kernels_dir())

# A shell that starts the suite in the background has it ignore Ctrl-C, which some tests are about.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same for one that outlives its terminal (nohup), and SIGHUP.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

_LONG_ROOMS = ("metal", "memory", "end_to_end", "engine", "prefix", "commands", "terminal", "bench",
               "benchmarks", "generation", "llm", "cpu")  # fmt: skip
LONG = tuple(f"tests/{room}/" for room in _LONG_ROOMS)

# Tiny models on shared machines: a slow example is no failure, and a run repeats itself.
hypothesis.settings.register_profile("mlxkv", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mlxkv")


def pytest_configure(config: pytest.Config) -> None:
    """Build the kernels before the tests, once: else the first ones run without, and slowly."""
    if not hasattr(config, "workerinput") and library.is_wanted():
        with suppress(BuildError):  # without a compiler the suite runs on MLX's own operations
            building.build()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep what was collected out of garbage collection: thousands of tests and their modules stay
    to the end, and each full collection took a fifth of a second to look at them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rooms with tests that take seconds come first: near the end, when one worker has no file
    left, the other's last one is short."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def pytest_report_header() -> str:
    state, why_not = library.state()
    return f"kernels of the CPU backend: {state}" + (f", {why_not}" if why_not else "")


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are settled in the test run on MLX's own operations."""
    monkeypatch.setattr("mlxkv.nn.kernels.library", lambda: None)


@pytest.fixture(params=["own", "gpu"])
def branches(request) -> Iterator[None]:
    """The test runs on this device's branches, and on those that a GPU takes."""
    from tests.support.branches import gpu_branches

    with gpu_branches() if request.param == "gpu" else nullcontext():
        yield


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are computed 256 tokens at a time, also on the branches of a GPU."""
    monkeypatch.setattr(device, "GPU_CHUNK", device.CPU_CHUNK)


@pytest.fixture
def totals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans leave the longest contexts and the curves away, which take most of their time."""
    from mlxkv.memory import needs, plan

    monkeypatch.setattr(needs.Needs, "longest", lambda self, room, sequences: 0)
    monkeypatch.setattr(needs.Needs, "total", lambda self, n_tokens, sequences: 0)
    monkeypatch.setattr(plan, "KV_TYPES", ())


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Iterator[Path]:
    """A folder for a module's tiny models, some hundred of them: removed afterwards."""
    path = tmp_path_factory.mktemp("families")
    yield path
    shutil.rmtree(path)
