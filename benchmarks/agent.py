"""First token of an agent's turns: this checkout, an older one, and mlx-lm's server.

    python -m benchmarks.agent TOKENIZER TEMPLATE --old CHECKOUT --output benchmarks/results/agent

A session of the shape of a coding agent's: a system prompt and a file of some 23,000 tokens
together, then ten turns in which the model calls a tool and the client sends the result. Every
client sends back what it got. Each server is started anew for each run, they take turns, and the
client waits `--rest` seconds before each result, as a tool takes time.

With `--changes` the client changes its prompts as coding agents do, in the places where recordings
of them have it: a billing line at the head of the system text is another in each request, each
result ends with a line that counts the tokens left, a system message stands behind the first user
message, and the git status at the end of the system text, which tools follow in the template, is
another from turn 6 on, as after `claude -c`. All servers get the same requests; this checkout runs
with `--agent-prompts`, which the others do not have.

The model is random and tiny, with a long context, and its answers are the same words in every turn:
its layers compute as usual and add nothing, so a token alone decides which one comes next. Calls
are written as compact JSON, which templates write with blanks. TOKENIZER is a folder with
tokenizer.json and tokenizer_config.json that knows `<tool_call>` (Qwen3's), TEMPLATE a file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.checkpoints import write_tiny_llama
from benchmarks.compare import ROOT, environment
from benchmarks.load_server import MLX_LM, MLXKV, Server

N_TURNS = 10
OLD = "before"
ENGINES = (MLXKV, OLD, MLX_LM)
HIDDEN = 64
CONTINUED = 6
"""The turn from which on a client that changes its prompts tells another git status."""
N_ARGUMENT = 60
"""Words of a call's argument."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Use {name} on the working tree. " * 20,
            "parameters": {"type": "object", "properties": {"text": {"type": "array"}}},
        },
    }
    for name in ("edit", "read", "run", "search", "plan", "fetch")
]


def answer_text(words: Sequence[str]) -> str:
    """What the model says: some words, then a call with many."""
    said, argument = "".join(words[:20]), "".join(words[20 : 20 + N_ARGUMENT]).strip()
    call = json.dumps({"name": "edit", "arguments": {"text": [argument]}}, separators=(",", ":"))
    return f"{said}<tool_call>{call}</tool_call><|im_end|>"


