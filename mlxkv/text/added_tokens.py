"""Tokens that are found before a text is split, as all files of a checkpoint name them.

transformers decides alike: tokenizer_config.json's `added_tokens_decoder` counts; without one,
special_tokens_map.json and added_tokens.json of older checkpoints do, too. Tokens that are only
named, by `additional_special_tokens` or `extra_special_tokens`, are special, and stay whole too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlxkv.errors import TokenizerError
from mlxkv.text.tokenizer_files import ModelFiles, unknown_token

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_DECODER = "added_tokens_decoder"
_FURTHER = ("additional_special_tokens", "extra_special_tokens")
_MISTRALS = (None, "mistral", "mistral3", "voxtral", "ministral", "pixtral")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def apply_added_tokens(
    backend: Backend, files: ModelFiles, special_tokens: Mapping[str, str]
) -> None:
    """Bring the backend's added tokens in line with the other files.

    A named special token that is a plain piece of the vocabulary becomes a special one. One that
    the vocabulary lacks would get an id past the model's: an error for the first and the end token;
    of the others only further ones are added, while the model has rows for them.

    Args:
        backend: changed.
        files: of the model.
        special_tokens: named ones ("bos_token", ...), as text.
    """
    from tokenizers import AddedToken

    present, further = backend.get_added_tokens_decoder(), list(_further_tokens(files))
    special = {*special_tokens.values(), *(token.content for token in further)}
    listed = [*_listed_tokens(files), *_older_tokens(files, special)]
    changed = [(i, token) for i, token in listed if not _same_token(present.get(i), token)]
    for i, token in sorted(changed, key=lambda item: item[0]):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            where = f"{_CONFIG}: {_DECODER}" if _DECODER in files.json(_CONFIG) else _ADDED
            raise TokenizerError(
                f"{files.path(where)} gives {token.content!r} the id {i}, tokenizer.json "
                f"{backend.token_to_id(token.content)}: the two files do not belong together"
            )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for key, text in special_tokens.items():
        known = backend.token_to_id(text) is not None
        if not known and key in ("bos_token", "eos_token"):
            raise unknown_token(files, key, text)
        if known and text not in added:
            backend.add_special_tokens([AddedToken(text, special=True)])
    for token in further:
        has_row = backend.get_vocab_size() < _n_rows(files)
        is_known = backend.token_to_id(token.content) is not None
        if token.content not in added and (is_known or has_row):
            backend.add_special_tokens([token])


def fix_mistral_words(backend: Backend, files: ModelFiles) -> None:
    """Split words as Mistral's own tokenizer does, where `fix_mistral_regex` asks for it.

    tokenizer.json of several Mistral models has Llama 3's expression; transformers from version 5
    writes the right one and leaves the files of such a version alone.
    """
    from tokenizers import Regex, pre_tokenizers

    config = files.json("config.json")
    is_new = str(config.get("transformers_version") or "0").partition(".")[0] not in "01234"
    is_other = config.get("model_type") not in _MISTRALS
    if files.json(_CONFIG).get("fix_mistral_regex") is not True or is_new or is_other:
        return
    split, own = pre_tokenizers.Split(Regex(_TEKKEN), "isolated"), backend.pre_tokenizer
    if isinstance(own, pre_tokenizers.Sequence):
        own[0] = split  # pyright: ignore
        backend.pre_tokenizer = own  # pyright: ignore
        return
    if own is None or isinstance(own, pre_tokenizers.Metaspace):
        own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, own])  # pyright: ignore


def _n_rows(files: ModelFiles) -> int:
    """Tokens that the model has an embedding for."""
    config = files.json("config.json")
    inner = config.get("text_config")
    sizes = [part.get("vocab_size") for part in (config, inner) if isinstance(part, Mapping)]
    return max((size for size in sizes if type(size) is int), default=0)


def _further_tokens(files: ModelFiles) -> Iterator[AddedToken]:
    """Special tokens without a name of their own, or with one that only this model has."""
    names = [_CONFIG] if _DECODER in files.json(_CONFIG) else [_CONFIG, _MAP]
    seen = set[str]()
    for name in names:
        for key in _FURTHER:
            value = files.json(name).get(key)
            entries = list(value.values()) if isinstance(value, Mapping) else value or []
            if not isinstance(entries, list):
                raise TokenizerError(f"{files.path(name)}: {key} must be a list; got {value!r}")
            for entry in entries:
                token = _token(entry, f"{files.path(name)}: {key}")
                if token.content not in seen:
                    seen.add(token.content)
                    yield token


def _token(entry: Any, where: str) -> AddedToken:
    """A special token given as a string, or as an object."""
    from tokenizers import AddedToken

    if isinstance(entry, Mapping):
        text = entry.get("content")
        flags = {
            flag: bool(entry[flag])
            for flag in ("single_word", "lstrip", "rstrip", "normalized")
            if flag in entry
        }
    else:
        text, flags = entry, {}
    if not isinstance(text, str) or not text:
        raise TokenizerError(f"{where} must hold texts; got {entry!r}")
    return AddedToken(text, special=True, **flags)


def _older_tokens(files: ModelFiles, special: set[str]) -> Iterator[tuple[int, AddedToken]]:
    """The tokens of added_tokens.json, which counts where the config lists none."""
    from tokenizers import AddedToken

    if _DECODER in files.json(_CONFIG):
        return
    for text, i in files.json(_ADDED).items():
        if type(i) is not int or i < 0 or not text:
            raise TokenizerError(f"{files.path(_ADDED)} must map texts to ids; got {text!r}: {i!r}")
        is_special = text in special
        yield i, AddedToken(text, normalized=not is_special, special=is_special)


def _listed_tokens(files: ModelFiles) -> Iterator[tuple[int, AddedToken]]:
    """The tokens of tokenizer_config.json's added_tokens_decoder, by id."""
    from tokenizers import AddedToken

    listed = files.json(_CONFIG).get(_DECODER)
    where = f"{files.path(_CONFIG)}: {_DECODER}"
    if listed is None:
        return
    if not isinstance(listed, Mapping):
        raise TokenizerError(f"{where} must be an object; got {type(listed).__name__}")
    for key, spec in listed.items():
        if not (key.isascii() and key.isdigit() and isinstance(spec, Mapping)):
            raise TokenizerError(f"{where} must map ids to objects; got {key!r}: {spec!r}")
        text = spec.get("content")
        if not isinstance(text, str):
            raise TokenizerError(f"{where}[{key!r}]: content must be a string; got {text!r}")
        flags = {
            flag: bool(spec[flag])
            for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if flag in spec
        }
        yield int(key), AddedToken(text, **flags)


def _same_token(ours: AddedToken | None, listed: AddedToken) -> bool:
    return ours is not None and repr(ours) == repr(listed)
