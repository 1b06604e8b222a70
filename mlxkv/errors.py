"""Everything mlxkv raises on purpose.

    MlxkvError                  exit code, HTTP status
    ├── UsageError                 2, 400   an argument or request that cannot be served
    │   ├── ContextExceeded        2, 400   a prompt longer than the model's context
    │   └── MediaError             2, 400   a picture or sound that cannot be read, or is too large
    ├── ModelNotFound              3, 404   no such path, repository or model name
    ├── CheckpointError            4, 422   a model's files are damaged or do not fit together
    │   ├── ConfigError            4, 422   config.json: a key is missing, wrong or not understood
    │   ├── UnsupportedModel       4, 422   an architecture or quantization that mlxkv cannot run
    │   ├── WeightsError           4, 422   tensors missing, unknown, or of the wrong shape
    │   └── TokenizerError         4, 422   no tokenizer, or one that cannot be read
    │       └── TemplateError      4, 422   no chat template, or one that fails
    ├── DownloadError              5, 502   no network, or what came is not what was asked for
    ├── OutputError                6, 507   what mlxkv writes cannot be written (a full disk)
    ├── OutOfMemory                7, 503   the memory limit does not allow it
    │   └── KVCacheFull            7, 503   a sequence cannot grow further
    └── InternalError             70, 500   a fault of mlxkv, or of a library under it

A message says what was given, what is allowed and what to do, on one line. It names no option: an
error carries the field to blame and the settings that would help (`Hint`) under their names in
Python, and a `Spelling` writes them as the user knows them: `--kv-type q8` on the command line,
`options.num_ctx: 4096` in Ollama's API, `kv_type='q8'` in Python. The command line prints the
message and exits with `exit_code`; a server answers with `status`.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C stopped: 128 + SIGINT, as shells have it."""


@dataclass(frozen=True, slots=True)
class Hint:
    """A setting that would help.

    Args:
        field: its name in Python.
        value: what to set it to.
        effect: what that does, such as "allows 4,096"; "" for something to try.
    """

    field: str
    value: object
    effect: str = ""


class Spelling:
    """How an interface writes fields; this one writes Python's arguments."""

    def name(self, field: str) -> str | None:
        """What a field is called; None if it cannot be set here."""
        return None if field == "raw" else field  # in Python a text is always raw

    def setting(self, field: str, value: object) -> str | None:
        """A field and a value for it; None if it cannot be set here."""
        name = self.name(field)
        return None if name is None else f"{name}={value!r}"


PYTHON = Spelling()


class MlxkvError(Exception):
    """Base of all errors that mlxkv raises on purpose.

    Args:
        text: what is wrong; with `field` it goes on from the field's name, as in "must be ...".
        field: the argument to blame, by its name in Python.
        hints: settings that would help; those that an interface does not have are left out there.
    """

    exit_code = 1
    status = 500

    def __init__(self, text: str = "", *, field: str | None = None, hints: Sequence[Hint] = ()):
        super().__init__(text)
        self.text, self.field, self.hints = text, field, tuple(hints)

    def __str__(self) -> str:
        return self.spelled(PYTHON)

    def spelled(self, spelling: Spelling) -> str:
        """The message, with fields as an interface writes them."""
        text = self.text
        if self.field is not None:
            text = f"{spelling.name(self.field) or self.field} {text}"
        return self.with_hints(text, spelling)

    def with_hints(self, text: str, spelling: Spelling) -> str:
        """A text, and the settings that would help as an interface writes them."""
        parts, to_try = [text], []
        for hint in self.hints:
            setting = spelling.setting(hint.field, hint.value)
            if setting is not None and hint.effect:
                parts.append(f"{setting} {hint.effect}")
            elif setting is not None:
                to_try.append(setting)
        return "; ".join([*parts, *([f"try {' or '.join(to_try)}"] if to_try else [])])


class UsageError(MlxkvError):
    """An argument or a request that cannot be served as it is."""

    exit_code = 2
    status = 400


class ContextExceeded(UsageError):
    """A prompt that is longer than the model's context.

    Args:
        n_tokens: length of the prompt.
        context: tokens that the model can attend to.
        at_least: whether the prompt may be longer: a very long one is not counted to its end.
    """

    def __init__(self, n_tokens: int, context: int, at_least: bool = False):
        self.n_tokens, self.context = n_tokens, context
        least = "at least " if at_least else ""
        super().__init__(
            f"the prompt has {least}{n_tokens:,} tokens and the context is {context:,}: shorten it "
            f"by {least}{n_tokens - context + 1:,}, or have it cut",
            hints=(Hint("truncate", True), Hint("overflow", "shift")),
        )


