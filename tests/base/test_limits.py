"""The memory limits of a process: control groups below a folder in place of /, and real ones."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxkv.base import device, limits, openblas
from mlxkv.bench import doctor
from mlxkv.errors import OutOfMemory
from mlxkv.models.loader import load_model
from tests.support.command_line import chat_model, environment

MIB = 1 << 20


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    device._least.cache_clear()
    yield
    device._least.cache_clear()


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A folder in place of /, on Linux and without limits of the test's own process."""
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    monkeypatch.setattr(limits.sys, "platform", "linux")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def process_is_in(root: Path, group: str, mount: str) -> None:
    (root / "proc/self/cgroup").write_text(group + "\n")
    (root / "proc/self/mountinfo").write_text(f"30 23 0:26 {mount}\n")


def files(folder: Path, **texts: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


V2 = "/ /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "/ /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def found(root: Path) -> dict[str, tuple[int, int]]:
    return {limit.name: (limit.n_bytes, limit.used_bytes) for limit in limits.limits()}


def test_every_group_up_to_the_root_counts_in_cgroup_v2(root):
    process_is_in(root, "0::/system.slice/a.service", V2)
    at = root / "sys/fs/cgroup"
    files(at, memory__stat="anon 1")  # the root of all groups has no limit
    files(at / "system.slice", memory__max=3 * MIB, memory__high="max", memory__current=9)
    files(
        at / "system.slice/a.service",
        memory__max="max",
        memory__high=2 * MIB,
        memory__current=5000,
        memory__stat="anon 900\ninactive_file 4000\nactive_file 100",
    )
    assert found(root) == {
        "cgroup memory.max of /system.slice": (3 * MIB, 9),
        "cgroup memory.high of /system.slice/a.service": (2 * MIB, 1000),
    }


def test_cgroup_v1_has_its_own_files_and_a_number_for_none(root):
    process_is_in(root, "5:cpu:/x\n4:memory:/docker/c", V1)
    at = root / "sys/fs/cgroup/memory"
    files(at, memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=1)
    files(at / "docker", memory__limit_in_bytes=7 * MIB, memory__usage_in_bytes=50)
    stat = "inactive_file 1\ntotal_inactive_file 30"
    files(
        at / "docker/c",
        memory__limit_in_bytes=8 * MIB,
        memory__usage_in_bytes=40,
        memory__stat=stat,
    )
    assert found(root) == {
        "cgroup memory.limit_in_bytes of /docker": (7 * MIB, 50),
        "cgroup memory.limit_in_bytes of /docker/c": (8 * MIB, 10),
    }


@pytest.mark.parametrize("group", ["/docker/c", "/", "/../other"])
def test_a_container_that_sees_its_own_group_as_the_root_finds_it(root, group):
    process_is_in(root, f"0::{group}", V2.replace("/ ", "/docker/c ", 1))
    files(root / "sys/fs/cgroup", memory__max=4 * MIB, memory__current=1)
    assert found(root) == {"cgroup memory.max of /": (4 * MIB, 1)}


def test_what_cannot_be_read_is_no_limit(root):
    assert limits.limits() == []
    process_is_in(root, "nonsense\n0::/a", "nonsense")
    assert limits.limits() == []
    process_is_in(root, "0::/a", V2)
    limits._group_files.cache_clear()
    files(root / "sys/fs/cgroup/a", memory__max="soon", memory__current="none")
    assert limits.limits() == []


def test_macos_has_none_and_reads_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(limits.sys, "platform", "darwin")
    monkeypatch.setattr(limits, "ROOT", tmp_path / "missing")
    assert limits.limits() == [] and limits.mapped_bytes() is None


@pytest.fixture
def one_gib(root, monkeypatch) -> None:
    """A service that may have 1 GiB, of which it uses 100 MiB beside MLX's arrays."""
    process_is_in(root, "0::/a.service", V2)
    files(root / "sys/fs/cgroup/a.service", memory__max=1024 * MIB, memory__current=100 * MIB)
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    import mlx.core as mx

    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)


def test_the_least_limit_is_the_machines_and_doctor_names_it(one_gib):
    assert device.memory_limit() == 1024 * MIB - 100 * MIB - device.MARGIN_BYTES
    said = doctor._memory({}, "cpu").value
    assert "892 MiB for models" in said and "cgroup memory.max of /a.service (1.0 GiB)" in said


def test_weights_over_what_a_group_leaves_are_not_loaded(one_gib, monkeypatch, tmp_path):
    path = chat_model(tmp_path / "m")
    monkeypatch.setattr(device, "MARGIN_BYTES", 924 * MIB)
    with pytest.raises(OutOfMemory, match=r"cgroup memory\.max of /a\.service \(1\.0 GiB\) leaves"):
        load_model(path, limit_bytes=1 << 40)


def test_openblas_has_its_buffers_before_anything_is_computed(monkeypatch):
    grown = []
    monkeypatch.setattr(openblas, "_try", lambda n: None)
    monkeypatch.setattr(openblas, "_grow", lambda library, n: grown.append(n))
    monkeypatch.setattr(openblas.ctypes, "CDLL", lambda name: None)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    pool = openblas.Buffers()
    assert pool.take("", 8, None) == 8 and grown == [8]
    assert pool.take("", 8, 1024 * MIB) == 2  # this thread's are counted once
    assert pool.take("", 8, 100 * MIB) == 1
    assert grown == [8]


def test_a_buffer_that_is_refused_is_an_error_and_not_taken(monkeypatch):
    monkeypatch.setattr(openblas, "_can_map", lambda n_bytes: False)
    pool = openblas.Buffers()
    with pytest.raises(OutOfMemory, match=r"OpenBLAS needs 129 MiB .* MLXKV_BLAS=0"):
        pool.take("", 1, None)
    assert pool.n_taken == 0 and not pool._taken


linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS enforces no such limit")


@linux
def test_a_real_limit_of_a_process_is_seen(tmp_path):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30,) * 2);"
        "from mlxkv.base import device; print(device.memory_limit(), device.tightest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    allowed, name = done.stdout.strip().split(" ", 1)
    assert 0 < int(allowed) < 1 << 30
    assert name == "ulimit -v (1.0 GiB)"


@linux
@pytest.mark.parametrize(("mib", "code"), [(180, 7), (300, 7), (700, 0)])
def test_a_command_under_a_hard_limit_answers_or_fails_in_one_line(tmp_path, mib, code):
    chat_model(tmp_path / "models/m", hidden_size=256, intermediate_size=512)
    env = environment(tmp_path, MLXKV_KV=str(tmp_path / "kv"))
    limited = ["sh", "-c", 'ulimit -v "$0" && exec "$@"', str(mib * 1024)]
    done = subprocess.run(
        [*limited, sys.executable, "-m", "mlxkv", "run", "-m", "m", "-n", "4", "hello " * 100],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith("mlxkv: ") and done.stderr.count("\n") == 1, done.stderr
