"""What huggingface_hub's exceptions mean: one line each, which says what to do."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mlxkv.errors import DownloadError, MlxkvError, ModelNotFound, OutputError, UsageError
from mlxkv.store.hub import complete_revisions, full_name

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


_WRITING = (errno.EFBIG, errno.EIO, errno.EROFS)
"""Of a disk, with no file's name where a write fails."""
_SHOWN = 3
"""Other revisions that a message names."""


def hush() -> None:
    """Keep the client from logging."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def translate(repo_id: str, error: Exception, revision: str | None = None) -> MlxkvError:
    """The client's exception as one of ours, in one line that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    host, name = constants.ENDPOINT, full_name(repo_id, revision)
    match error:
        case MlxkvError():
            return error
        case RepositoryNotFoundError():
            return _not_given(repo_id, error, host)
        case RevisionNotFoundError():
            return ModelNotFound(
                f"{repo_id} has no revision {revision or 'main'!r}; {host}/{repo_id}/tree/main "
                "shows its branches and tags"
            )
        case EntryNotFoundError():
            return ModelNotFound(f"{name}: the hub has no such file or revision")
        case HFValidationError():
            return UsageError(f"{repo_id!r} is not the name of a Hugging Face repository")
        case HfHubHTTPError():
            return _refused(name, error, host)
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"no space left to download {name}: make room, or set HF_HUB_CACHE")
        case OSError() if error.errno in _WRITING:
            return OutputError(f"{name} cannot be written: {error.strerror}; set HF_HUB_CACHE")
        case OSError() if error.filename:
            return OutputError(f"{error.filename}: {error.strerror}; set HF_HUB_CACHE")
    others = [other for other in complete_revisions(repo_id) if other != name][:_SHOWN]
    if constants.HF_HUB_OFFLINE:
        have = f"; what is here: {', '.join(others)}" if others else ""
        return DownloadError(
            f"{name} is not complete in the cache and HF_HUB_OFFLINE is set: unset it, then "
            f"`mlxkv pull {name}`{have}"
        )
    have = f"such as {', '.join(others)}" if others else "`mlxkv list`"
    return DownloadError(
        f"cannot download {name}: {host} cannot be reached ({type(error).__name__}). Check the "
        f"network or HF_ENDPOINT, or run a model you have ({have})"
    )


def _not_given(repo_id: str, error: Exception, host: str) -> MlxkvError:
    """A repository that is gated, private or not there."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError

    if not isinstance(error, GatedRepoError):
        words = repo_id.partition("/")[2]
        return ModelNotFound(
            f"no model {repo_id!r} at {host} (if it is private: `hf auth login`); `mlxkv models "
            f"--find {words}` searches"
        )
    account = "with the account of your token" if get_token() else "then `hf auth login`"
    joined = " " if get_token() else ", "
    return DownloadError(
        f"{repo_id} is gated: accept its terms at {host}/{repo_id}{joined}{account} (or set "
        "HF_TOKEN)"
    )


def _refused(name: str, error: HfHubHTTPError, host: str) -> MlxkvError:
    """Any other status."""
    status = error.response.status_code if error.response is not None else "an error"
    if status == 401:
        return DownloadError(
            f"cannot download {name}: {host} refuses the token (401): set HF_TOKEN to a valid one, "
            "or `hf auth login`"
        )
    if status == 403:
        return DownloadError(
            f"cannot download {name}: {host} gives no access (403): ask for it at {host}/"
            f"{name.partition('@')[0]}, then `hf auth login` or set HF_TOKEN"
        )
    if status == 404:
        return ModelNotFound(f"{host} does not know {name} (404): check the name and HF_ENDPOINT")
    return DownloadError(f"cannot download {name}: {host} answers {status}; try again")
