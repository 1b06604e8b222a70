"""From an opened source and the user's options to a plan."""

from __future__ import annotations
