"""`mlxkv serve` beside mlx-lm's server: `python -m benchmarks.serve --model M --output NAME`.

Clients ask at the same time, one request each, and stream greedy answers: equal prompts, a long one
among short ones, and questions behind one system prompt that all share. Each measurement is a
server of its own on weights that both read from one folder, the engines take turns, and a ratio is
the median over pairs of runs. Every run has prompts of its own, the same for both. Writes
NAME.json, NAME.md and NAME.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import report
from benchmarks.compare import ROOT, environment
from benchmarks.load_client import ANSWERED, Answer, Ask, ask_all, percentile
from benchmarks.load_server import MLX_LM, MLXKV, Server
from benchmarks.options import add_machine_options
from benchmarks.report import ENGINES, Run
from benchmarks.reuse import on_cpu, unpack
from benchmarks.reuse_scenarios import Text

GREEDY = {"temperature": 0.0}
MLX_LM_ON_CPU = "--prefill-step-size=256"
"""8 prompts of 1,024 tokens: 50 s to the first token instead of 59 with 512 and 68 with 2048, its
default. One prompt at a time instead of 8 was slower; a second OpenBLAS thread changed little."""
WARM_UP_TOKENS, WARM_UP_ANSWER = 48, 4
QUESTION = "\nWrite a very long story, of at least two thousand words, about the {} and the {}.\n"
THINGS = ("harbour", "ladder", "comet", "orchard", "violin", "glacier", "lantern", "compass")

Cut = Callable[[str, int], str]
"""A text and a number of tokens -> about that many of its first ones."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the clients ask at a time.

    Args:
        name: as the table shows it.
        lengths: of each prompt, in tokens.
        shared: tokens of a system prompt that all have in front; 0 for none.
    """

    name: str
    lengths: tuple[int, ...]
    shared: int = 0

    def asks(self, seed: int, n_answer: int, cut: Cut, chat: bool) -> list[Ask]:
        """Their requests.

        Args:
            seed: of the text: another one is another text from the first line on.
            n_answer: tokens of each answer.
            cut: see `Cut`.
            chat: the shared text can be a message of its own.
        """
        if self.shared:
            system = cut(_text(seed, self.shared), self.shared)
            return [
                Ask(self.name, _asked(system, i, chat), n_answer, GREEDY)
                for i in range(len(self.lengths))
            ]
        prompts = [cut(_text(seed * 100 + i, n), n) for i, n in enumerate(self.lengths)]
        return [Ask(self.name, prompt, n_answer, GREEDY) for prompt in prompts]


def _asked(system: str, i: int, chat: bool) -> str | list[dict[str, str]]:
    question = QUESTION.format(THINGS[i % len(THINGS)], THINGS[(i * 5 + 3) % len(THINGS)])
    if not chat:
        return system + question
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _text(seed: int, n_tokens: int) -> str:
    """Lines of at least `n_tokens` tokens: none has fewer characters."""
    return Text(lambda line: len(line) // 8, seed).lines(n_tokens)


def settings_of(clients: int, prompts: Sequence[int], long: int, shared: int) -> Iterator[Setting]:
    """Equal prompts, a long one among the shortest, and a shared system prompt."""
    for n in prompts:
        yield Setting(f"{clients} x {n}", (n,) * clients)
    if long and clients > 1:
        short = min(prompts, default=64)
        lengths = (short,) * (clients - 1) + (long,)
        yield Setting(f"{clients - 1} x {short} + {long}", lengths)
    if shared:
        yield Setting(f"{clients} sharing {shared}", (0,) * clients, shared)


def cut_with(model: Path) -> Cut:
    """Cuts texts in the model's own tokens."""
    from mlxkv.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(model)

    def cut(text: str, n_tokens: int) -> str:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return tokenizer.decode(tokens[:n_tokens])

    return cut


def has_template(model: Path) -> bool:
    """Whether it comes with a chat template."""
    config = model / "tokenizer_config.json"
    written = config.read_text(encoding="utf-8") if config.exists() else ""
    return '"chat_template"' in written or any(model.glob("chat_template*"))


