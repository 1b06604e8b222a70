"""Running `mlxkv` as users do, on a tiny model that can chat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.support.tiny import (
    gemma3_config,
    llama_config,
    random_weights,
    tensor_shapes,
    write_checkpoint,
)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Every test sets a model folder of its own, and nothing may reach a network.
CLOSED = "http://127.0.0.1:9"


def chat_model(
    folder: Path,
    *,
    template: bool | str = True,
    special: Sequence[str] = (),
    family: str = "llama",
    ascii: bool = False,
    **config: Any,
) -> Path:
    """A tiny model whose tokens are single bytes, and whose answers do not end by themselves.

    Args:
        template: its chat template; True for the one above.
        special: more tokens of its own.
        ascii: its likeliest tokens are printable ASCII, so that an answer is what its text says.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [*SPECIAL, *special]
    vocabulary = {text: i for i, text in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    make = gemma3_config if family == "gemma3" else llama_config
    made = make(
        vocab_size=len(vocabulary),
        bos_token_id=None,
        **{"eos_token_id": 2, "tie_word_embeddings": False, **config},
    )
    weights = random_weights(tensor_shapes(made))
    # Special tokens get a logit of 0, so that the likeliest one is always a byte: answers go on.
    weights["lm_head.weight"][: len(special)] = 0
    if ascii:
        others = [i for text, i in vocabulary.items() if not text.isascii()]
        weights["lm_head.weight"][others] = 0
    write_checkpoint(folder, made, weights)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"}
    if template:
        settings["chat_template"] = TEMPLATE if template is True else template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    """An environment in which everything that mlxkv writes lands below `home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "PIP_", "UV_", "XDG_", "MLXKV_"))
    }
    kernels = {
        name: os.environ[name]
        for name in ("MLXKV_KERNELS", "MLXKV_KERNELS_DIR")
        if name in os.environ
    }
    return (
        kept
        | kernels
        | {
            "HOME": str(home),
            "MLXKV_MODELS": str(home / "models"),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": CLOSED,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": CLOSED,
            "PIP_RETRIES": "0",
            "XDG_STATE_HOME": str(home / "state"),
            "TERM": "xterm",
            "NO_COLOR": "1",
            **more,
        }
    )


def mlxkv(
    *args: str, env: Mapping[str, str], stdin: str | bytes | None = None
) -> subprocess.CompletedProcess[str]:
    """The finished command, its output as text."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mlxkv.cli", *args],
        env=dict(env),
        input=data,
        stdin=subprocess.DEVNULL if data is None else None,
        capture_output=True,
        timeout=60,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command failed with this code and one line on stderr that holds these words."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("mlxkv: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)


def of_each_kind(folder: Path, make: Callable[..., Any]) -> Path:
    """The folder, with a model whose layers see all tokens, and one whose windows slide."""
    for family in ("llama", "gemma3"):
        make(folder / family, family=family, max_position_embeddings=8192)
    return folder
