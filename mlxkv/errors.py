"""Everything mlxkv raises on purpose.

    MlxkvError                  exit code, HTTP status
    ├── UsageError                 2, 400   an argument or request that cannot be served
    │   └── ContextExceeded        2, 400   a prompt longer than the model's context
    ├── ModelNotFound              3, 404   no such path, repository or model name
    ├── CheckpointError            4, 422   a model's files are damaged or do not fit together
    │   ├── ConfigError            4, 422   config.json: a key is missing, wrong or not understood
    │   ├── UnsupportedModel       4, 422   an architecture or quantization that mlxkv cannot run
    │   ├── WeightsError           4, 422   tensors missing, unknown, or of the wrong shape
    │   └── TokenizerError         4, 422   no tokenizer, or one that cannot be read
    │       └── TemplateError      4, 422   no chat template, or one that fails
    ├── DownloadError              5, 502   no network, or what came is not what was asked for
    ├── OutputError                6, 507   what mlxkv writes cannot be written (a full disk)
    └── OutOfMemory                7, 503   the memory limit does not allow it
        └── KVCacheFull            7, 503   a sequence cannot grow further

A message says what was given, what is allowed and what to do, on one line. The command line prints
it and exits with `exit_code`; a server answers with `status`.
"""

from __future__ import annotations

from collections.abc import Sequence

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C stopped: 128 + SIGINT, as shells have it."""


class MlxkvError(Exception):
    """Base of all errors that mlxkv raises on purpose."""

    exit_code = 1
    status = 500


class UsageError(MlxkvError):
    """An argument or a request that cannot be served as it is."""

    exit_code = 2
    status = 400


class ContextExceeded(UsageError):
    """A prompt that is longer than the model's context.

    Args:
        n_tokens: length of the prompt.
        context: tokens that the model can attend to.
    """

    def __init__(self, n_tokens: int, context: int):
        self.n_tokens, self.context = n_tokens, context
        super().__init__(
            f"the prompt has {n_tokens:,} tokens and the context is {context:,}: shorten it by "
            f"{n_tokens - context + 1:,}, or cut it with --truncate or --overflow shift"
        )


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
        helps: what would have helped.
    """

    def __init__(
        self,
        from_tokens: int,
        to_tokens: int,
        max_tokens: int,
        limit: str = "",
        helps: Sequence[str] = (),
    ):
        self.from_tokens, self.to_tokens, self.max_tokens = from_tokens, to_tokens, max_tokens
        text = (
            f"the KV cache cannot grow from {from_tokens:,} to {to_tokens:,} tokens: the memory "
            f"limit{f' of {limit}' if limit else ''} allows {max_tokens:,}"
        )
        super().__init__("; ".join([text, *helps]))
