"""Ways to quantize at equal bits: `python -m benchmarks.quantizing --gguf FILE --work DIR ...`.

The source is a GGUF file without its grid: its values in 16 bits, each moved at random by up to
half a step of its group. Without that, an output in the file's own groups would be exact. Every way
converts that source; the figures are `mlxkv compare`'s on the held-out text. Work is kept in DIR,
so that a run that stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import about, keep, machine_lines
from mlxkv.convert.quality.calibration import Rounding
from mlxkv.convert.quality.sensitivity import Trials
from mlxkv.convert.quantization import MIXED

if TYPE_CHECKING:
    from mlxkv.convert.plan import ConvertPlan
    from mlxkv.convert.quality.calibration import Calibration, Measured
    from mlxkv.convert.quality.compare import Comparison
    from mlxkv.convert.quality.rounding import Moments

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Way:
    """One way to quantize.

    Args:
        tool: "mlxkv" or "mlx-lm".
        name: what it is called in the table.
        options: of the conversion.
        bits_of: the way whose bits `auto` gets.
    """

    tool: str
    name: str
    options: dict[str, Any]
    bits_of: str = ""


def ways(recipes: list[str]) -> list[Way]:
    """Plain and rounded affine4 and auto at its bits; each recipe of mlx-lm's, and auto at its."""
    found = [
        Way("mlxkv", "affine4", {"quantize": "affine4"}),
        Way("mlxkv", "auto", {"quantize": "auto"}, "affine4"),
    ]
    for recipe in recipes:
        theirs = f"mlx-lm {recipe}"
        found += [
            Way("mlx-lm", theirs, {"recipe": recipe}),
            Way("mlxkv", f"auto, as {theirs}", {"quantize": "auto"}, theirs),
        ]
    found.append(Way("mlxkv", "affine4, calibrated", {"quantize": "affine4", "calibrate": True}))
    return found


def make_source(gguf: Path, folder: Path, dtype: str) -> None:
    """The source without its grid."""
    import mlx.core as mx

    from mlxkv.convert import convert
    from mlxkv.convert.open import open_source
    from mlxkv.convert.tensors import matrix_shape

    convert(gguf, folder, quantize="none", dtype=dtype)
    random = np.random.default_rng(0)
    file = folder / "model.safetensors"
    arrays = mx.load(str(file))
    tensors = open_source(gguf).tensors
    for tensor in (tensors[name] for name in arrays):
        if tensor.quantization is None:
            continue
        n_rows, _ = matrix_shape(tensor.shape)
        steps = np.array(tensor.quantized_rows(0, n_rows)[1].astype(mx.float32))
        steps = np.repeat(steps, tensor.quantization.group_size, axis=1)
        moved = np.array(tensor.rows(0, n_rows))
        moved += steps * random.uniform(-0.5, 0.5, steps.shape).astype(np.float32)
        arrays[tensor.name] = mx.array(moved).reshape(tensor.shape).astype(getattr(mx, dtype))
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})


def say(what: str, done: int, total: int) -> None:
    print(f"\r{what}, {done} of {total}   ", end="", file=sys.stderr, flush=True)


class KeptRounding(Rounding):
    """Rounding whose moments are kept in a file for the next way; they are of the source alone."""

    def __init__(self, calibration: Calibration, plan: ConvertPlan, file: Path):
        super().__init__(calibration, plan)
        if not file.exists():
            names = [tensor.name for tensor in plan.tensors if tensor.name in self._parts]
            kept = {name: self._moments(name) for name in names}
            file.write_bytes(pickle.dumps(kept, protocol=5))
        self._kept = pickle.loads(file.read_bytes())

    def _moments(self, name: str) -> Moments | None:
        return self._kept[name] if hasattr(self, "_kept") else super()._moments(name)


class KeptTrials(Trials):
    """Trials whose divergences are kept in a file.

    Attributes:
        file: the file.
        cpu_s: what all of them took.
    """

    file: Path
    cpu_s = 0.0

    def divergence(self, weights: Mapping[str, Any]) -> float:
        kept = json.loads(self.file.read_text()) if self.file.exists() else {}
        key = " ".join(weights)
        if key not in kept:
            began_s = time.process_time()
            found = super().divergence(weights)
            kept[key] = found, time.process_time() - began_s
            self.file.write_text(json.dumps(kept))
        else:
            self.n_passes += 1
        KeptTrials.cpu_s = sum(seconds for _, seconds in kept.values())
        return kept[key][0]


