"""Answers that match a grammar: which tokens may come next.

    maskers = Maskers(tokenizer)                    # once for a model
    masker = maskers.masker(grammar, prompt=prompt)  # once for an answer
    mask = masker.allowed(n_vocab)                   # before sampling
    masker.advance(token)                            # after it
    if masker.finished: ...                          # the answer is complete

llguidance (MIT; https://github.com/guidance-ai/llguidance) reads the grammars and finds the tokens.

- An answer ends: where nothing can follow, only end tokens are left, and `finished` says so before
  one is sampled. Between JSON's tokens are at most `MAX_SPACES` blanks and line breaks, so that a
  model cannot go on with those for ever.
- The grammar is for what the user gets: reasoning before it is free, and does not end the answer.
- What a schema asks for and llguidance cannot keep is an error, and never left out. Objects that
  name properties are closed (`closed_schema`); no object has a key twice (`json_keys`,
  `native_keys`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxkv.errors import UsageError
from mlxkv.parsers.closed_schema import closed
from mlxkv.parsers.formats import format_of, format_with_tools, markers_of
from mlxkv.sampling.calls import native_keys, tool_call_grammar
from mlxkv.sampling.grammar_tokenizer import readable
from mlxkv.sampling.json_keys import KeyFollower, Keys
from mlxkv.sampling.reasoning_gate import Gate, gate_of
from mlxkv.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from mlxkv.sampling.grammar_bounds import Weight
    from mlxkv.sampling.grammar_compiler import Compiler, Compiling

KINDS = ("json_object", "json_schema", "regex", "lark", "tools")
MAX_TEXT = 1 << 20
"""Characters of a grammar."""
MAX_SPACES = tool_call_grammar.MAX_SPACES


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer has to match.

    Args:
        kind: `json_object`; `json_schema`; `regex` (Rust's, of the whole answer); `lark`
            (llguidance's dialect, whose white space is what it says); `tools` (calls of functions
            in the format of the model's family).
        text: the schema as JSON, the regex, the grammar; for `tools` see `tool_call_grammar.Calls`.

    Raises:
        UsageError: no such kind, or a text that is too long.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"a grammar must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if len(self.text) > MAX_TEXT:
            raise UsageError(
                f"a grammar may have {MAX_TEXT:,} characters; this one has {len(self.text):,}"
            )

    @classmethod
    def of(cls, format: Any) -> Grammar:
        """From what a caller may give as a format.

        Args:
            format: a JSON schema, a pydantic model, a compiled regex, "json" for any JSON object,
                or a grammar.

        Raises:
            UsageError: something else.
        """
        if isinstance(format, Grammar):
            return format
        if isinstance(format, re.Pattern):
            return cls("regex", format.pattern)
        if isinstance(format, Mapping):
            return cls("json_schema", json.dumps(format))
        if format == "json":
            return cls("json_object")
        if (schema_of := getattr(format, "model_json_schema", None)) is not None:
            return cls("json_schema", json.dumps(schema_of()))
        raise UsageError(
            'format must be a JSON schema, a pydantic model, a compiled regex, "json" or a '
            f"Grammar; got {format!r}"
        )


class Maskers:
    """Makes maskers for one model. The first takes up to a second: it reads the vocabulary.

    Args:
        tokenizer: the model's.
        suppressed: tokens that must not come.
    """

    def __init__(self, tokenizer: Tokenizer, suppressed: Collection[int] = ()):
        self._tokenizer, self._suppressed = tokenizer, frozenset(suppressed)
        self._format = format_of(tokenizer)

    def begin(self, grammar: Grammar, owner: str = "") -> Compiling:
        """Begin to compile a grammar, unless it is known; `masker` then waits for it.

        Args:
            grammar: what an answer has to match.
            owner: whose it is: how long one takes tells nothing of another owner's.

        Raises:
            MlxkvError: no thread can be started.
        """
        return self._compiler.begin((owner, grammar), lambda: self._build(grammar))

    def masker(self, grammar: Grammar, prompt: str | None = None, owner: str = "") -> Masker:
        """A masker for one answer.

        Args:
            grammar: what it has to match.
            prompt: the rendered prompt, if it is one: it may end in an opened block of reasoning.
                None for an answer that is all text.
            owner: see `begin`.

        Raises:
            UsageError: the grammar has an error or is too complex, or it is one of calls and the
                family's are not known.
        """
        compiling = self.begin(grammar, owner)
        matcher, name = compiling.matcher(), self._name_of(grammar)
        if matcher.is_error():
            raise _refused(grammar.kind, matcher.get_error())
        gate = None
        if prompt is not None and not self._describes_reasoning(grammar):
            gate = gate_of(
                self._tokenizer,
                name,
                prompt,
                lambda token: bool(matcher.validate_tokens([token])),
            )
        ends = self._tokenizer.eos_token_ids
        named = {int(token) for token in re.findall(r"<\[([0-9]{1,9})\]>", compiling.source)}
        is_text = np.ones(self._backend.vocab_size, bool)
        # A special token is no text, even where its name spells one.
        is_text[sorted(self._tokenizer.special_ids - named - ends)] = False
        is_text[[token for token in self._suppressed if token < len(is_text)]] = False
        keys = self._keys(grammar, name, frozenset(named))
        return Masker(matcher, ends, grammar.kind, is_text, gate, keys, self._tokenizer.bytes_of)

    def _build(self, grammar: Grammar) -> tuple[str, Weight]:
        """Write a grammar as llguidance takes it, and read what its maskers need."""
        built = _source(grammar, self._tokenizer, self._name_of(grammar))
        if grammar.kind not in ("regex", "lark"):
            _ = self._quoting
        return built

    def _name_of(self, grammar: Grammar) -> str:
        return self._format_with_tools if grammar.kind == "tools" else self._format

    def _describes_reasoning(self, grammar: Grammar) -> bool:
        return grammar.kind == "tools" and self._format in tool_call_grammar.HAS_REASONING

    def _keys(self, grammar: Grammar, name: str, named: frozenset[int]) -> KeyFollower | None:
        """What follows the keys of an answer.

        Args:
            grammar: of the answer.
            name: of the format of its calls.
            named: the special tokens that the grammar names.
        """
        if grammar.kind != "tools":
            is_json = grammar.kind in ("json_object", "json_schema")
            return Keys(self._quoting, named) if is_json else None
        calls = tool_call_grammar.Calls.from_json(grammar.text)
        new = partial(Keys, self._quoting, named)
        id_of = self._tokenizer.id_of
        return native_keys.follower(name, calls, self._pieces, new, named, id_of) or new()

    @cached_property
    def _pieces(self) -> native_keys.Pieces:
        """The bytes of all tokens."""
        return native_keys.Pieces(
            [self._tokenizer.bytes_of(i) for i in range(self._tokenizer.n_vocab)]
        )

    @cached_property
    def _compiler(self) -> Compiler:
        from mlxkv.sampling.grammar_compiler import Compiler

        return Compiler(lambda: self._backend)

    @cached_property
    def _quoting(self) -> Mapping[int, bytes]:
        """The tokens with a quotation mark, and their bytes."""
        return {int(token): self._pieces[token] for token in self._pieces.holding(b'"')}

    @cached_property
    def _format_with_tools(self) -> str:
        return format_with_tools(self._tokenizer)

    @cached_property
    def _backend(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        ends = sorted(self._tokenizer.eos_token_ids)
        if not ends:
            raise UsageError("this model has no end token, so no grammar can end its answer")
        markers = markers_of(self._format) | markers_of(self._format_with_tools)
        try:
            return LLTokenizer(readable(self._tokenizer.to_json(), markers), eos_token=ends)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"grammars do not work with this tokenizer: {_line(error)}") from None


class Masker:
    """What may come next in one answer.

    Invariant: the matcher has consumed the tokens since the gate opened, end tokens left out.

    Args:
        matcher: the grammar's.
        ends: end tokens.
        kind: of the grammar, for errors.
        is_text: bool [n]: of all ids that the matcher knows, those that may come at all.
        gate: where the part that has to match begins; None for at once.
        keys: of the JSON that it writes; None where it writes none.
        bytes_of: a token's bytes.

    Attributes:
        finished: the answer is complete: nothing can follow, or an end token came.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        ends: Collection[int],
        kind: str,
        is_text: np.ndarray,
        gate: Gate | None = None,
        keys: KeyFollower | None = None,
        bytes_of: Callable[[int], bytes] = lambda _: b"",
    ):
        self._keys, self._bytes_of = keys, bytes_of
        self._matcher, self._ends, self._kind = matcher, frozenset(ends), kind
        self._is_text, self._gate, self.finished = is_text, gate, False

    def allowed(self, V: int) -> np.ndarray:
        """Which tokens may come: bool [V], made on the host.

        V may be larger than the vocabulary: what is past it must not come.

        Raises:
            UsageError: the grammar became too complex, or this vocabulary cannot go on with it.
        """
        allowed = np.zeros(V, bool)
        if self.finished:
            allowed[[end for end in self._ends if end < V]] = True
            return allowed
        if self._gate is not None and self._gate.inside:
            allowed[: len(self._is_text)] = True
            allowed[[end for end in self._ends if end < V]] = False
            return allowed
        if self._gate is not None and self._gate.only_openers:
            allowed[[token for token in self._gate.openers if token < V]] = True
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _refused(self._kind, self._matcher.get_error())
        may = np.unpackbits(bits, bitorder="little")[: len(self._is_text)] & self._is_text
        if not may.any():
            may = self._validated() & self._is_text
        if self._keys is not None:
            may = self._keys.without_repeats(may)
        allowed[: len(may)] = may[:V]
        if self._gate is not None:
            allowed[[token for token in self._gate.openers if token < V]] = True
        if not allowed.any():
            raise UsageError("the grammar cannot go on with the tokens that this model has")
        return allowed

    def advance(self, token: int) -> None:
        """The token that came.

        Raises:
            UsageError: it must not come here.
        """
        if self.finished or (self._gate is not None and self._gate.take(token)):
            return
        if token in self._ends:
            self.finished = True
            return
        if not self._matcher.consume_token(token):
            raise _refused(self._kind, self._matcher.get_error())
        if self._keys is not None:
            self._keys.advance(token, self._bytes_of(token))
        self.finished = self._matcher.is_stopped()

    def fork(self) -> Masker:
        """One at the same place, which goes on for itself."""
        twin = copy.copy(self)
        twin._matcher = self._matcher.deep_copy()
        twin._gate = None if self._gate is None else self._gate.fork()
        twin._keys = None if self._keys is None else self._keys.fork()
        return twin

    def forced(self) -> list[int]:
        """Tokens that alone may come next, one after the other, as far as that is known cheaply."""
        is_open = self._gate is not None and (self._gate.inside or self._gate.openers)
        found = [] if self.finished or is_open else self._matcher.compute_ff_tokens()
        return [*takewhile(lambda t: t < len(self._is_text) and self._is_text[t], found)]

    def led(self, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """How many of these tokens may come, and what comes behind them whatever is chosen.

        It stays where it is. Where text that need not match comes first, all may.
        """
        if self.finished or (self._gate is not None and (self._gate.inside or self._gate.openers)):
            return len(tokens), []
        n = self._matcher.validate_tokens(list(tokens))
        fork = self.fork()
        for token in tokens[:n]:
            fork.advance(token)
        return n, fork.forced()

    def follow(self, begun: Sequence[int], text: Sequence[int]) -> None:
        """Go on from an answer that has begun, where its text can begin what has to match.

        Args:
            begun: all of it, with what the template writes around its reasoning.
            text: of it, what is for the user. One that cannot begin a match is passed over.
        """
        if self._gate is not None:
            for token in begun:
                self._gate.take(token)
        if self._matcher.validate_tokens(list(text)) == len(text):
            for token in text:
                self._matcher.consume_token(token)
                if self._keys is not None:
                    self._keys.advance(token, self._bytes_of(token))
            self.finished = self._matcher.is_stopped()

    def _validated(self) -> np.ndarray:
        """bool [n]: what may come, tried one by one.

        Where only one text can follow, llguidance gives the token that the tokenizer makes of it,
        and where merges spell a special token, that is none of the text.
        """
        ids = range(len(self._is_text))
        return np.array([self._matcher.validate_tokens([t]) for t in ids], bool)


def _source(grammar: Grammar, tokenizer: Tokenizer, name: str) -> tuple[str, Weight]:
    """The grammar as llguidance takes it, and what it weighs."""
    from llguidance import LLMatcher

    from mlxkv.sampling.grammar_bounds import lark_weight, regex_weight, schema_weight

    text = grammar.text
    match grammar.kind:
        case "regex":
            return LLMatcher.grammar_from_regex(text), regex_weight(text)
        case "tools":
            text = tool_call_grammar.lark(tool_call_grammar.Calls.from_json(text), name, tokenizer)
            return LLMatcher.grammar_from_lark(text), lark_weight(text)
        case "lark":
            return LLMatcher.grammar_from_lark(text), lark_weight(text)
    schema = {"type": "object"} if grammar.kind == "json_object" else _schema(text)
    text = json.dumps(tool_call_grammar.bounded(schema))
    return LLMatcher.grammar_from_json_schema(text), schema_weight(schema, len(text))


def _schema(text: str) -> Any:
    try:
        return closed(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema cannot be read: {_line(error)}") from None


def _refused(kind: str, error: str) -> UsageError:
    # Behind that llguidance says what state it is in.
    said = error.partition("<state>")[0]
    return UsageError(f"the grammar ({kind}) cannot be used: {_line(said)}")


def _line(error: object) -> str:
    return " ".join(str(error).split())[:500]
