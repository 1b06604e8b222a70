"""Compare mlxkv with mlx-lm: `python -m benchmarks.compare --model smollm2:135m --output NAME`.

Each measurement is a process of its own and the engines take turns (A B A B ...), so that what the
machine does meanwhile meets both. Of a pair of runs the ratio is taken, and of the ratios the
median. Writes NAME.json (every raw run), NAME.md and NAME.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.options import add_machine_options
from benchmarks.report import ENGINES, Run

PROMPT = "Why is the sky blue?"
MEASURES = ("decode", "prefill", "cold", "memory", "graph")
KV_TYPES = ("native", "q8", "q4")
COLD_LIMIT_S = 120
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Job:
    """One command of each engine, run in turns."""

    name: str
    commands: dict[str, list[str]]
    timed: bool = False  # the process itself is the measurement, not what it prints


def jobs(args: argparse.Namespace, model: Path, scratch: Path) -> Iterator[Job]:
    """What `--what` asks for, quick ones first."""
    what = args.what
    if "cold" in what:
        yield from _cold_jobs(model, scratch, args.dtype)
    if "graph" in what:
        tiny = scratch / "tiny"
        helper("write_tiny_llama", tiny)
        yield _worker_job("graph", tiny, "--dtype=float32")
    if "memory" in what:
        yield _worker_job("memory", model, f"--dtype={args.dtype}", f"--prompt={args.prompt}")
    # One process per length: a long one must not wear the other's memory.
    common = f"--dtype={args.dtype}", f"--seconds={args.seconds}"
    for n in args.contexts if "decode" in what else []:
        for kv_type in args.kv_types:
            options = f"--contexts=[{n}]", f"--kv-type={kv_type}"
            yield _worker_job("speed", model, *common, *options)
    for n in args.prefills if "prefill" in what else []:
        yield _worker_job("speed", model, *common, f"--prefills=[{n}]")


def _worker_job(measure: str, model: Path, *options: str) -> Job:
    command = [sys.executable, "-m", "benchmarks.worker", f"--measure={measure}"]
    command += [f"--model={model}", *options]
    return Job(measure, {engine: [*command, f"--engine={engine}"] for engine in ENGINES})


def _cold_jobs(model: Path, scratch: Path, dtype: str) -> Iterator[Job]:
    """Whole commands, from the shell's fork to the exit behind the last token."""
    if _on_cpu() and dtype in ("auto", "float32"):
        model = helper("write_float32_copy", model, scratch / "float32")
    mlxkv, mlx_lm = [sys.executable, "-m", "mlxkv"], [sys.executable, "-m", "mlx_lm", "generate"]
    script = Path(sys.executable).with_name("mlxkv")
    if script.exists():
        mlxkv = [str(script)]
    chat = "chat_template" in (model / "tokenizer_config.json").read_text(encoding="utf-8")
    chat = chat or any(model.glob("chat_template*"))
    yield Job("--help", {"mlxkv": [*mlxkv, "--help"], "mlx-lm": [*mlx_lm, "--help"]}, timed=True)
    for n in (1, 16):
        limit = ["--max-tokens", str(n)]
        yield Job(
            f"shell to token {n}",
            {
                "mlxkv": [*mlxkv, "run", "-m", str(model), PROMPT, "--temperature", "0", *limit]
                + ([] if chat else ["--raw"]),
                "mlx-lm": [*mlx_lm, "--model", str(model), "--prompt", PROMPT, *limit]
                + ([] if chat else ["--ignore-chat-template"]),
            },
            timed=True,
        )


def run_once(job: Job, engine: str, index: int, env: dict[str, str]) -> Run:
    """One process; raises SystemExit with its stderr if it fails."""
    for _ in range(3):
        start = time.perf_counter()
        try:
            done = subprocess.run(
                job.commands[engine],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=COLD_LIMIT_S if job.timed else None,
            )
        except subprocess.TimeoutExpired:
            # A process that ends with a step in flight may hang in OpenBLAS' exit handler.
            print(f"{engine}, {job.name}: hung, once more", file=sys.stderr)
            continue
        break
    else:
        raise SystemExit(f"{engine}, {job.name}: over {COLD_LIMIT_S} s three times")
    elapsed = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{engine}, {job.name}: exit code {done.returncode}\n{done.stderr}")
    if job.timed:
        return Run(job.name, engine, index, "", {f"{job.name} s": elapsed})
    printed = json.loads(done.stdout.splitlines()[-1])
    return Run(
        job.name, engine, index, printed["blas"], printed["figures"], printed.get("note", "")
    )


def environment(args: argparse.Namespace) -> dict[str, str]:
    """The same for both engines: which BLAS, how many threads, no network."""
    env = os.environ | {
        "OPENBLAS_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if args.blas == "reference":
        return env | {"MLXKV_BLAS": "0"}
    if sys.platform == "linux":
        # For mlx-lm's command line, which loads none by itself; the workers would not need it.
        env["LD_PRELOAD"] = "libopenblas.so.0"
    return env


def helper(function: str, *paths: Path) -> Path:
    """Call a function of `checkpoints` in a process of its own.

    A child's peak memory starts at its parent's, so this process must stay small: no MLX in it.
    """
    code = (
        f"import sys; from pathlib import Path; from benchmarks import checkpoints as c; "
        f"c.{function}(*map(Path, sys.argv[1:]))"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], cwd=ROOT, check=True)
    return paths[-1]


def _on_cpu() -> bool:
    code = "from mlxkv import device; print(device.on_cpu())"
    return "True" in subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def some_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
        def names(text: str) -> list[str]:
            given = text.split(",")
            if unknown := set(given) - set(allowed):
                raise argparse.ArgumentTypeError(
                    f"{unknown.pop()!r}; allowed: {', '.join(allowed)}"
                )
            return given

        return names

    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--model", required=True, help="a directory or a name mlxkv knows")
    parser.add_argument("--what", type=some_of(MEASURES), default=list(MEASURES), metavar="A,B")
    parser.add_argument("--contexts", type=numbers, default=[0, 2048, 8192], metavar="N,N")
    parser.add_argument(
        "--kv-types", type=some_of(KV_TYPES), default=["native"], metavar="A,B",
        help=f"of decode: {', '.join(KV_TYPES)}; beside mlx-lm's QuantizedKVCache",
    )  # fmt: skip
    parser.add_argument("--prefills", type=numbers, default=[512, 2048, 8192], metavar="N,N")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the memory measure")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--seconds", type=float, default=4.0, help="of decoding in each run")
    add_machine_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    from mlxkv.store.resolve import resolve

    model = resolve(args.model).resolve()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as scratch:
        for job in jobs(args, model, Path(scratch)):
            for index in range(args.runs):
                # The second of a pair may find warmer files: take turns in who comes first.
                for engine in ENGINES if index % 2 == 0 else reversed(ENGINES):
                    run = run_once(job, engine, index, environment(args))
                    runs.append(run)
                    print(f"{engine:7} {run.describe()}", file=sys.stderr, flush=True)
    report.write("benchmarks.compare", ROOT, model.name, args, runs)


if __name__ == "__main__":
    main()