class Work:
    """What is kept in the working folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.work
        self.source = self.folder / "source"
        self._calibration: Calibration | None = None
        if not (self.source / "config.json").exists():
            make_source(args.gguf, self.source, args.dtype)

    @property
    def calibration(self) -> Calibration:
        from mlxkv.convert.open import open_source
        from mlxkv.convert.quality.calibration import Calibration

        if self._calibration is None:
            source = open_source(self.source, text_only=True)
            self._calibration = Calibration(source, None, say)
            KeptTrials.file = self.folder / "trials.json"
            self._calibration.trials = KeptTrials
        return self._calibration

    def measured(self) -> Measured:
        """What `auto` measures, once for all bits."""
        from mlxkv.convert.plan import make_plan, parse_options

        file = self.folder / "measured.pickle"
        if not file.exists():
            plan = make_plan(self.calibration.source, parse_options(quantize="auto"))
            found = self.calibration.measure(plan, None, 4.5)
            file.write_bytes(pickle.dumps(replace(found, seconds=KeptTrials.cpu_s)))
        return pickle.loads(file.read_bytes())

    def make(self, way: Way, bits: float | None) -> Path:
        """The converted model; one that is there already stays."""
        folder = self.folder / way.name.replace(" ", "-").replace(",", "")
        if (folder / "config.json").exists() and way.name not in self.args.again:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        if way.tool == "mlx-lm":
            command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(self.source)]
            command += ["--mlx-path", str(folder), "-q", "--quant-predicate", way.options["recipe"]]
            subprocess.run([*command, "--q-group-size", "64"], check=True, stdout=sys.stderr)
        elif bits is None and "calibrate" not in way.options:
            from mlxkv.convert import convert

            convert(self.source, folder, **way.options)
        else:
            self._rounded(way, bits, folder)
        return folder

    def _rounded(self, way: Way, bits: float | None, folder: Path) -> None:
        """As `convert` does it, with what was measured before."""
        from mlxkv.convert.plan import make_plan, parse_options
        from mlxkv.convert.write import write_model

        options = parse_options(quantize=way.options["quantize"])
        source = self.calibration.source
        plan = make_plan(source, options)
        if bits is not None:
            formats = self.measured().formats(plan, bits)
            plan = make_plan(source, replace(options, formats=formats))
        rounding = KeptRounding(self.calibration, plan, self.folder / "moments.pickle")
        write_model(plan, source.tensors, source.write_side_files, folder, rounding=rounding)


def bits_of(folder: Path) -> float:
    """Bits per weight of a model directory, all arrays of it."""
    from mlxkv.convert.open import open_source
    from mlxkv.convert.tensors import matrix_shape

    n_bytes = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        n_bytes += file.stat().st_size - 8 - header
    n_values = 0
    for tensor in open_source(folder).tensors.values():
        rows, columns = matrix_shape(tensor.shape)
        n_values += rows * columns
    return 8 * n_bytes / n_values


def compared(work: Work, folder: Path, progress: Callable[[int, int, float], None]) -> Comparison:
    from mlxkv.convert.quality import compare
    from mlxkv.convert.quality.reference import open_model
    from mlxkv.convert.quality.texts import HELD_OUT, read_text, windows

    reference, tokenizer = open_model(work.source)
    model, _ = open_model(folder)
    tokens = windows(tokenizer, read_text(HELD_OUT), work.args.windows, compare.LENGTH)
    return compare.compare(reference, model, tokens, progress)


def markdown(written: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in written["summary"]}
    first = next(iter(rows.values()))
    lines = [
        f"# {written['model']}: ways to quantize, beside its 16-bit values",
        "",
        *machine_lines(written),
        f"- commit {written['commit']}",
        f"- `{written['command']}`",
        "",
        f"Source: the GGUF file's values in {written['settings']['dtype']}, each moved by up to "
        f"half a step of its group. KL in nats on the held-out text, {first['n_positions']:,} "
        "positions. The last column is the KL over that of the way with the same bits.",
        "",
        "| way | bits per weight | KL mean | p99 | same likeliest | perplexity | beside |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows.values():
        base = rows.get(row["bits_of"] or ("affine4" if row["name"].startswith("affine4,") else ""))
        ratio = f"{row['kl_mean'] / base['kl_mean']:.2f}" if base else ""
        lines.append(
            f"| {row['name']} | {row['bits']:.3f} | {row['kl_mean']:.4f} | {row['kl_p99']:.2f} | "
            f"{100 * row['top1']:.1f}% | {row['perplexity']:.2f} | {ratio} |"
        )
    lines += [
        "",
        f"Perplexity of the source: {first['reference_perplexity']:.2f}.",
    ]
    if seconds := written["settings"].get("measuring"):
        lines += ["", f"auto: {seconds} of CPU time in the trials."]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizing", description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--dtype", default="float16", help="of the source")
    parser.add_argument("--work", type=Path, required=True, help="some times the source's size")
    parser.add_argument("--recipes", nargs="*", default=["mixed_3_6", "mixed_4_6"], choices=MIXED)
    parser.add_argument("--measure", action="store_true", help="only measure the source")
    parser.add_argument("--windows", type=int, default=32, help="of the held-out text")
    parser.add_argument("--again", nargs="*", default=[], help="ways to make anew")
    parser.add_argument("--output", type=Path, required=True, help="NAME or NAME.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    work, file = Work(args), args.work / "rows.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    if args.measure:
        print(work.measured().text())
        return
    for way in ways(args.recipes):
        if way.name in rows and way.name not in args.again:
            continue
        bits = rows[way.bits_of]["bits"] if way.bits_of else None
        folder = work.make(way, bits)
        found = compared(work, folder, lambda done, total, kl: say(f"KL {kl:.4g}", done, total))
        rows[way.name] = {
            "name": way.name, "bits_of": way.bits_of, "bits": bits_of(folder),
            **asdict(found),
        }  # fmt: skip
        print(f"\n{way.name}: {rows[way.name]['bits']:.3f} bits, {found.text()}", file=sys.stderr)
        file.write_text(json.dumps(rows, indent=1))
    written = {
        "model": args.gguf.stem,
        "settings": {"dtype": args.dtype, "measuring": work.measured().text()},
        **about(ROOT, "quantizing"),
        "summary": list(rows.values()),
    }
    keep(args.output, written, markdown(written))


if __name__ == "__main__":
    main()
