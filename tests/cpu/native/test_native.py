"""The kernels and the pool as programs of their own, without MLX and Python: under sanitizers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlxkv.cpu import building

HERE = Path(__file__).parent
ADDRESS, MEMORY, THREADS = (f"-fsanitize={x}" for x in ("address", "address,undefined", "thread"))
FLAGS = ("-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-fopenmp-simd", "-w")
FLAGS += ("-fno-sanitize-recover=all", f"-I{building.SOURCES}")
LIMIT_S = 240  # for a machine that is busy; some seconds on one that is not

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="no g++ to build with"
)


def build(folder: Path, sanitizer: str, *sources: Path, defines: tuple[str, ...] = ()) -> Path:
    """A program of these sources, each compiled on its own."""
    program = folder / "program"
    probe = ["g++", sanitizer, "-x", "c++", "-", "-o", str(program)]
    if subprocess.run(probe, input="int main() {}", text=True, check=False).returncode:
        pytest.skip(f"no library for {sanitizer}")
    objects = [folder / f"{source.stem}{i}.o" for i, source in enumerate(sources)]
    jobs = [
        subprocess.Popen(
            ["g++", *FLAGS, *defines, *_checks(source, sanitizer), "-c", str(source), "-o", str(at)]
        )
        for source, at in zip(sources, objects, strict=True)
    ]
    assert [job.wait(LIMIT_S) for job in jobs] == [0] * len(jobs)
    subprocess.run(["g++", sanitizer, *map(str, objects), "-o", str(program)], check=True)
    return program


def _checks(source: Path, sanitizer: str) -> list[str]:
    """Products of few rows have a function for each format and number of rows: with all checks the
    compiler takes a minute of CPU time for them, and a fifth with addresses alone."""
    return ["-O0", ADDRESS] if source.stem == "amx" else [sanitizer]


def run(program: Path, *arguments: str) -> None:
    done = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is not for the thread sanitizer")
    assert done.returncode == 0, done.stderr[-4000:]


def test_kernels_stay_in_their_memory_and_agree_with_the_baseline(tmp_path: Path) -> None:
    units = [building.SOURCES / f"{name}.cpp" for name in ("amx", "avx512", "avx2", "baseline")]
    run(build(tmp_path, MEMORY, *units, HERE / "kernels.cpp"))


def test_the_pool_runs_each_piece_once_under_delays_callers_and_signals(tmp_path: Path) -> None:
    sources = building.SOURCES / "pool.cpp", HERE / "pool.cpp"
    run(build(tmp_path, THREADS, *sources, defines=("-DMLXKV_STRESS",)))


def test_the_pool_works_in_children_that_were_forked(tmp_path: Path) -> None:
    sources = building.SOURCES / "pool.cpp", HERE / "pool.cpp"
    run(build(tmp_path, MEMORY, *sources, defines=("-DMLXKV_STRESS",)), "2000", "forks")
