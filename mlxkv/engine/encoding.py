"""Texts, messages and saved KV to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxkv.chat.rendered import Rendered
from mlxkv.engine.media.writer import MediaWriter
from mlxkv.engine.runtime import TextSide
from mlxkv.errors import Hint, TemplateError, UsageError
from mlxkv.generation.request import Message, Prompt, is_messages
from mlxkv.media.prompt import NO_MEDIA, PromptMedia
from mlxkv.prefix.layout import token_ids
from mlxkv.saved_kv.manifest import NamedKV


def writer(runtime: TextSide, owner: str = "", saved: NamedKV | None = None) -> MediaWriter:
    """Renders conversations of an owner for a model.

    Args:
        runtime: of the model.
        owner: see `PromptWriter.for_owner`.
        saved: that the conversations go on from, whose media are known.

    Raises:
        TemplateError: the model has no chat template.
    """
    made = runtime.tokenizer.prompt_writer
    if made is None:
        raise TemplateError(
            f"{runtime.path / 'tokenizer_config.json'}: key 'chat_template' is missing, so this "
            f"model completes text and does not chat: give a text",
            hints=[Hint("raw", True)],
        )
    known = () if saved is None else saved.media
    return MediaWriter(made.for_owner(owner), runtime.tokenizer, runtime.media, known, owner)


def render(runtime: TextSide, messages: Sequence[Message], **options: Any) -> Rendered:
    """Render a conversation, up to where the next answer begins.

    Raises:
        TemplateError: there is no template, or it fails.
    """
    return writer(runtime).write(messages, **options)


def encode(
    runtime: TextSide, prompt: Prompt, most: int | None = None, owner: str = ""
) -> list[int]:
    """Token ids of a text or of messages; token ids are checked.

    Raises:
        UsageError: an empty prompt, or an id that the model does not have.
        TooManyTokens: a text of more than `most`, see `Tokenizer.encode`.
    """
    if isinstance(prompt, str):
        tokens = _encode_raw(runtime, prompt, most, owner)
    elif is_messages(prompt):
        made = writer(runtime)
        rendered = made.write(prompt)  # pyright: ignore[reportArgumentType]
        tokens = made.media.vocabulary(runtime.tokenizer.encode_rendered(rendered))
    else:
        tokens = list(prompt)
    if not tokens:
        raise UsageError("the prompt is empty")
    n = runtime.config.vocab_size
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < n:
            raise UsageError(f"token id {token!r} is out of range; this model has 0 to {n - 1}")
    return tokens  # pyright: ignore[reportReturnType]


def encode_text(
    runtime: TextSide, text: str, most: int | None = None, owner: str = ""
) -> list[int]:
    """Token ids of text with its own special tokens, such as a rendered template."""
    return runtime.tokenizer.encode(text, add_special_tokens=False, owner=owner, most=most)


def encode_rendered(
    runtime: TextSide, rendered: Rendered, saved: NamedKV | None, most: int | None = None
) -> list[int]:
    """Token ids of a rendered conversation; its saved beginning keeps the saved ids.

    Raises:
        TooManyTokens: more than `most`, see `Tokenizer.encode`.
    """
    if saved is None or not rendered.text.startswith(saved.text):
        return runtime.tokenizer.encode_rendered(rendered, most)
    behind, most = rendered.behind(len(saved.text)), _left(most, saved)
    return [*token_ids(saved.tokens), *runtime.tokenizer.encode_rendered(behind, most)]


def _left(most: int | None, saved: NamedKV) -> int | None:
    return None if most is None else most - saved.n_tokens


def _encode_raw(runtime: TextSide, text: str, most: int | None, owner: str) -> list[int]:
    """Token ids of a text for the model: with one first token, also where the text has its own."""
    tokenizer = runtime.tokenizer
    tokens = tokenizer.encode(text, owner=owner, most=most)
    bos = tokenizer.bos_token_id
    doubled = bos is not None and tokens[:2] == [bos, bos]
    if doubled and text.startswith(tokenizer.bos_token or ""):
        return tokens[1:]
    return tokens


def saved_media(saved: NamedKV | None) -> PromptMedia:
    """The media of saved KV."""
    return NO_MEDIA if saved is None else PromptMedia(saved.media)


def with_saved(saved: NamedKV | None, messages: Sequence[Message]) -> list[Any]:
    """Append messages to the saved ones; a second system message joins the saved one.

    Raises:
        UsageError: the saved prompt is a text.
    """
    if saved is None:
        return list(messages)
    if saved.messages is None:
        raise UsageError(
            f"{saved.name} is a saved text, not messages: give a text", hints=[Hint("raw", True)]
        )
    head, rest = [dict(message) for message in saved.messages], [dict(m) for m in messages]
    if head[0]["role"] == "system" and rest and rest[0].get("role") == "system":
        head[0]["content"] = f"{head[0]['content']}\n\n{rest.pop(0)['content']}"
    return head + rest


def after_saved(
    runtime: TextSide, saved: NamedKV | None, prompt: Prompt, most: int | None, owner: str
) -> list[int]:
    """Token ids of saved KV and of a text or token ids after it."""
    if saved is None:
        return encode(runtime, prompt, most, owner)
    if isinstance(prompt, str):
        new = encode_text(runtime, prompt, _left(most, saved), owner)
    else:
        new = encode(runtime, prompt)
    return [*token_ids(saved.tokens), *new]
