"""The tokens of GPT-OSS's format, and which checkpoints speak it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, CALL, RETURN = "<|constrain|>", "<|call|>", "<|return|>"
TOKENS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, CALL, RETURN)


def is_spoken_by(added: Collection[str], source: str | None, model_type: Any) -> bool:
    """Whether a checkpoint speaks this format.

    Args:
        added: texts of the tokens that its tokenizer has besides the vocabulary proper.
        source: of its chat template.
        model_type: of its config.json.
    """
    if not set(TOKENS) <= set(added):
        return False
    if source is None:
        return model_type == "gpt_oss"
    return CHANNEL in source and MESSAGE in source
