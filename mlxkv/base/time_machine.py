"""Keep folders that can be computed again out of Time Machine's backups (macOS).

The attribute is the one that `tmutil addexclusion` sets. It moves with the folder, and applies to
everything below it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

ATTRIBUTE = b"com.apple.metadata:com_apple_backup_excludeItem"


def exclude(folder: Path) -> bool:
    """Exclude a folder from backups; False on other systems and where its file system refuses."""
    if sys.platform != "darwin":
        return False
    import plistlib

    value = plistlib.dumps("com.apple.backupd", fmt=plistlib.FMT_BINARY)
    # Python has os.setxattr on Linux alone.
    setxattr = ctypes.CDLL(None).setxattr
    setxattr.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t,
                         ctypes.c_uint32, ctypes.c_int]  # fmt: skip
    return setxattr(os.fsencode(folder), ATTRIBUTE, value, len(value), 0, 0) == 0


def is_excluded(folder: Path) -> bool:
    """Whether a folder has the attribute; False on other systems."""
    if sys.platform != "darwin":
        return False
    getxattr = ctypes.CDLL(None).getxattr
    getxattr.restype = ctypes.c_ssize_t
    getxattr.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t,
                         ctypes.c_uint32, ctypes.c_int]  # fmt: skip
    return getxattr(os.fsencode(folder), ATTRIBUTE, None, 0, 0, 0) > 0
