"""What the files of a model directory say about its tokenizer.

tokenizer.json is the tokenizer itself; around it, tokenizer_config.json, special_tokens_map.json,
generation_config.json, config.json and the chat template's files name its special tokens, its end
tokens and its template. They are read here, checked against the vocabulary, and not kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base import regular
from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.chat.gpt_oss.harmony_tokens import is_spoken_by
from mlxkv.errors import MlxkvError, TokenizerError, one_line

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

# Special tokens that end an answer even if no file of the checkpoint says so: fine-tuned
# checkpoints and GGUF files often name only the end of the document. If a name means something else
# in other families, it maps to tokens of which the tokenizer must have one.
_GLM = ("[gMASK]",)
_HARMONY = ("<|channel|>",)
WELL_KNOWN_END_TOKENS: Mapping[str, tuple[str, ...]] = {
    "<|im_end|>": (),  # ChatML: Qwen, SmolLM
    "<|eot_id|>": (),  # Llama 3: end of turn
    "<|eom_id|>": (),  # Llama 3: end of message, a tool's result is awaited
    "<|eot|>": (),  # Llama 4
    "<|eom|>": (),  # Llama 4
    "<end_of_turn>": (),  # Gemma 1 to 3
    "<turn|>": (),  # Gemma 4
    "<|endoftext|>": (),  # GPT-2, Qwen, GLM, gpt-oss: end of document
    "<|end_of_text|>": (),  # Llama 3: end of document
    "<|return|>": _HARMONY,  # gpt-oss: end of the final answer
    "<|call|>": _HARMONY,  # gpt-oss: a tool is called
    "<|user|>": _GLM,  # GLM has no end of turn: the next speaker's token ends it
    "<|observation|>": _GLM,  # GLM: a tool's result is awaited
}
# What a template writes before a tool's result: the model has called and waits for it. In some
# checkpoints these are no special tokens.
_RESULT_FOLLOWS = ("<|tool_response>", "<start_function_response>")  # Gemma 4, FunctionGemma
# Phi-3's <|end|> ends a turn; gpt-oss's ends one message of several in a turn (its reasoning), so
# it is an end token only where gpt-oss's <|channel|> is not a token.
_PHI_END = "<|end|>"

_OTHER_FORMS = ("tokenizer.model", "tekken.json", "tiktoken.model", "merges.txt")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class ModelFiles:
    """The small JSON files beside tokenizer.json, each read when first asked for."""

    def __init__(self, model_dir: Path):
        self.model_dir = model_dir
        self._read: dict[str, dict[str, Any]] = {}

    def path(self, name: str) -> Path:
        return self.model_dir / name

    def json(self, name: str) -> dict[str, Any]:
        """A file's object, {} if there is no such file."""
        if name not in self._read:
            path = self.path(name)
            self._read[name] = _read_object(path) if path.exists() else {}
        return self._read[name]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(regular.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: must hold a JSON object; got {type(value).__name__}")
    return value


@contextmanager
def told_as_tokenizer_error(what: str, only_panics: bool = False) -> Iterator[None]:
    """What the tokenizers library raises, or only what of it is no Exception, as one line.

    A panic inside it is a BaseException of a class that cannot be imported. The library itself
    writes a trace of it on stderr as well (see `base/panics`).

    Raises:
        TokenizerError: it raised something.
    """
    try:
        yield
    except MlxkvError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not is_panic and (only_panics or not isinstance(error, Exception)):
            raise
        raise TokenizerError(f"{what}: {one_line(error)}") from None


def read_backend(model_dir: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    path = model_dir / "tokenizer.json"
    if not path.exists():
        others = (name for name in _OTHER_FORMS if (model_dir / name).is_file())
        if (other := next(others, None)) is not None:
            raise TokenizerError(
                f"{model_dir}: has {other} and no tokenizer.json; `mlxkv convert` makes one of it"
            )
        raise TokenizerError(
            f"{model_dir}: no tokenizer.json; `mlxkv convert` makes one of a checkpoint that has "
            f"{', '.join(_OTHER_FORMS)} or is a GGUF file"
        )
    with told_as_tokenizer_error(f"{path}: cannot be read"):
        regular.open_file(path).close()
        backend = Backend.from_file(str(path))
    # Some files carry what their model was trained with: a cut at 512 tokens, padding.
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_special_tokens(files: ModelFiles) -> dict[str, str]:
    """The named special tokens ("bos_token", ...) as text.

    As transformers does, special_tokens_map.json counts only for older checkpoints, whose
    tokenizer_config.json does not list the added tokens.
    """
    names = ["tokenizer_config.json"]
    if "added_tokens_decoder" not in files.json("tokenizer_config.json"):
        names.append("special_tokens_map.json")
    tokens = {}
    for name in names:
        for key in _NAMED:
            text = _token_text(files, name, key)
            if text is not None:
                tokens[key] = text
    return tokens


def _token_text(files: ModelFiles, name: str, key: str) -> str | None:
    """A token given as a string or as {"content": string}, None if absent or null."""
    value = files.json(name).get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise TokenizerError(f"{files.path(name)}: {key} must be a string; got {value!r}")


def unknown_token(files: ModelFiles, key: str, text: str) -> TokenizerError:
    """The error of a named token that the vocabulary lacks."""
    name = next(
        name
        for name in ("special_tokens_map.json", "tokenizer_config.json")
        if _token_text(files, name, key) == text
    )
    return TokenizerError(
        f"{files.path(name)}: {key} {text!r} is not in the vocabulary of tokenizer.json"
    )


def read_end_tokens(
    backend: Backend, files: ModelFiles, added: Mapping[int, AddedToken]
) -> frozenset[int]:
    """Ids at which an answer ends: what any file declares, and the well-known ones."""
    ids: set[int] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        text = _token_text(files, name, "eos_token")
        if text is None:
            continue
        token = backend.token_to_id(text)
        if token is None:
            raise unknown_token(files, "eos_token", text)
        ids.add(token)
    for name, section in (
        ("generation_config.json", None),
        ("config.json", None),
        ("config.json", "text_config"),
    ):
        ids |= _declared_ids(files, name, section)
    special = {token.content: i for i, token in added.items() if token.special}
    for text, companions in WELL_KNOWN_END_TOKENS.items():
        if text in special and (not companions or any(c in special for c in companions)):
            ids.add(special[text])
    if _PHI_END in special and not any(c in special for c in _HARMONY):
        ids.add(special[_PHI_END])
    waits = (backend.token_to_id(text) for text in _RESULT_FOLLOWS)
    return frozenset(ids | {token for token in waits if token is not None})


def _declared_ids(files: ModelFiles, name: str, section: str | None) -> set[int]:
    """eos_token_id of a config file, an int or a list of them."""
    raw = files.json(name)
    if section is not None:
        raw = raw.get(section) or {}
    if not isinstance(raw, Mapping):
        raise TokenizerError(f"{files.path(name)}: {section} must be an object; got {raw!r}")
    value = raw.get("eos_token_id")
    if value is None:
        return set()
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise TokenizerError(
                f"{files.path(name)}: eos_token_id must be a token id or a list of them; "
                f"got {value!r}"
            )
    return set(ids)


def count_ids(backend: Backend, files: ModelFiles, added: Mapping[int, AddedToken]) -> int:
    config = files.json("config.json")
    text_config = config.get("text_config")
    sizes = [config.get("vocab_size")]
    if isinstance(text_config, Mapping):
        sizes.append(text_config.get("vocab_size"))
    n = max(
        backend.get_vocab_size(with_added_tokens=False),
        max(added, default=-1) + 1,
        *(size for size in sizes if isinstance(size, int) and not isinstance(size, bool)),
    )
    # A vocabulary with gaps has ids past its size.
    while backend.id_to_token(n) is not None:
        n += 1
    return n


def read_chat_template(
    files: ModelFiles, special_tokens: Mapping[str, str], added: Collection[str] = ()
) -> ChatTemplate | None:
    """The first of chat_template.jinja, chat_template.json and tokenizer_config.json's entry.

    For GPT-OSS our own renderer takes its place.

    Args:
        files: of the model.
        special_tokens: named ones, as text.
        added: texts of all tokens that lie outside of the vocabulary proper.
    """
    found = _template_sources(files)
    source = None if found is None else found[1].get("default", "")
    if is_spoken_by(added, source, files.json("config.json").get("model_type")):
        where = "harmony" if found is None else str(found[0])
        from mlxkv.chat.gpt_oss.harmony_writer import HarmonyTemplate

        return HarmonyTemplate(source or "", name_of_file=where)
    if found is None:
        return None
    path, sources = found
    default = sources.get("default")
    if default is None:
        raise TokenizerError(
            f"{path}: chat_template has no template named 'default'; it has "
            f"{', '.join(map(repr, sources)) or 'none'}"
        )
    others = {k: v for k, v in special_tokens.items() if k not in ("bos_token", "eos_token")}
    return ChatTemplate(
        default,
        bos_token=special_tokens.get("bos_token"),
        eos_token=special_tokens.get("eos_token"),
        special_tokens=others,
        tools_source=sources.get("tool_use"),
        name_of_file=str(path),
    )


def _template_sources(files: ModelFiles) -> tuple[Path, dict[str, str]] | None:
    jinja = files.path("chat_template.jinja")
    if jinja.exists():
        more = sorted(files.path("additional_chat_templates").glob("*.jinja"))
        sources = {file.stem: _read_text(file) for file in more if file.is_file()}
        return jinja, {**sources, "default": _read_text(jinja)}
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = files.json(name).get("chat_template")
        if value is not None:
            return files.path(name), _named_templates(files.path(name), value)
    return None


def _named_templates(path: Path, value: Any) -> dict[str, str]:
    """A template as text, or several as [{"name": ..., "template": ...}]."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {
            entry.get("name"): entry.get("template")
            for entry in value
            if isinstance(entry, Mapping)
        }
    if isinstance(value, dict) and all(
        isinstance(text, str) for item in value.items() for text in item
    ):
        return value
    raise TokenizerError(
        f"{path}: chat_template must be text or a list of objects with name and template"
    )


def _read_text(path: Path) -> str:
    try:
        return regular.read_text(path)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {one_line(error)}") from None