class MediaError(UsageError):
    """A picture or a piece of sound that cannot be read, or that is larger than allowed."""


class ModelNotFound(MlxkvError):
    """No such path, repository or model name."""

    exit_code = 3
    status = 404


class CheckpointError(MlxkvError):
    """The files of a model are damaged or do not fit together."""

    exit_code = 4
    status = 422


class ConfigError(CheckpointError):
    """A key of a config file is missing, has a wrong value or is not understood."""


class UnsupportedModel(CheckpointError):
    """An architecture or a quantization that mlxkv cannot run."""


class WeightsError(CheckpointError):
    """Tensors that are missing, unknown or of the wrong shape."""


class TokenizerError(CheckpointError):
    """No tokenizer, or one that cannot be read."""


class TemplateError(TokenizerError):
    """No chat template, or one that fails on the conversation."""


class DownloadError(MlxkvError):
    """No network, or what came is not what was asked for."""

    exit_code = 5
    status = 502


class OutputError(MlxkvError):
    """A file that mlxkv writes cannot be written."""

    exit_code = 6
    status = 507


class OutOfMemory(MlxkvError):
    """The memory limit does not allow what was asked for."""

    exit_code = 7
    status = 503


class KVCacheFull(OutOfMemory):
    """A sequence whose KV cache cannot grow.

    Args:
        from_tokens: tokens that the cache holds.
        to_tokens: tokens it had to grow to.
        max_tokens: tokens the limit allows.
        limit: the limit, for people.
        others: what other sequences hold, for people; "" for nothing.
        hints: what would have helped.
    """

    def __init__(
        self,
        from_tokens: int,
        to_tokens: int,
        max_tokens: int,
        limit: str = "",
        others: str = "",
        hints: Sequence[Hint] = (),
    ):
        self.from_tokens, self.to_tokens, self.max_tokens = from_tokens, to_tokens, max_tokens
        super().__init__(
            f"the KV cache cannot grow from {from_tokens:,} to {to_tokens:,} tokens: the memory "
            f"limit{f' of {limit}' if limit else ''} allows {max_tokens:,}"
            f"{f', and other sequences hold {others}' if others else ''}",
            hints=hints,
        )


class InternalError(MlxkvError):
    """A fault of mlxkv, or of a library under it: nothing was prepared for it.

    Args:
        text: what is wrong.
        is_logged: whether the log has it.
    """

    exit_code = 70
    status = 500

    def __init__(
        self, text: str = "internal error: see the server's log", *, is_logged: bool = False
    ):
        self.is_logged = is_logged
        super().__init__(text)


def one_line(error: BaseException) -> str:
    """An exception's text on one line; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


_NO_MEMORY = re.compile(
    r"Unable to allocate"  # [malloc], of MLX's every backend
    r"|failed to map segment|cannot allocate memory"  # the loader, for an extension module
    r"|can't start new thread|Resource temporarily unavailable"  # a thread's stack
    r"|bad_alloc",
    re.IGNORECASE,
)


def shortened(name: str) -> str:
    """A name for a message: of a long one the first 77 characters and dots."""
    return name if len(name) <= 80 else f"{name[:77]}..."


def lacks_memory(error: BaseException) -> bool:
    """Whether the system, Python or a library could not get memory, or the stack of a thread."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError):
        return True
    known = isinstance(error, RuntimeError | ImportError | OSError)
    return known and _NO_MEMORY.search(str(error)) is not None


def contained(error: BaseException) -> Exception:
    """What was raised, as an error that ends one request alone.

    A panic inside a Rust library arrives as a BaseException that is no Exception, and a library may
    call `sys.exit`: on a thread that serves many requests neither may do more than an error does.

    Raises:
        KeyboardInterrupt, SystemExit, GeneratorExit: as they came, on the main thread.
    """
    if isinstance(error, Exception):
        return error
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    made = InternalError(f"internal error: {type(error).__name__}: {one_line(error)}")
    return made.with_traceback(error.__traceback__)