def write_model(folder: Path, tokenizer: Path, template: Path, context: int) -> Path:
    """A model that says `answer_text` behind the prompt's last token."""
    import mlx.core as mx
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    vocabulary = backend.get_vocab()
    n_vocab = -(-(max(vocabulary.values()) + 1) // 64) * 64
    path = write_tiny_llama(folder, 2, HIDDEN, 1, 32, n_vocab=n_vocab, context=context)
    chain = successors(backend)
    weights: Any = mx.load(str(path / "model.safetensors"))
    embedded = np.random.RandomState(0).standard_normal((n_vocab, HIDDEN)).astype(np.float32)
    head = np.zeros_like(embedded)
    for token, following in chain.items():
        head[following] += embedded[token] / np.linalg.norm(embedded[token])
    weights["model.embed_tokens.weight"] = mx.array(embedded)
    weights["lm_head.weight"] = mx.array(head)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((path / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "eos_token_id": vocabulary["<|im_end|>"]}
    (path / "config.json").write_text(json.dumps(config))
    backend.save(str(path / "tokenizer.json"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings |= {"chat_template": template.read_text(), "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def successors(backend: Any) -> dict[int, int]:
    """Which token follows which, from the line break that ends a prompt to the end token."""
    vocabulary = backend.get_vocab()
    words = [
        token.replace("Ġ", " ")
        for token in sorted(vocabulary)
        if token.startswith("Ġ")
        and token[1:].isascii()
        and token[1:].islower()
        and token[1:].isalpha()
        and len(token) > 5
    ]
    random.Random(1).shuffle(words)
    text = answer_text(words)
    ids = backend.encode("\n" + text, add_special_tokens=False).ids
    pairs: dict[int, int] = {}
    for token, following in itertools.pairwise(ids):
        if pairs.setdefault(token, following) != following:
            raise SystemExit(f"the answer has a token twice: {backend.id_to_token(token)!r}")
    return pairs


def lines(seed: int, n: int) -> str:
    """Lines of a program, about 20 tokens each."""
    pick = random.Random(seed)
    names = ("order", "queue", "limit", "reader", "stream", "window", "config", "result")
    made = []
    for i in range(n):
        a, b = pick.choice(names), pick.choice(names)
        made.append(f"    {a}_{i} = self.{b}.{a}(item[{i % 7}], {b}=None)  # {a}")
    return "\n".join(made)


def opening(n_lines: int, turn: int, changes: bool) -> list[dict[str, Any]]:
    """The messages before the first answer, as a client sends them in a turn."""
    system = "You change programs.\n" + lines(0, n_lines)
    late = []
    if changes:
        billing = f"cc_version=2.1.332.{turn:03x}; cc_entrypoint=cli; cch={turn * 7919:05x};"
        files = "(clean)" if turn < CONTINUED else "M src/queue.py\nM src/reader.py"
        status = f"gitStatus: as of the start.\nCurrent branch: main\nStatus:\n{files}"
        system = f"x-anthropic-billing-header: {billing}\n\n{system}\n\n{status}"
        late = [{"role": "system", "content": "Skills of this folder:\n" + lines(98, 20)}]
    user = {"role": "user", "content": "Rename the queue.\n" + lines(1, 20)}
    return [{"role": "system", "content": system}, user, *late]


def result_text(turn: int, changes: bool) -> str:
    """What a tool gives in a turn."""
    text = f"changed {turn}\n" + lines(1 + turn, 10)
    left = f"\n\n<total_tokens>{176_000 - 300 * turn} tokens left</total_tokens>"
    return text + left if changes else text


@dataclass(slots=True)
class Turn:
    """One turn, as the client sees it.

    Args:
        first_s: to the first token.
        cpu_s: that the server's threads computed until then.
        total_s: to the end.
        prompt: its tokens.
        cached: those that were restored; None where the server does not tell.
    """

    first_s: float
    cpu_s: float
    total_s: float
    prompt: int
    cached: int | None


def ask(
    client: httpx.Client, server: Server, messages: Sequence[Any]
) -> tuple[Turn, dict[str, Any]]:
    """Send a request; its figures, and the answer as a message."""
    body = {
        "model": server.model,
        "messages": messages,
        "tools": TOOLS,
        "max_tokens": 400,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    usage, first, cpu = {}, None, server.cpu_s
    text, call, arguments = "", {}, ""
    start = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                delta = choice.get("delta", {})
                if first is None and (delta.get("content") or delta.get("tool_calls")):
                    first, cpu = time.perf_counter() - start, server.cpu_s - cpu
                text += delta.get("content") or ""
                for piece in delta.get("tool_calls") or ():
                    call = call or piece
                    arguments += piece["function"].get("arguments") or ""
    total = time.perf_counter() - start
    if first is None or not call:
        raise SystemExit(f"no call in the answer: {text[:200]!r}")
    function = {"name": call["function"]["name"], "arguments": arguments}
    made = {"id": call.get("id") or "call_1", "type": "function", "function": function}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    turn = Turn(first, cpu, total, usage.get("prompt_tokens", 0), cached)
    return turn, {"role": "assistant", "content": text, "tool_calls": [made]}


def session(client: httpx.Client, server: Server, args: argparse.Namespace) -> list[Turn]:
    """All turns of one session."""
    behind: list[dict[str, Any]] = []
    turns = []
    for i in range(1, N_TURNS + 1):
        turn, reply = ask(client, server, [*opening(args.lines, i, args.changes), *behind])
        turns.append(turn)
        print(server.engine, i, turn, file=sys.stderr, flush=True)
        result = {"role": "tool", "tool_call_id": reply["tool_calls"][0]["id"]}
        behind += [reply, {**result, "content": result_text(i, args.changes)}]
        time.sleep(args.rest)
    return turns


def run(engine: str, model: Path, env: dict[str, str], args: argparse.Namespace) -> list[Turn]:
    """One session with a server of its own."""
    checkout = args.old.resolve() if engine == OLD else ROOT
    kind = MLX_LM if engine == MLX_LM else MLXKV
    options = ["--prefill-step-size=256"] if kind == MLX_LM else ["--dtype=float32"]
    if args.changes and engine == MLXKV:
        options.append("--agent-prompts")
    with tempfile.TemporaryDirectory() as pages:
        env = env | {"MLXKV_KV": pages, "PYTHONPATH": str(checkout)}
        with (
            Server(kind, model, env, options, checkout) as server,
            httpx.Client(base_url=server.url, timeout=None, trust_env=False) as client,
        ):
            warm = [{"role": "user", "content": "Hello.\n" + lines(99, 30)}]
            ask(client, server, warm)
            return session(client, server, args)


def table(runs: dict[str, list[list[Turn]]]) -> str:
    """First token of turns 2 to 10: medians, and ratios of the medians of each round."""
    made = [
        "| | first token, ms | range | CPU until then, ms | computed a turn | prompt 10 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for engine, sessions in runs.items():
        later = [turn for turns in sessions for turn in turns[1:]]
        times = [1e3 * turn.first_s for turn in later]
        cpu = statistics.median(1e3 * turn.cpu_s for turn in later)
        known = [turn.prompt - turn.cached for turn in later if turn.cached is not None]
        computed = f"{statistics.median(known):,.0f}" if known else ""
        made.append(
            f"| {engine} | {statistics.median(times):.1f} | {min(times):.1f}-{max(times):.1f} "
            f"| {cpu:.0f} | {computed} | {later[-1].prompt:,} |"
        )
    for engine, sessions in runs.items():
        if engine != MLXKV:
            pairs = list(zip(runs[MLXKV], sessions, strict=True))
            wall = sorted(middle(a, "first_s") / middle(b, "first_s") for a, b in pairs)
            cpu = statistics.median(middle(a, "cpu_s") / middle(b, "cpu_s") for a, b in pairs)
            shown = f"{wall[0]:.3f}-{wall[-1]:.3f}"
            made.append(
                f"| ratio to {engine} | {statistics.median(wall):.3f} | {shown} | {cpu:.3f} | | |"
            )
    return "\n".join(made) + "\n"


def middle(turns: Sequence[Turn], name: str) -> float:
    """The median of turns 2 to 10."""
    return statistics.median(getattr(turn, name) for turn in turns[1:])


def write(runs: dict[str, list[list[Turn]]], output: Path) -> None:
    """Write all turns, and the table."""
    raw = {
        engine: [[list(astuple(turn)) for turn in turns] for turns in sessions]
        for engine, sessions in runs.items()
    }
    output.with_suffix(".json").write_text(json.dumps(raw) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(table(runs), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("template", type=Path)
    parser.add_argument("--old", type=Path, help="a checkout to compare with")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rest", type=float, default=0.5, help="seconds that a tool takes")
    parser.add_argument("--lines", type=int, default=850, help="of the file in the system prompt")
    parser.add_argument(
        "--changes", action="store_true", help="change the prompt each turn, as agents do"
    )
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--output", type=Path, help="where to write NAME.json and NAME.md")
    parser.add_argument("--blas", default="openblas")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    engines = [engine for engine in ENGINES if engine != OLD or args.old is not None]
    runs: dict[str, list[list[Turn]]] = {engine: [] for engine in engines}
    env = environment(args)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"), args.tokenizer, args.template, args.context)
        for index in range(args.runs):
            for engine in engines[index % len(engines) :] + engines[: index % len(engines)]:
                runs[engine].append(run(engine, model, env, args))
            if args.output is not None:  # each round: a later one may be too much for a machine
                write(runs, args.output)
    print(table(runs))


if __name__ == "__main__":
    main()
