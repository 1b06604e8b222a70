"""Faults, that is errors that nothing was prepared for: logged once, on one line."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

from mlxkv.errors import InternalError, MlxkvError, one_line

_log = logging.getLogger(__name__)

_SHOWN_FRAMES = 3


def fault_line(error: BaseException) -> str:
    """An error with its class and its innermost places in the code, on one line."""
    frames = traceback.extract_tb(error.__traceback__)[-_SHOWN_FRAMES:]
    places = " < ".join(f"{Path(each.filename).name}:{each.lineno}" for each in reversed(frames))
    name = "" if isinstance(error, InternalError) else f"{type(error).__name__}: "
    return f"{name}{one_line(error)[:500]}" + (f" ({places})" if places else "")


def log_fault(what: str, error: BaseException) -> None:
    """Log an error on one line; its trace where debug messages are logged."""
    _log.error("%s: %s", what, fault_line(error))
    _log.debug("its trace", exc_info=error)


def told(error: BaseException) -> MlxkvError:
    """An error as a client may see it; what nothing was prepared for is logged, once."""
    if isinstance(error, MlxkvError) and not isinstance(error, InternalError):
        return error
    if not (isinstance(error, InternalError) and error.is_logged):
        log_fault("a request failed", error)
    return InternalError(is_logged=True)
