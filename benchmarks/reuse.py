"""Prefix reuse of mlxkv, mlx-lm's prompt cache and mlx-lm's server, side by side.

`python -m benchmarks.reuse --model gemma3:270m --output NAME` sends the same conversations to each
(see `reuse_scenarios`), turn by turn, and writes NAME.json (every raw turn), NAME.md and NAME.svg:
time to first token and tokens computed. Each engine and scenario is a process of its own, and the
engines take turns; of a pair of runs the ratio is taken, and of the ratios the median.

On the CPU all compute in float32 with the same BLAS, on weights that were unpacked to float32:
mlx-lm takes minutes for one prompt on packed ones there. Elsewhere the model is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks import reuse_report as report
from benchmarks.compare import ROOT, environment
from benchmarks.report import about
from benchmarks.reuse_engines import LRU, MLXKV, NAMES, PROMPT_CACHE, SAVED, SERVER
from benchmarks.reuse_report import ANEW, Run
from benchmarks.reuse_scenarios import Markup, Scenario, Sizes, Writer

SCENARIOS = ("agent", "rewritten", "edit", "document", "two", "restart")


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs have in common.

    Args:
        model: directory of the model that is run.
        scenarios: what is sent, by name.
        answer_tokens: of every turn.
        scratch: for what comes and goes.
        env: of every process.
    """

    model: Path
    scenarios: dict[str, Scenario]
    answer_tokens: int
    scratch: Path
    env: dict[str, str]

    def run(self, engine: str, name: str, index: int) -> Iterator[Run]:
        """One scenario with one engine; where it restarts, in two processes."""
        scenario = self.scenarios[name]
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            state, transcript = Path(folder, "state"), Path(folder, "transcript.json")
            state.mkdir()
            stop = len(scenario.turns) if scenario.restart is None else scenario.restart
            done = [self._process(engine, name, 0, stop, transcript, state)]
            if scenario.restart is not None:
                before = Path(folder, "before.json")
                shutil.copy(transcript, before)
                n_bytes, dropped = drop_from_memory(state)
                done[0] |= {"state_bytes": n_bytes, "dropped_from_memory": dropped}
                last = len(scenario.turns)
                done.append(self._process(engine, name, stop, last, transcript, state))
                if engine == MLXKV:
                    # The same prompt where nothing was kept: what the restart is compared with.
                    empty = Path(folder, "empty")
                    empty.mkdir()
                    anew = self._process(engine, name, stop, last, before, empty)
                    yield Run.of(ANEW, name, index, [anew])
            yield Run.of(engine, name, index, done)

    def _process(
        self, engine: str, name: str, first: int, stop: int, transcript: Path, state: Path
    ) -> dict[str, Any]:
        """Some turns in a process of its own; raises SystemExit if it fails."""
        file = self.scratch / "scenario.json"
        file.write_text(json.dumps(asdict(self.scenarios[name])), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.reuse_worker"]
        command += [f"--engine={engine}", f"--model={self.model}", f"--scenario={file}"]
        command += [f"--first={first}", f"--stop={stop}", f"--transcript={transcript}"]
        command += [f"--answer-tokens={self.answer_tokens}", f"--state={state}"]
        print(f"{engine}, {name}, turns {first + 1} to {stop}", file=sys.stderr, flush=True)
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.env | {"MLXKV_KV": str(state)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{engine}, {name}: exit code {done.returncode}")
        return json.loads(done.stdout.splitlines()[-1])


def drop_from_memory(folder: Path) -> tuple[int, bool]:
    """Have the system forget what it holds of these files, as after a boot.

    Returns:
        Their size in bytes, and whether it was asked to: there is no call for it on macOS.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        if not hasattr(os, "posix_fadvise"):
            break
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only what is on disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sum(path.stat().st_size for path in files), hasattr(os, "posix_fadvise")


def unpack(model: Path, target: Path, env: dict[str, str]) -> Path:
    """A copy of a model with float32 weights, nothing packed."""
    script = Path(sys.executable).with_name("mlxkv")
    options = ["--dtype", "float32", "--quantize", "none"]
    subprocess.run(
        [str(script), "convert", str(model), "-o", str(target), *options],
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return target


def write_scenarios(model: Path, sizes: Sizes) -> dict[str, Scenario]:
    """Scenarios in the model's own tokens and markers."""
    from mlxkv.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(model)
    markup = Markup.of(lambda token: tokenizer.id_of(token) is not None)
    return Writer(
        lambda text: len(tokenizer.encode(text, add_special_tokens=False)), markup, sizes
    ).all()


def plan(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """(engine, scenario, run), the engines in turns."""
    for name in args.what:
        engines = list(args.engines)
        if SAVED in engines and name not in ("document", "restart"):
            engines.remove(SAVED)  # elsewhere nobody knows beforehand what to save
        for index in range(args.runs):
            first = index % len(engines)
            yield from ((e, name, index) for e in engines[first:] + engines[:first])


def parse() -> argparse.Namespace:
    def some_of(allowed: Sequence[str]):
        def names(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [name for name in given if name not in allowed]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r}; allowed: {', '.join(allowed)}")
            return given

        return names

    def size(text: str) -> tuple[str, int]:
        known = {field.name: field.default for field in fields(Sizes)}
        name, _, number = text.partition("=")
        if name not in known or not number.isdecimal() or int(number) < 1:
            shown = " ".join(f"{name}={default}" for name, default in known.items())
            raise argparse.ArgumentTypeError(f"{text!r}; allowed, with the defaults: {shown}")
        return name, int(number)

    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse", description=__doc__)
    parser.add_argument("--model", required=True, help="a directory or a name mlxkv knows")
    parser.add_argument("--what", type=some_of(SCENARIOS), default=list(SCENARIOS), metavar="A,B")
    engines = [MLXKV, PROMPT_CACHE, SERVER, SAVED]
    parser.add_argument(
        "--engines", type=some_of(NAMES), default=engines, metavar="A,B",
        help=f"of {', '.join(NAMES)}; all but {LRU} by default",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=3, help="of each engine and scenario")
    parser.add_argument(
        "--size", type=size, action="append", default=[], metavar="NAME=N",
        help="scale a scenario: turns, start, history, document, restart, ... in turns or tokens",
    )  # fmt: skip
    parser.add_argument("--weights", choices=("auto", "float32", "as-is"), default="auto")
    parser.add_argument("--blas", choices=("openblas", "reference"), default="openblas")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of OpenBLAS")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk that is to be measured")
    parser.add_argument("--output", type=Path, required=True, help="NAME or NAME.json")
    args = parser.parse_args()
    if MLXKV not in args.engines:
        parser.error(f"--engines: {MLXKV} must be among them: ratios are to it")
    return args


def on_cpu(env: dict[str, str]) -> bool:
    """Asked in a process of its own: MLX stays out of this one."""
    code = "from mlxkv import device; print(device.on_cpu())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True, text=True
    )
    return "True" in done.stdout


def write(output: Path, about_it: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """What there is so far: a run of hours that is stopped has not been for nothing."""
    summary = report.summary(runs)
    written = {**about_it, **summary, "runs": [asdict(run) for run in runs]}
    output.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return written


def main() -> None:
    args = parse()
    from mlxkv.store.resolve import resolve

    model, env = resolve(args.model).resolve(), environment(args)
    sizes = replace(Sizes(), **dict(args.size))
    output = args.output.with_suffix("")
    output.parent.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    written: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        weights = args.weights
        if weights == "auto":
            weights = "float32" if on_cpu(env) else "as-is"
        used = unpack(model, scratch / "model", env) if weights == "float32" else model
        scenarios = write_scenarios(used, sizes)
        bench = Bench(used, scenarios, sizes.answer, scratch, env)
        about_it = {
            "model": model.name,
            "settings": {
                **{name: getattr(args, name) for name in ("runs", "engines", "threads")},
                "weights": weights,
                "sizes": asdict(sizes),
            },
            **about(ROOT, "benchmarks.reuse"),
        }
        for engine, name, index in plan(args):
            runs += bench.run(engine, name, index)
            written = write(output, about_it, runs)
    table = report.markdown(written)
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    report.plot(written, output.with_suffix(".svg"))
    print(table)


if __name__ == "__main__":
    main()