def figures(
    setting: Setting, wall_s: float, cpu_s: float, answers: Sequence[Answer]
) -> dict[str, float]:
    """What is reported of one measurement.

    Args:
        setting: what was asked.
        wall_s: seconds until the last answer had ended.
        cpu_s: that the server's threads were computing in that time.
        answers: that came.

    Raises:
        SystemExit: a request was not answered.
    """
    for answer in answers:
        if answer.outcome != ANSWERED or not answer.piece_s or not answer.n_tokens:
            raise SystemExit(f"{setting.name}: not answered: {answer.error or answer.outcome}")
    name, firsts = setting.name, [answer.piece_s[0] for answer in answers]
    gaps = [1e3 * gap for answer in answers for gap in answer.gaps_s]
    n_tokens = sum(answer.n_tokens for answer in answers)
    found = {f"serve {name} tok/s": n_tokens / wall_s}
    found[f"serve {name} cpu ms/tok"] = 1e3 * cpu_s / n_tokens
    if together := all_together(answers):
        found[f"all decoding {name} tok/s"] = together
    for percent in (50, 99):
        found[f"first token {name} p{percent} s"] = percentile(firsts, percent)
    for percent in (50, 99):
        found[f"between pieces {name} p{percent} ms"] = percentile(gaps, percent)
    if setting.shared:
        n_computed = sum(answer.computed_tokens for answer in answers)
        n_own = sum(answer.prompt_tokens - setting.shared for answer in answers)
        found[f"computed of prompts, {name}, tokens"] = n_computed
        found[f"times that the shared {setting.shared} were"] = (
            n_computed - n_own
        ) / setting.shared
    return found


def all_together(answers: Sequence[Answer]) -> float | None:
    """Tokens/s from when the last has begun until the first is done; None if they never met."""
    start = max(answer.start_s + answer.piece_s[0] for answer in answers)
    stop = min(answer.start_s + answer.piece_s[-1] for answer in answers)
    if stop <= start:
        return None
    n_tokens = 0.0
    for answer in answers:
        within = sum(start < answer.start_s + at <= stop for at in answer.piece_s)
        n_tokens += within * answer.n_tokens / len(answer.piece_s)
    return n_tokens / (stop - start)


