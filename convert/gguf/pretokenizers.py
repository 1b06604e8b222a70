"""How byte-level BPE vocabularies split text into words.

A GGUF file only names the regular expressions (`tokenizer.ggml.pre`), which are in llama.cpp's
`llama-vocab.cpp`. Where the two differ in form, those of the models' own tokenizer.json are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, letters: str = r"\p{L}") -> str:
    """The expression of GPT-4's first tokenizer and its many descendants."""
    letter = letters if letters == r"\p{L}" else f"[{letters}]"
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}|"
        rf" ?[^\s{letters}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased_words(digits: str, contractions: str = "") -> str:
    """The later form, which also splits where a lower-case letter meets an upper-case one."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{contractions}|{before}{upper}+{lower}*{contractions}|{digits}|"
        rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to split.

    Attributes:
        patterns: applied in order; each match is a word.
        digits: split single digits first.
        gpt2: apply GPT-2's expression last (built into `tokenizers`).
        ignore_merges: a word that is in the vocabulary is one token, without merges.
        add_bos: add the start token if the file does not say.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self, add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
        from tokenizers import Regex, pre_tokenizers

        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps += [pre_tokenizers.Split(Regex(p), "isolated") for p in self.patterns]
        steps.append(
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=self.gpt2)
        )
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_GPT2 = PreTokenizer(gpt2=True)
_DIGITS = PreTokenizer(digits=True, gpt2=True)
_LLAMA3 = PreTokenizer((_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_THREE_DIGITS = PreTokenizer((_words(r"\p{N}{1,3}"),))
_ONE_DIGIT = PreTokenizer((_words(r"\p{N}"),))
_WITH_MARKS = PreTokenizer((_words(r"\p{N}", r"\p{L}\p{M}"),))
_O200K = PreTokenizer((_cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))
_TEKKEN = PreTokenizer((_cased_words(r"\p{N}"),), ignore_merges=True, add_bos=True)
# llama.cpp's fallback for older files without a name.
_DEFAULT = PreTokenizer(
    (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion"), _GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _DIGITS,
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _THREE_DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _ONE_DIGIT),
    "qwen35": _WITH_MARKS,
    **dict.fromkeys(("gpt-4o", "llama4"), _O200K),
    "tekken": _TEKKEN,
}
