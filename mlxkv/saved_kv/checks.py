"""Checks of imported KV before it is kept: values, shapes, and the text against its tokens.

They tell KV that no model computes, and a text that is not the prompt. That the KV is the one that
this model computes is for `generation.kv_check`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlxkv.prefix.on_disk.format import PageFile
from mlxkv.saved_kv.manifest import NamedKV

if TYPE_CHECKING:
    import numpy as np

TensorShape = tuple[str, tuple[int, int, int]]
"""MLX's name of the dtype, and B, H and D, of an array `[B, H, S, D]`."""


def check_page(
    page: PageFile, expected: Mapping[str, TensorShape], *, is_state: bool = False
) -> None:
    """Raise ValueError unless a page has the arrays of a model, with values that KV can have.

    Args:
        page: one part of a page.
        expected: by the names of its tensors.
        is_state: whether it is the state behind the page's last token, in one row.
    """
    n_rows = 1 if is_state else page.key.n_tokens
    where = f"tokens {page.start:,} to {page.start + page.key.n_tokens - 1:,}"
    if page.tensors.keys() != expected.keys():
        raise ValueError(f"{where} have KV of other layers than the model")
    for name, (dtype, (B, H, D)) in expected.items():
        tensor = page.tensors[name]
        if page.dtypes[name] != dtype or tensor.shape != (B, H, n_rows, D):
            raise ValueError(
                f"{where}: array {name} is {page.dtypes[name]} {list(tensor.shape)}, "
                f"not {dtype} {[B, H, n_rows, D]}"
            )
        if not _is_finite(tensor, dtype):
            raise ValueError(f"{where}: array {name} has values that are no finite numbers")
    if n_rows > 1 and all(map(_is_constant, page.tensors.values())):
        raise ValueError(f"{where} have the same KV for every token")


def _is_finite(tensor: np.ndarray, dtype: str) -> bool:
    import numpy as np

    if dtype == "bfloat16":  # as its bits: the exponent of NaN and infinity is all ones
        return not bool(((tensor & 0x7F80) == 0x7F80).any())
    return tensor.dtype.kind != "f" or bool(np.isfinite(tensor).all())


def _is_constant(tensor: np.ndarray) -> bool:
    """Whether all tokens of an array `[B, H, S, D]` have the same values."""
    return bool((tensor == tensor[:, :, :1]).all())


class Codec(Protocol):
    """A tokenizer, as far as `check_text` asks it."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


def check_text(named: NamedKV, tokens: Sequence[int], codec: Codec) -> None:
    """Raise ValueError unless a manifest's text and messages are what its tokens say.

    Of media the text has the tokens around them alone.
    """
    tokens = [token for token in tokens if token >= 0]
    said = codec.decode(tokens, skip_special_tokens=False)
    if named.text not in (said, codec.decode(tokens)):
        # Decoders change blanks: a text is compared by what its own ids decode to, alone or
        # behind the first token that a model expects.
        own = codec.encode(named.text, add_special_tokens=False)
        if said not in (
            codec.decode(ids, skip_special_tokens=False) for ids in (own, [*tokens[:1], *own])
        ):
            raise ValueError("its text is not the text of its tokens")
    at = 0
    for message in named.messages or ():
        for content in _contents(message):
            found = named.text.find(content, at)
            if found < 0:
                raise ValueError(f"a message of role {message['role']!r} is not part of its text")
            at = found + len(content)


def _contents(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message that a template writes: of an answer those behind its reasoning."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    told = [text for text in texts if isinstance(text, str)]
    if message["role"] == "assistant":
        told = [text.rpartition("</think>")[2] for text in told]
    return [text.strip() for text in told if text.strip()]