def same_texts(texts: dict[tuple[str, int, str], list[str]]) -> str:
    """How many answers of a pair are the same text: (setting, run, engine) -> texts."""
    counts: dict[str, list[int]] = {}
    for (setting, index, engine), ours in texts.items():
        theirs = texts.get((setting, index, MLX_LM))
        if engine == MLXKV and theirs is not None:
            count = counts.setdefault(setting, [0, 0])
            count[0] += sum(a == b for a, b in zip(ours, theirs, strict=True))
            count[1] += len(ours)
    parts = [f"{setting}: {same} of {n}" for setting, (same, n) in counts.items()]
    return "answers that are the same text as mlx-lm's: " + "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements have in common.

    Args:
        model: directory of the weights.
        env: of each server, without what is the engine's own.
        options: further words of each engine's command line.
        n_answer: tokens of an answer.
        limit_s: of one measurement.
        cut: see `Cut`.
        chat: whether the model has a chat template.
    """

    model: Path
    env: dict[str, str]
    options: dict[str, list[str]]
    n_answer: int
    limit_s: float
    cut: Cut
    chat: bool

    def run(self, setting: Setting, engine: str, index: int) -> tuple[Run, list[Answer]]:
        """One server, warmed up, and the requests."""
        asks = setting.asks(index + 1, self.n_answer, self.cut, self.chat)
        with tempfile.TemporaryDirectory() as pages:
            env = self.env | {"MLXKV_KV": pages}
            with Server(engine, self.model, env, self.options[engine]) as server:
                wall_s, cpu_s, answers = asyncio.run(self._measured(server, asks))
                blas = server.blas
        short = sum(answer.n_tokens < self.n_answer for answer in answers)
        note = f"{setting.name}: {short} answers ended by themselves" if short else ""
        found = figures(setting, wall_s, cpu_s, answers)
        return Run(f"serve {setting.name}", engine, index, blas, found, note), answers

    async def _measured(self, server: Server, asks: list[Ask]) -> tuple[float, float, list[Answer]]:
        """Behind a warm-up of one request, and of as many as are measured.

        Returns:
            Seconds, those of all the server's threads, and the answers.
        """
        texts = [_text(10**6 + i, WARM_UP_TOKENS) for i in range(len(asks))]
        warm = [Ask("warm-up", text, WARM_UP_ANSWER, GREEDY) for text in texts]
        for some in (warm[:1], warm, asks):
            start_s = server.cpu_s
            wall_s, answers = await ask_all(server.url, server.model, some, self.limit_s)
            cpu_s = server.cpu_s - start_s
            if failed := [answer for answer in answers if answer.outcome != ANSWERED]:
                raise SystemExit(f"{server.engine}: {failed[0].error}\n{server.log[-2000:]}")
        return wall_s, cpu_s, answers


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--model", required=True, help="a directory or a name mlxkv knows")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--prompts", type=numbers, default=[64, 512], metavar="N,N")
    parser.add_argument("--long", type=int, default=2048, help="of one of them in mixed; 0: none")
    parser.add_argument("--shared", type=int, default=2048, help="a system prompt; 0: none")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs")
    parser.add_argument(
        "--weights", choices=("auto", "float32", "packed", "as-is"), default="auto",
        help="float32: nothing packed (auto on the CPU); packed: as they are, scales in float32",
    )  # fmt: skip
    parser.add_argument("--mlxkv", default="", metavar="OPTIONS", help="for `mlxkv serve`")
    parser.add_argument(
        "--mlx-lm", metavar="OPTIONS",
        help="for `mlx_lm server`; without it what is fastest on the CPU, its defaults elsewhere",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=900, help="seconds of one measurement")
    add_machine_options(parser, of="of mlxkv; auto: float32 on the CPU")
    return parser.parse_args(argv)


def prepared(weights: str, model: Path, scratch: Path, env: dict[str, str]) -> Path:
    """The folder that both servers load; see `--weights`."""
    from benchmarks.compare import helper

    if weights == "auto":
        weights = "float32" if on_cpu(env) else "as-is"
    if weights == "as-is":
        return model
    target = scratch / model.name
    if weights == "packed":
        return helper("write_float32_copy", model, target)
    return unpack(model, target, env)


def measured(
    args: argparse.Namespace, bench: Bench
) -> tuple[list[Run], dict[tuple[str, int, str], list[str]]]:
    """All runs, and the texts of their answers."""
    runs, texts = [], {}
    for setting in settings_of(args.clients, args.prompts, args.long, args.shared):
        for index in range(args.runs):
            for engine in ENGINES if index % 2 == 0 else reversed(ENGINES):
                run, answers = bench.run(setting, engine, index)
                runs.append(run)
                texts[setting.name, index, engine] = [answer.text for answer in answers]
                print(f"{engine:7} {run.describe()}", file=sys.stderr, flush=True)
    return runs, texts


def main() -> None:
    args = parse()
    from mlxkv.store.resolve import resolve

    model, env = resolve(args.model).resolve(), environment(args)
    if args.mlx_lm is None:
        args.mlx_lm = MLX_LM_ON_CPU if on_cpu(env) else ""
    with tempfile.TemporaryDirectory() as folder:
        used = prepared(args.weights, model, Path(folder), env)
        options = {
            MLXKV: [f"--dtype={args.dtype}", *shlex.split(args.mlxkv)],
            MLX_LM: shlex.split(args.mlx_lm),
        }
        chat = has_template(used)
        bench = Bench(used, env, options, args.tokens, args.limit, cut_with(used), chat)
        runs, texts = measured(args, bench)
    first = next(i for i, run in enumerate(runs) if run.engine == MLXKV)
    note = "; ".join(filter(None, (runs[first].note, same_texts(texts))))
    runs[first] = replace(runs[first], note=note)
    report.write("benchmarks.serve", ROOT, model.name, args, runs)


if __name__ == "__main__":
    main()
