"""A model's tokenizer.json as llguidance understands it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any


def readable(tokenizer: str, markers: Collection[str]) -> str:
    """A tokenizer.json that llguidance understands.

    - It takes a `Metaspace` decoder for nothing, and so its mark for a letter; as a replacement it
      knows it.
    - A text that spells a special token (an enum of `<table>`) would become that token, which is
      no text. So they get names that no text spells; grammars name them by their ids. Where the
      vocabulary has them as well (Gemma, Llama 2), they are renamed there, or they would be text;
      what is text (Gemma's `<table>`) stays.

    Args:
        tokenizer: its tokenizer.json.
        markers: texts of tokens that are never text.
    """
    state = json.loads(tokenizer)
    decoder = state.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    if any(part.get("type") == "Metaspace" for part in parts):
        marks = [part["replacement"] for part in parts if part.get("type") == "Metaspace"]
        blank = {"type": "Replace", "pattern": {"String": marks[0]}, "content": " "}
        others = [part for part in parts if part.get("type") != "Metaspace"]
        state["decoder"] = {"type": "Sequence", "decoders": [blank, *others]}
    names: dict[str, str] = {}
    vocabulary = state["model"].get("vocab", ())
    known = vocabulary if isinstance(vocabulary, dict) else {text for text, _ in vocabulary}
    added = []
    for token in state.get("added_tokens", ()):
        text = token["content"]
        looks_special = (text[:1], text[-1:]) == ("<", ">")
        if token["special"] or text in markers or (looks_special and text not in known):
            names[text] = token["content"] = f"<|\ue000{token['id']}\ue000|>"
            token["special"] = True
        elif looks_special:
            continue  # in the vocabulary it is text, among the added tokens it would not be
        added.append(token)
    state["added_tokens"] = added
    _rename(state["model"], names)
    return json.dumps(state)


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give tokens of a vocabulary other names; merges that spell them go."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): token for text, token in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _spells(merge, names)]


def _spells(merge: str | list[str], names: Mapping[str, str]) -> bool:
    """Whether a merge takes or makes one of the tokens."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left + right in names or left in names or right in names
